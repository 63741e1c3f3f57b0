//! [`Scheduler`]: which tokens of which sequences the next step computes.
//!
//! A pure machine: it is told what happened and asked for the next [`Plan`]; the engine's thread
//! has the plan computed and tells the [`Outcome`]. Every plan that is not empty is completed (or
//! abandoned), in order, and the next one may be asked for before that: then steps are *in flight*.
//!
//! - Decode first: a running sequence advances in every step. Then chunks of prompts, in order of
//!   arrival, until the step's tokens are used up.
//! - Sequences are admitted in order of arrival, when there are blocks for all their tokens and one
//!   more for each sequence that grows. So whoever waits arrived after all who run, unless
//!   preempted, and nobody is overtaken.
//! - When a growing sequence finds no block, the latest-arrived sequence that computes here gives
//!   its blocks back and waits again; its full blocks stay cached for as long as there is room.
//!   Exports never grow and are never preempted; imports not before their KV has arrived.
//! - A sequence that is embedded is a prompt: it never grows, and ends with its last chunk.
//! - A held sequence keeps its place but is overtaken until it is released: nothing is reserved for
//!   KV that is not about to come.
//! - Serving and fetching a cached prefix ([`pull`]) are leases without a sequence.
//! - A sequence with a grammar has a token sampled only when its mask is here ([`guided`]); it
//!   misses steps until then, and nobody waits for it.
//!
//! With a step in flight:
//!
//! - A sequence whose last token that step samples goes on with it, though nobody knows it yet. If
//!   the sequence turns out to have ended, what later steps compute for it is dropped.
//! - Blocks that the step may read or write are given to nobody else before it has ended
//!   ([`Flight`]), whatever becomes of the sequence.
//! - Nobody is preempted: if that is needed the plan is empty, until nothing is in flight.
//! - A sequence with a grammar does not go on before its last token is known. If that holds for
//!   most of those that generate, the plan is empty: one step for all of them costs less than two.
//! - A block is cached when the step that fills it has ended.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, Retry};

use crate::blocks::User;
use crate::events::{FirstToken, Kind};
use crate::prefix::PrefixCache;
use crate::sequence::{Phase, Sequence};
use flight::Flight;
use pull::Fetch;

mod complete;
mod event;
mod flight;
mod guided;
mod looks;
mod plan;
mod pull;
#[cfg(test)]
mod tests;

pub use complete::Outcome;
pub use event::Event;
pub use guided::{Following, MaskFound, MaskWanted};
pub use plan::{Plan, PlannedChunk};

/// Sizes that a scheduler keeps to; none is zero.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tokens of one block.
    pub block_tokens: usize,
    /// Blocks of the pool.
    pub kv_blocks: usize,
    /// Most tokens of one step.
    pub max_batch_tokens: usize,
    /// Most sequences admitted at once; at most `max_batch_tokens`.
    pub max_sequences: usize,
    /// Most tokens of a sequence; at most what the pool holds.
    pub max_model_len: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
}

/// Blocks that are held for a transfer, whatever becomes of the sequence.
#[derive(Debug)]
struct Lease {
    /// The leased blocks, and equal ones that the prefix cache held already: their successors may
    /// be cached under them.
    blocks: Vec<u32>,
    /// The sequence is over, which is to be told when the lease is returned.
    ended: bool,
}

/// The sequences of one engine and its blocks.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    root: ModelRoot,
    cache: PrefixCache,
    /// By order of arrival, which never changes.
    sequences: BTreeMap<u64, Sequence>,
    numbers: HashMap<TransferId, u64>,
    waiting: BTreeSet<u64>,
    /// Would wait, but are not to be admitted yet.
    held: BTreeSet<u64>,
    importing: BTreeSet<u64>,
    running: BTreeSet<u64>,
    deadlines: BTreeSet<(Instant, u64)>,
    /// Lack a mask that nobody computes yet.
    unguided: BTreeSet<u64>,
    /// Their masks are being computed.
    guiding: BTreeSet<u64>,
    leases: HashMap<TransferId, Lease>,
    fetches: HashMap<TransferId, Fetch>,
    /// Oldest first.
    flights: VecDeque<Flight>,
    arrivals: u64,
    /// Most prompt tokens of one step.
    prefill_limit: usize,
    events: Vec<Event>,
}

