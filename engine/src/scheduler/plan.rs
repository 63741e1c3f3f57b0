//! The next step of a [`Scheduler`].

use std::time::Instant;

use baton_proto::ids::TransferId;
use baton_proto::message::Retry;

use super::{Event, Lease, Scheduler, release_blocks};
use crate::blocks::User;
use crate::events::Kind;
use crate::forward::Wanted;
use crate::sequence::{Phase, Sequence};

/// What one step computes, and what was done to make room for it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Plan {
    /// Chunks of different sequences; if empty, nothing can be done before something happens or a
    /// step in flight ends.
    pub chunks: Vec<PlannedChunk>,
    /// Sequences that gave their blocks back and wait again.
    pub preempted: Vec<TransferId>,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedChunk {
    /// The job.
    pub id: TransferId,
    /// The sequence's number in order of arrival.
    pub number: u64,
    /// Position of the first token.
    pub start: usize,
    /// If its only token is not known yet: the chunk of the plan before this one that samples it.
    pub pending: Option<usize>,
    /// How many tokens.
    pub tokens: usize,
    /// What is needed of its rows.
    pub wanted: Wanted,
    /// A token is sampled from the last row.
    pub samples: bool,
    /// The sequence generates; otherwise the chunk is a part of its prompt.
    pub decode: bool,
}

impl PlannedChunk {
    /// The position after the last token.
    #[must_use]
    pub fn end(&self) -> usize {
        self.start + self.tokens
    }
}

impl Plan {
    /// Tokens computed in the step.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.tokens).sum()
    }

    /// Tokens of prompts among them.
    #[must_use]
    pub fn prefill_tokens(&self) -> usize {
        self.chunks.iter().filter(|chunk| !chunk.decode).map(|chunk| chunk.tokens).sum()
    }
}

impl Scheduler {
    /// Fails what is late, preempts and admits as blocks demand, and says what to compute.
    pub fn plan(&mut self, now: Instant) -> Plan {
        self.expire(now);
        let mut plan = Plan::default();
        if self.plan_decodes(&mut plan).is_err() {
            return Plan::default();
        }
        let left = self.limits.max_batch_tokens - plan.tokens();
        let mut budget = left.min(self.prefill_limit);
        self.plan_prefills(&mut plan, &mut budget);
        // Who was just preempted would only be admitted to be preempted again.
        if plan.preempted.is_empty() || plan.chunks.is_empty() {
            self.admit(&mut plan, &mut budget, now);
        }
        self.depart(&plan);
        plan
    }

    fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, number)) = self.deadlines.first()
            && deadline <= now
        {
            self.fail(number, "deadline".to_owned(), Retry::Never);
        }
    }

    fn plan_decodes(&mut self, plan: &mut Plan) -> Result<(), InFlight> {
        if self.leaves_most_behind() {
            return Err(InFlight);
        }
        let mut from = 0;
        while let Some(&number) = self.running.range(from..).next() {
            from = number + 1;
            let sequence = &self.sequences[&number];
            let goes_on = sequence.decoding()
                && sequence.may_sample()
                && !sequence.ends_in_flight(self.limits.max_model_len);
            if goes_on && self.grow(number, plan)? {
                plan.chunks.push(planned(number, &self.sequences[&number], 1));
            }
        }
        Ok(())
    }

    /// Makes sure that a decoding sequence has a block for its next token. Preempts the latest
    /// arrivals until there is one; false if that was the sequence itself.
    fn grow(&mut self, number: u64, plan: &mut Plan) -> Result<bool, InFlight> {
        let block_tokens = self.limits.block_tokens;
        loop {
            let sequence = self.sequences.get_mut(&number).expect("running sequences are here");
            if sequence.planned < sequence.blocks.len() * block_tokens {
                return Ok(true);
            }
            if self.cache.allocate(1, User::Sequence, &mut sequence.blocks).is_ok() {
                return Ok(true);
            }
            // Blocks of a step in flight cannot be taken, and it may end sequences by itself.
            if !self.flights.is_empty() {
                return Err(InFlight);
            }
            let local = |number: &&u64| self.sequences[number].kind != Kind::Export;
            let latest = self.running.iter().rev().find(local);
            let victim = *latest.expect("the growing sequence itself could be preempted");
            plan.preempted.push(self.preempt(victim));
            if victim == number {
                return Ok(false);
            }
        }
    }

    fn preempt(&mut self, number: u64) -> TransferId {
        let sequence = self.sequences.get_mut(&number).expect("running sequences are here");
        release_blocks(&mut self.cache, sequence);
        (sequence.computed, sequence.planned, sequence.cached_blocks) = (0, 0, 0);
        sequence.pooled.clear();
        sequence.phase = Phase::Waiting;
        // Until it is admitted again all its tokens count as a prompt to compute.
        sequence.admitted_tokens = sequence.tokens.len();
        self.running.remove(&number);
        self.waiting.insert(number);
        sequence.id
    }

    fn plan_prefills(&mut self, plan: &mut Plan, budget: &mut usize) {
        for &number in &self.running {
            let sequence = &self.sequences[&number];
            if !sequence.decoding() {
                plan_prefill(plan, budget, number, sequence);
            }
        }
    }

    /// Admits in order of arrival. What computes here is admitted only when it can begin in this
    /// step, so that it finds in the cache what others compute until then.
    fn admit(&mut self, plan: &mut Plan, budget: &mut usize, now: Instant) {
        while let Some(&number) = self.waiting.first() {
            let import = self.sequences[&number].kind == Kind::Import;
            let room = self.admitted() < self.limits.max_sequences && (import || *budget > 0);
            if !room {
                break;
            }
            if !import && self.joins_fetch(number) {
                continue;
            }
            if !self.give_blocks(number) {
                break;
            }
            self.waiting.remove(&number);
            let queue = if import { &mut self.importing } else { &mut self.running };
            queue.insert(number);
            self.announce(number, now);
            let sequence = &self.sequences[&number];
            if !import {
                plan_prefill(plan, budget, number, sequence);
            }
        }
    }

    /// Gives a waiting sequence the blocks of all its tokens, cached ones first, if that leaves
    /// one for every sequence that grows.
    fn give_blocks(&mut self, number: u64) -> bool {
        let block_tokens = self.limits.block_tokens;
        let grow = self.growing();
        let sequence = self.sequences.get_mut(&number).expect("waiting sequences are here");
        let found = self.cache.find(sequence.matchable(block_tokens));
        let needed = sequence.tokens.len().div_ceil(block_tokens) - found.blocks;
        if needed + grow > self.cache.available() - found.unused {
            return false;
        }
        sequence.phase = match sequence.kind {
            Kind::Import => Phase::Importing,
            _ => Phase::Running,
        };
        let (user, mut blocks) = (sequence.user(), Vec::with_capacity(found.blocks + needed));
        let cached = &sequence.hashes[..found.blocks];
        self.cache.share(cached, user, &mut blocks);
        let allocated = self.cache.allocate(needed, user, &mut blocks);
        allocated.expect("as many blocks as were found available");
        sequence.blocks = blocks;
        sequence.cached_blocks = found.blocks;
        sequence.computed = found.blocks * block_tokens;
        sequence.planned = sequence.computed;
        sequence.admitted_tokens = sequence.tokens.len();
        true
    }

    /// Sequences that may each need one more block soon.
    pub(super) fn growing(&self) -> usize {
        let admitted = self.running.iter().chain(&self.importing);
        admitted.filter(|number| self.sequences[number].grows()).count()
    }

    /// Tells the first admission of a sequence, and leases its blocks if it is for a transfer.
    fn announce(&mut self, number: u64, now: Instant) {
        let sequence = self.sequences.get_mut(&number).expect("admitted sequences are here");
        if std::mem::replace(&mut sequence.announced, true) {
            return;
        }
        let Sequence { id, kind, cached_blocks, arrived, .. } = *sequence;
        let lease = match kind {
            Kind::Local | Kind::Embed(_) => None,
            _ => Some(sequence.blocks.clone()),
        };
        if let Some(lease) = &lease {
            for &block in lease {
                self.cache.retain(block, User::Transfer);
            }
            self.leases.insert(id, Lease { blocks: lease.clone(), ended: false });
        }
        let lease = lease.unwrap_or_default();
        let queued = now.saturating_duration_since(arrived);
        self.events.push(Event::Admitted { id, kind, lease, cached_blocks, queued });
    }
}

/// Nothing is planned before a step in flight has ended: somebody has to be preempted, or too many
/// wait for its tokens.
struct InFlight;

/// As much of a prompt as the step's tokens allow, but for its last token, from which the first
/// one of the output is sampled, if its mask is not here.
fn plan_prefill(plan: &mut Plan, budget: &mut usize, number: u64, sequence: &Sequence) {
    let computable = sequence.remaining() - usize::from(!sequence.may_sample());
    let tokens = computable.min(*budget);
    if tokens > 0 {
        *budget -= tokens;
        plan.chunks.push(planned(number, sequence, tokens));
    }
}

fn planned(number: u64, sequence: &Sequence, tokens: usize) -> PlannedChunk {
    let (start, end) = (sequence.planned, sequence.planned + tokens);
    let pools = sequence.pools_from(start, end);
    let samples = end == sequence.length() && !sequence.embeds();
    let pending = (sequence.pending > 0).then_some(sequence.chunk);
    // The row of a position has the log-probabilities of the next one.
    let prompt_rows = sequence.prompt_logprobs.is_some() && start + 1 < sequence.prompt_tokens;
    let wanted = match (pools, prompt_rows, samples) {
        (Some(first), ..) => Wanted::Hidden(first),
        (None, true, _) => Wanted::All,
        (None, false, true) => Wanted::Last,
        (None, false, false) => Wanted::None,
    };
    let decode = sequence.decoding();
    PlannedChunk { id: sequence.id, number, start, pending, tokens, wanted, samples, decode }
}
