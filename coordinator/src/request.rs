//! One request: its tokens, and its current attempt on a pair of nodes or on one node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::hash::BlockHash;
use baton_proto::ids::{NodeId, TransferId};
use baton_proto::message::{Job, NodeFinish, TokenEvent};

use crate::cluster::NodeRef;
use crate::core::{ModelInfo, NewRequest, OutputToken, PlacementInfo, Summary, Timings, Usage};
use crate::decision::Decision;
use crate::history::MOST_FAILURES;

mod attempt;
mod view;

pub(crate) use attempt::{Attempt, Broken, Leg};

/// A request from its arrival to its end.
#[derive(Debug)]
pub(crate) struct Request {
    /// As it came.
    pub(crate) new: NewRequest,
    pub(crate) model: ModelInfo,
    /// Everything emitted.
    pub(crate) output: Vec<u32>,
    /// Hashes of the full blocks of all tokens, as far as computed.
    pub(crate) chain: Arc<Vec<BlockHash>>,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
    /// Number of the last attempt started; 0 before the first.
    pub(crate) attempt: u32,
    /// Attempts that failed since a token was last emitted.
    pub(crate) fruitless: u32,
    /// Pauses since then.
    pub(crate) pauses: u32,
    /// Where attempts failed since then.
    pub(crate) avoid: Vec<NodeRef>,
    /// Time since then that it was on no node, up to `idle_since`.
    pub(crate) waited: Duration,
    /// Since when it is on no node.
    pub(crate) idle_since: Option<Instant>,
    pub(crate) phase: Phase,
    /// From its arrival to the last attempt's start.
    pub(crate) held: Duration,
    pub(crate) timings: Timings,
    pub(crate) cached_tokens: Option<u32>,
    pub(crate) prompt_logprobs_sent: bool,
    /// Who computes the prompt, unless the other one does, and who generates: of the last attempt
    /// started.
    pub(crate) placement: Option<(Option<NodeId>, NodeId)>,
    /// How it was placed last, or where it waits.
    pub(crate) decision: Option<Decision>,
    /// Why attempts failed, the last few.
    failures: Vec<String>,
    /// When its timer is set for.
    pub(crate) armed: Option<Instant>,
}

/// What a request is doing.
#[derive(Debug)]
pub(crate) enum Phase {
    /// No node can take it; tried again at this time, and when a node joins.
    Waiting { again: Instant },
    /// Its turn on the nodes is to come.
    Held,
    /// On nodes.
    Running(Attempt),
    /// All tokens are emitted; the report of the transfer is awaited until this time.
    Finishing { attempt: Attempt, finish: NodeFinish, until: Instant },
}

impl Request {
    pub(crate) fn new(
        new: NewRequest,
        chain: Arc<Vec<BlockHash>>,
        model: ModelInfo,
        now: Instant,
    ) -> Self {
        Self {
            deadline: new.deadline.and_then(|left| now.checked_add(left)),
            new,
            model,
            output: Vec::new(),
            chain,
            arrived: now,
            attempt: 0,
            fruitless: 0,
            pauses: 0,
            avoid: Vec::new(),
            waited: Duration::ZERO,
            idle_since: None,
            phase: Phase::Waiting { again: now },
            held: Duration::ZERO,
            timings: Timings::default(),
            cached_tokens: None,
            prompt_logprobs_sent: false,
            placement: None,
            decision: None,
            failures: Vec::new(),
            armed: None,
        }
    }

    /// Tokens emitted; the position of the next one.
    pub(crate) fn emitted(&self) -> usize {
        self.output.len()
    }