impl Scheduler {
    /// A scheduler with nothing to do, whose blocks are named from `root` on.
    #[must_use]
    pub fn new(limits: Limits, root: ModelRoot) -> Self {
        Self {
            cache: PrefixCache::new(limits.kv_blocks),
            prefill_limit: limits.max_batch_tokens,
            limits,
            root,
            sequences: BTreeMap::new(),
            numbers: HashMap::new(),
            waiting: BTreeSet::new(),
            held: BTreeSet::new(),
            importing: BTreeSet::new(),
            running: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            unguided: BTreeSet::new(),
            guiding: BTreeSet::new(),
            leases: HashMap::new(),
            fetches: HashMap::new(),
            flights: VecDeque::new(),
            arrivals: 0,
            events: Vec::new(),
        }
    }

    /// Queues a job: shorter than `max_model_len`, its tokens inside the vocabulary, and of an id
    /// that the scheduler does not [know](Self::knows).
    pub fn add(&mut self, job: Job, kind: Kind, now: Instant) {
        debug_assert!(!self.knows(job.id), "{} is here already", job.id);
        match kind {
            Kind::Serve => return self.serve(&job),
            Kind::Fetch => return self.fetch(&job),
            Kind::Local | Kind::Embed(_) | Kind::Export | Kind::Import => {}
        }
        let number = self.arrivals;
        self.arrivals += 1;
        let sequence = Sequence::new(job, kind, &self.root, self.limits.block_tokens, now);
        self.deadlines.extend(sequence.deadline.map(|deadline| (deadline, number)));
        self.numbers.insert(sequence.id, number);
        self.waiting.insert(number);
        if sequence.following.is_some() {
            self.unguided.insert(number);
        }
        self.sequences.insert(number, sequence);
    }

    /// A job that waits is not admitted before it is [released](Self::release). Without effect on
    /// others.
    pub fn hold(&mut self, id: TransferId) {
        if let Some(number) = self.numbers.get(&id)
            && self.waiting.remove(number)
        {
            self.held.insert(*number);
        }
    }

    /// A held job may be admitted, in its order of arrival. Without effect on others.
    pub fn release(&mut self, id: TransferId) {
        if let Some(number) = self.numbers.get(&id)
            && self.held.remove(number)
        {
            self.waiting.insert(*number);
        }
    }

    /// Ends a job in whatever phase it is; an unknown one is fine.
    pub fn cancel(&mut self, id: TransferId) {
        if let Some(&number) = self.numbers.get(&id) {
            self.end(number);
        }
        self.stop_fetch(id);
    }

    /// The KV of an import is complete, and nobody writes it any more: it runs. Without effect on
    /// jobs that do not wait for that.
    pub fn imported(&mut self, id: TransferId, first: &FirstToken) {
        let Some(&number) = self.numbers.get(&id) else { return };
        if !self.importing.remove(&number) {
            return;
        }
        self.running.insert(number);
        let sequence = self.sequences.get_mut(&number).expect("every number has a sequence");
        for &block in &sequence.blocks {
            self.cache.retain(block, User::Sequence);
            self.cache.release(block, User::Transfer);
        }
        sequence.phase = Phase::Running;
        // From here on it is computed here, and after a preemption from its first token on.
        sequence.kind = Kind::Local;
        sequence.sampled = true;
        if first.token as usize >= self.limits.vocab_size {
            let reason = format!("the exported token {} is outside the vocabulary", first.token);
            return self.fail(number, reason, Retry::OtherNode);
        }
        sequence.computed = sequence.tokens.len();
        sequence.planned = sequence.computed;
        self.cache_full_blocks(number);
        let Limits { block_tokens, max_model_len, .. } = self.limits;
        let sequence = self.sequences.get_mut(&number).expect("every number has a sequence");
        sequence.push(first.token, block_tokens);
        if first.finish.is_some() {
            self.end(number);
        } else if sequence.finish(max_model_len).is_some() {
            // The exporter told that the sequence goes on: nobody knows that it cannot here.
            let reason = format!("the exporter takes more than {max_model_len} tokens");
            self.fail(number, reason, Retry::OtherNode);
        } else {
            self.lacks_mask(number);
        }
    }

