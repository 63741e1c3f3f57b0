//! The life of every request: arrival, attempts on nodes, tokens, retries, end.
//!
//! Pure: every call says what happened and when, and appends what is to be done. Always true: a
//! request ends exactly once; emitted positions are 0, 1, 2, …, each once; an attempt is fenced by
//! its number, so whatever an earlier one says is dropped; every node that an attempt was sent to
//! ends it by itself, is told to cancel it, or is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::hash::BlockHash;
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::{Command, NodeEvent, Retry};

use crate::cluster::NodeRef;
use crate::core::{ModelInfo, NewRequest, RETRY_AFTER, RequestError, SubmitError, Update};
use crate::embedding;
use crate::events::{Events, Happening, RefusedFor};
use crate::history::{History, IdPrefix, Stage};
use crate::life::{self, Flow, Start};
use crate::request::{Phase, Request};

mod placer;

pub use placer::{Answer, Placed, Placer, Wanted};

/// Attempts that may fail in a row without a token.
pub const MAX_FRUITLESS_ATTEMPTS: u32 = 8;
/// How long a request without progress waits for nodes.
pub const NODE_WAIT: Duration = Duration::from_secs(30);

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send a command to this life of a node.
    Send {
        /// Whom.
        to: NodeRef,
        /// What.
        command: Command,
    },
    /// Tell the client.
    Update {
        /// Which one.
        request: RequestId,
        /// What.
        update: Update,
    },
}

/// What every call needs.
pub struct Context<'a> {
    /// The time.
    pub now: Instant,
    /// Chooses nodes.
    pub placer: &'a mut dyn Placer,
    /// What operators are told.
    pub events: &'a mut Events,
    /// Where actions are appended.
    pub out: &'a mut Vec<Action>,
}

/// Bounds on what is held.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests at once.
    pub requests: usize,
    /// Tokens of all of them, prompts and outputs; checked at arrival.
    pub tokens: usize,
}

/// Requests that ended and attempts that were repeated, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Ended with a result.
    pub finished: u64,
    /// Ended without one.
    pub failed: u64,
    /// Attempts after the first.
    pub retried: u64,
    /// Tokens of prompts whose requests ended.
    pub prompt_tokens: u64,
    /// Of these, found in a prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Bytes of KV that prefill nodes sent.
    pub transfer_bytes: u64,
}

/// All requests that have not ended. See the module's description.
#[derive(Debug)]
pub struct Requests {
    limits: Limits,
    /// Boxed: they are large, and a tree moves its neighbours with each that comes and goes.
    live: BTreeMap<RequestId, Box<Request>>,
    timers: BTreeSet<(Instant, RequestId)>,
    tokens: usize,
    totals: Totals,
    history: History,
    /// Attempts that failed on a node and may be repeated elsewhere.
    retries: f64,
}

/// What each request that arrives adds to the retries that all may have, and most of these. More
/// would make a cluster that fails for lack of capacity fail entirely.
const RETRIES_PER_REQUEST: f64 = 0.1;
const MOST_RETRIES: f64 = 100.0;