    /// Tokens of the prompt.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.new.tokens.len()
    }

    /// Tokens of prompt and output so far.
    pub(crate) fn len(&self) -> usize {
        self.prompt_tokens() + self.emitted()
    }

    /// The prompt, followed by everything emitted.
    fn tokens(&self) -> Arc<[u32]> {
        if self.output.is_empty() {
            return self.new.tokens.clone();
        }
        self.new.tokens.iter().chain(&self.output).copied().collect()
    }

    /// Names the last attempt started.
    pub(crate) fn transfer(&self) -> TransferId {
        TransferId { request: self.new.id, attempt: self.attempt }
    }

    /// The attempt on nodes now, if it is this one.
    pub(crate) fn current(&mut self, id: TransferId) -> Option<&mut Attempt> {
        if self.attempt != id.attempt {
            return None;
        }
        self.on_nodes()
    }

    /// The attempt on nodes now.
    pub(crate) fn on_nodes(&mut self) -> Option<&mut Attempt> {
        match &mut self.phase {
            Phase::Waiting { .. } | Phase::Held => None,
            Phase::Running(attempt) | Phase::Finishing { attempt, .. } => Some(attempt),
        }
    }

    /// Whether log-probabilities of the prompt are asked for and not yet sent.
    pub(crate) fn wants_prompt_logprobs(&self) -> bool {
        self.new.sampling.prompt_logprobs.is_some() && !self.prompt_logprobs_sent
    }

    /// Brings the hashes up to date with the tokens.
    pub(crate) fn extend_chain(&mut self) {
        let size = self.model.geometry.block_tokens as usize;
        if self.len() / size == self.chain.len() {
            return;
        }
        let tokens = self.tokens();
        let chain = Arc::make_mut(&mut self.chain);
        for block in tokens.chunks_exact(size).skip(chain.len()) {
            let parent = chain.last().copied();
            let parent = parent.unwrap_or_else(|| self.model.root.start(self.new.salt));
            chain.push(parent.child(block));
        }
    }

    /// What the nodes of the last attempt started are to do.
    pub(crate) fn job(&self, now: Instant) -> Job {
        let mut sampling = self.new.sampling.clone();
        if self.prompt_logprobs_sent {
            sampling.prompt_logprobs = None;
        }
        Job {
            id: self.transfer(),
            tokens: self.tokens(),
            prompt_tokens: self.prompt_tokens(),
            sampling,
            salt: self.new.salt,
            deadline: self.deadline.map(|at| at.saturating_duration_since(now)),
            trace: self.new.trace,
        }
    }

    /// Takes a token of the running attempt; returns what can be emitted now, in order.
    pub(crate) fn take(
        &mut self,
        from: &NodeRef,
        event: TokenEvent,
        now: Instant,
    ) -> Result<Vec<OutputToken>, Broken> {
        let Phase::Running(attempt) = &mut self.phase else {
            return Ok(Vec::new());
        };
        let limit = self.new.sampling.max_tokens as usize;
        if event.token >= self.model.vocab_size {
            return Err(Broken("a node sent a token outside the vocabulary"));
        }
        let left = limit.saturating_sub(event.position as usize);
        if left == 0 || (left == 1 && event.finish.is_none()) {
            return Err(Broken("a node did not end at max_tokens"));
        }
        let mut ready = Vec::new();
        attempt.take(from, event, &mut ready)?;
        if let Some(last) = ready.iter().position(|event| event.finish.is_some()) {
            ready.truncate(last + 1);
        }
        if ready.is_empty() {
            return Ok(Vec::new());
        }
        if self.emitted() == 0 {
            self.timings.first_token = now.saturating_duration_since(self.arrived);
            self.timings.prefill = ready[0].prefill.unwrap_or_default();
        }
        (self.fruitless, self.pauses, self.waited) = (0, 0, Duration::ZERO);
        self.avoid.clear();
        self.output.extend(ready.iter().map(|event| event.token));
        let output =
            |TokenEvent { token, logprobs, finish, .. }| OutputToken { token, logprobs, finish };
        Ok(ready.into_iter().map(output).collect())
    }

    /// Where and for how long the prompt waited; the attempt that gives the first token counts.
    pub(crate) fn started(&mut self, cached_tokens: u32, queued: Duration) {
        if self.emitted() == 0 {
            self.cached_tokens = Some(cached_tokens.min(self.prompt_tokens() as u32));
            self.timings.queue = self.held + queued;
        }
    }

    /// Whether the attempt on nodes now fetches a prefix from this one.
    pub(crate) fn pulls_from(&mut self, node: &NodeRef) -> bool {
        self.on_nodes().is_some_and(|attempt| attempt.pull.as_ref() == Some(node))
    }

    /// The attempt's pull is over.
    pub(crate) fn pull_ended(&mut self) {
        if let Some(attempt) = self.on_nodes() {
            attempt.pull = None;
        }
    }

    /// When something is to be done about it without an event.
    pub(crate) fn due(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Waiting { again } => Some(again),
            Phase::Running(_) | Phase::Held => None,
            Phase::Finishing { until, .. } => Some(until),
        };
        [phase, self.deadline].into_iter().flatten().min()
    }

    /// Whether its time is over.
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// What the request took, if it ends now.
    pub(crate) fn summary(&self, now: Instant) -> Summary {
        let finish = match self.phase {
            Phase::Finishing { finish, .. } => Some(finish),
            _ => None,
        };
        let placement = self.placement.clone();
        let (prefill, decode) = placement.expect("what has tokens or is stopped was on nodes");
        let timings = self.timings(now);
        let (reason, outcomes) = match &self.decision {
            Some(decision) => (decision.reason(), decision.outcomes(&timings, self.held)),
            None => Default::default(),
        };
        let placement = PlacementInfo { prefill, decode, reason, attempts: self.attempt };
        Summary { finish, usage: self.usage(), timings, placement, outcomes }
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens() as u32,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            completion_tokens: self.emitted() as u32,
        }
    }

    fn timings(&self, now: Instant) -> Timings {
        Timings { total: now.saturating_duration_since(self.arrived), ..self.timings }
    }

    /// An attempt failed.
    pub(crate) fn failed_by(&mut self, reason: &str) {
        if self.failures.len() == MOST_FAILURES {
            self.failures.remove(0);
        }
        self.failures.push(reason.to_owned());
    }
}