    /// Nobody reads or writes a job's leased blocks any more.
    pub fn lease_returned(&mut self, id: TransferId) {
        let Some(lease) = self.leases.remove(&id) else { return };
        for &block in lease.blocks.iter().rev() {
            self.cache.release(block, User::Transfer);
        }
        if lease.ended {
            self.events.push(Event::Ended { id });
        }
    }

    /// Bounds the prompt tokens of one step; at least one is computed.
    pub fn set_prefill_limit(&mut self, tokens: usize) {
        self.prefill_limit = tokens.max(1);
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// What entered and what left the prefix cache since the last call.
    pub fn take_cache_changes(&mut self) -> (Vec<BlockHash>, Vec<BlockHash>) {
        self.cache.take_changes()
    }

    fn end(&mut self, number: u64) {
        let id = self.remove(number).id;
        self.tell_end(id);
    }

    /// Tells that a job is over, with the return of its lease at the latest.
    fn tell_end(&mut self, id: TransferId) {
        match self.leases.get_mut(&id) {
            Some(lease) => lease.ended = true,
            None => self.events.push(Event::Ended { id }),
        }
    }

    fn fail(&mut self, number: u64, reason: String, retry: Retry) {
        let id = self.remove(number).id;
        self.events.push(Event::Failed { id, reason, retry });
    }

    /// Takes a sequence out of every queue and gives its blocks back.
    fn remove(&mut self, number: u64) -> Sequence {
        let mut sequence = self.sequences.remove(&number).expect("only present ones are removed");
        self.numbers.remove(&sequence.id);
        if let Some(deadline) = sequence.deadline {
            self.deadlines.remove(&(deadline, number));
        }
        let queues = [&mut self.waiting, &mut self.held, &mut self.importing, &mut self.running];
        for queue in queues.into_iter().chain([&mut self.unguided, &mut self.guiding]) {
            queue.remove(&number);
        }
        if sequence.in_flight() {
            let flight = self.flights.back_mut().expect("what is in flight is in a flight");
            flight.blocks.extend(sequence.blocks.drain(..).rev());
        } else {
            release_blocks(&mut self.cache, &mut sequence);
        }
        sequence
    }

    /// Caches the blocks of a sequence that have become full. Where the cache has an equal block
    /// already, the sequence goes on with that one: its bits are the same.
    fn cache_full_blocks(&mut self, number: u64) {
        let sequence = self.sequences.get_mut(&number).expect("every number has a sequence");
        for ordinal in sequence.cached_blocks..sequence.computed / self.limits.block_tokens {
            let (parent, hash) = (sequence.parent(ordinal), sequence.hashes[ordinal]);
            let own = sequence.blocks[ordinal];
            let cached = self.cache.insert(parent, hash, own);
            if cached != own {
                self.cache.retain(cached, User::Sequence);
                if let Some(lease) = self.leases.get_mut(&sequence.id) {
                    self.cache.retain(cached, User::Transfer);
                    lease.blocks.push(cached);
                }
                sequence.blocks[ordinal] = cached;
                match self.flights.back_mut().filter(|_| sequence.in_flight()) {
                    Some(flight) => flight.blocks.push(own),
                    None => self.cache.release(own, User::Sequence),
                }
            }
            sequence.cached_blocks = ordinal + 1;
        }
    }
}

fn release_blocks(cache: &mut PrefixCache, sequence: &mut Sequence) {
    let user = sequence.user();
    for block in sequence.blocks.drain(..).rev() {
        cache.release(block, user);
    }
}