impl Requests {
    /// No requests.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let (live, timers) = (BTreeMap::new(), BTreeSet::new());
        let (totals, history) = Default::default();
        Self { limits, live, timers, tokens: 0, totals, history, retries: MOST_RETRIES }
    }

    /// Requests that have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether all requests have ended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Counts since the start.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// A request arrives and is sent to nodes at once, or is refused and nothing is kept.
    pub fn arrive(
        &mut self,
        new: NewRequest,
        chain: Arc<Vec<BlockHash>>,
        model: ModelInfo,
        arrived: Instant,
        cx: &mut Context<'_>,
    ) -> Result<(), SubmitError> {
        let id = new.id;
        if self.live.contains_key(&id) {
            return Err(SubmitError::DuplicateId(id));
        }
        let tokens = self.tokens.saturating_add(new.tokens.len());
        let full = self.live.len() >= self.limits.requests || tokens > self.limits.tokens;
        let mut request = Box::new(Request::new(new, chain, model, arrived));
        let start = if full { Start::Full } else { life::arrive(&mut request, cx) };
        let (error, why) = match start {
            Start::Begun => {
                self.take_in(id, request, tokens);
                return Ok(());
            }
            Start::Full => {
                (SubmitError::Overloaded { retry_after: RETRY_AFTER }, RefusedFor::Overload)
            }
            Start::NoNodes => {
                (SubmitError::NoNodes(request.model.name.clone()), RefusedFor::NoNodes)
            }
            Start::TooLate { retry_after } => {
                (SubmitError::TooLate { retry_after }, RefusedFor::Lateness)
            }
        };
        cx.events.refused(why, cx.now);
        self.history.push(request.into_record(Stage::Refused, Some(error.to_string()), cx.now));
        Err(error)
    }

    fn take_in(&mut self, id: RequestId, mut request: Box<Request>, tokens: usize) {
        self.retries = (self.retries + RETRIES_PER_REQUEST).min(MOST_RETRIES);
        request.armed = request.due();
        self.timers.extend(request.armed.map(|at| (at, id)));
        self.tokens = tokens;
        self.live.insert(id, request);
    }

    /// How long it took to choose the nodes of a request that just arrived.
    pub fn placed_in(&mut self, id: RequestId, took: Duration) {
        if let Some(request) = self.live.get_mut(&id) {
            request.timings.place = took;
        }
    }

    /// A node says something.
    pub fn event(&mut self, from: &NodeRef, event: NodeEvent, cx: &mut Context<'_>) {
        match event {
            NodeEvent::Tokens(tokens) => {
                for token in tokens {
                    let id = token.id;
                    self.attempt(id, from, cx, |r, cx| life::take(r, from, token, cx));
                }
            }
            NodeEvent::Started { id, cached_tokens, queued } => {
                self.attempt(id, from, cx, |r, cx| {
                    life::started(r, from, cached_tokens, queued, cx)
                });
            }
            NodeEvent::PromptLogprobs { id, tokens } => {
                self.attempt(id, from, cx, |r, cx| life::prompt_logprobs(r, from, tokens, cx));
            }
            NodeEvent::Embedded { id, values, prefill } => {
                self.attempt(id, from, cx, |r, cx| {
                    embedding::embedded(r, from, (id, values, prefill), cx)
                });
            }
            NodeEvent::Transferred { id, hidden, exposed, bytes, .. } => {
                self.attempt(id, from, cx, |r, cx| {
                    life::transferred(r, from, (hidden, exposed, bytes), cx)
                });
            }
            NodeEvent::Failed { id, .. } if id.is_pull() => {
                self.with(id.request, cx, |r, cx| {
                    if r.transfer().pull() == id && r.pulls_from(from) {
                        life::pull_failed(r, cx);
                    }
                    Flow::Go
                });
            }
            NodeEvent::Failed { id, reason, retry } => self.failed(from, id, reason, retry, cx),
            NodeEvent::Pulled { id, tokens, took } => {
                self.attempt(id, from, cx, |r, cx| {
                    r.pull_ended();
                    cx.placer.pulled(id, tokens as usize, took, cx.now);
                    Flow::Go
                });
            }
            NodeEvent::Report(_) | NodeEvent::Cache { .. } | NodeEvent::Snapshot { .. } => {}
        }
    }

    /// A node failed an attempt.
    fn failed(
        &mut self,
        from: &NodeRef,
        id: TransferId,
        reason: String,
        retry: Retry,
        cx: &mut Context<'_>,
    ) {
        let may_repeat = self.retries >= 1.0;
        let mut counts = false;
        self.attempt(id, from, cx, |r, cx| {
            counts = retry == Retry::OtherNode;
            life::node_failed(r, from, reason, retry, may_repeat, cx)
        });
        if counts && may_repeat {
            self.retries -= 1.0;
        }
    }

    /// A life of a node is over, or its stream is.
    pub fn node_lost(&mut self, node: &NodeRef, cx: &mut Context<'_>) {
        let on = |r: &mut Request| {
            r.pulls_from(node) || r.on_nodes().is_some_and(|a| a.leg(node).is_some())
        };
        let hit: Vec<RequestId> =
            self.live.iter_mut().filter_map(|(&id, r)| on(r).then_some(id)).collect();
        for id in hit {
            self.with(id, cx, |r, cx| life::node_gone(r, node, cx));
        }
    }

    /// A node joined: requests that wait for one are placed.
    pub fn node_joined(&mut self, cx: &mut Context<'_>) {
        let waits = |r: &Request| matches!(r.phase, Phase::Waiting { .. });
        let waiting: Vec<RequestId> =
            self.live.iter().filter_map(|(&id, r)| waits(r).then_some(id)).collect();
        for id in waiting {
            self.with(id, cx, |r, cx| {
                life::start_anywhere(r, cx);
                Flow::Go
            });
        }
    }

    /// It is the turn of a request that was held.
    pub fn turn(&mut self, id: RequestId, placed: Placed, cx: &mut Context<'_>) {
        self.with(id, cx, |r, cx| {
            life::go(r, placed, cx);
            Flow::Go
        });
    }

    /// The node for which a request was held is gone.
    pub fn again(&mut self, id: RequestId, cx: &mut Context<'_>) {
        self.with(id, cx, |r, cx| {
            life::pause(r, cx.now);
            life::start_anywhere(r, cx);
            Flow::Go
        });
    }

    /// The client is gone, or wants no more.
    pub fn cancel(&mut self, id: RequestId, cx: &mut Context<'_>) {
        self.with(id, cx, |_, _| Flow::End(Update::Failed(RequestError::Cancelled)));
    }

    /// The client has what it wanted.
    pub fn stop(&mut self, id: RequestId, cx: &mut Context<'_>) {
        self.with(id, cx, |r, cx| match r.placement {
            Some(_) => {
                // Who has all tokens already was counted with the last of them.
                if matches!(r.phase, Phase::Running(_)) {
                    life::answered(r, cx);
                }
                Flow::End(Update::Done(r.summary(cx.now)))
            }
            None => Flow::End(Update::Failed(RequestError::Cancelled)),
        });
    }

    /// Ends all requests.
    pub fn shut_down(&mut self, cx: &mut Context<'_>) {
        while let Some((&id, _)) = self.live.first_key_value() {
            self.with(id, cx, |_, _| Flow::End(Update::Failed(RequestError::ShuttingDown)));
        }
    }

    /// When [`Self::handle_timeout`] must be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|&(at, _)| at)
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, cx: &mut Context<'_>) {
        let due = self.timers.iter().take_while(|&&(at, _)| at <= cx.now);
        let due: Vec<RequestId> = due.map(|&(_, id)| id).collect();
        for id in due {
            self.with(id, cx, life::due_now);
        }
    }

    /// Acts on a request whose attempt `id` runs on `from`; anything else is void.
    fn attempt(
        &mut self,
        id: TransferId,
        from: &NodeRef,
        cx: &mut Context<'_>,
        act: impl FnOnce(&mut Request, &mut Context<'_>) -> Flow,
    ) {
        self.with(id.request, cx, |r, cx| {
            if r.current(id).is_some_and(|attempt| attempt.leg(from).is_some()) {
                return act(r, cx);
            }
            Flow::Go
        });
    }

    /// Acts on a request and brings everything kept about it up to date.
    fn with(
        &mut self,
        id: RequestId,
        cx: &mut Context<'_>,
        act: impl FnOnce(&mut Request, &mut Context<'_>) -> Flow,
    ) {
        let Some(request) = self.live.get_mut(&id) else {
            return;
        };
        // The first attempt is none that is repeated, whenever it starts.
        let (tokens, attempt) = (request.len(), request.attempt.max(1));
        let flow = act(request, cx);
        self.totals.retried += u64::from(request.attempt.saturating_sub(attempt));
        self.tokens += request.len() - tokens;
        self.totals.generated_tokens += (request.len() - tokens) as u64;
        let due = if matches!(flow, Flow::Go) { request.due() } else { None };
        if due != request.armed {
            let old = std::mem::replace(&mut request.armed, due);
            old.map(|at| self.timers.remove(&(at, id)));
            self.timers.extend(due.map(|at| (at, id)));
        }
        if let Flow::End(update) = flow {
            life::release(request, cx);
            self.tokens -= request.len();
            if let Some(request) = self.live.remove(&id) {
                self.remember(request, &update, cx);
            }
            cx.out.push(Action::Update { request: id, update });
        }
    }

    /// A request ended with `update`.
    fn remember(&mut self, request: Box<Request>, update: &Update, cx: &mut Context<'_>) {
        let (stage, error) = match update {
            Update::Failed(RequestError::Cancelled) => (Stage::Cancelled, None),
            Update::Failed(error) => (Stage::Failed, Some(error.to_string())),
            _ => (Stage::Finished, None),
        };
        if let Some(reason) = &error {
            let failed = Happening::Failed { request: request.new.id, reason: reason.clone() };
            cx.events.push(failed, cx.now);
        }
        let record = request.into_record(stage, error, cx.now);
        let (totals, usage) = (&mut self.totals, record.view.usage);
        *(if stage == Stage::Finished { &mut totals.finished } else { &mut totals.failed }) += 1;
        totals.prompt_tokens += u64::from(usage.prompt_tokens);
        totals.cached_tokens += u64::from(usage.cached_tokens);
        totals.transfer_bytes += record.view.timings.transfer_bytes;
        self.history.push(record);
    }

    /// What is remembered of requests that ended.
    pub(crate) fn history(&self) -> &History {
        &self.history
    }

    /// Requests that have not ended.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Request> {
        self.live.values().map(|request| &**request)
    }

    /// Those whose id begins so, which have not ended.
    pub(crate) fn running_as(&self, id: IdPrefix) -> impl Iterator<Item = &Request> {
        self.live.range(id.range()).map(|(_, request)| &**request)
    }
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;
