//! The life of every request: arrival, attempts on nodes, tokens, retries, end.
//!
//! Pure: every call says what happened and when, and appends what is to be done. Always true: a
//! request ends exactly once; emitted positions are 0, 1, 2, …, each once; an attempt is fenced by
//! its number, so whatever an earlier one says is dropped; every node that an attempt was sent to
//! ends it by itself, is told to cancel it, or is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use baton_proto::hash::BlockHash;
use baton_proto::ids::{NodeId, RequestId, TransferId};
use baton_proto::message::{Command, Logprobs, NodeEvent, NodeFinish, Peer, Retry, TokenEvent};

use crate::cluster::NodeRef;
use crate::core::{
    ModelInfo, NewRequest, PlacementInfo, RETRY_AFTER, RequestError, SubmitError, Update,
};
use crate::request::{Attempt, Broken, Leg, Phase, Request};

/// Attempts that may fail in a row without a token.
pub const MAX_FRUITLESS_ATTEMPTS: u32 = 8;
/// How long a request without progress waits for nodes.
pub const NODE_WAIT: Duration = Duration::from_secs(30);
/// First pause before nodes that failed are used again; doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a request with all its tokens waits for the report of its transfer.
const TRANSFER_REPORT_WAIT: Duration = Duration::from_millis(100);

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

/// An attempt that needs nodes.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The attempt.
    pub id: TransferId,
    /// The model.
    pub model: &'a ModelInfo,
    /// Tokens of prompt and output so far.
    pub tokens: usize,
    /// Hashes of their full blocks.
    pub chain: &'a [BlockHash],
    /// Lives of nodes that must not be used.
    pub avoid: &'a [NodeRef],
}

/// Where an attempt goes.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Who computes the prompt; `None`: the decode node itself.
    pub prefill: Option<Peer>,
    /// Who generates the tokens.
    pub decode: Peer,
    /// Why, for people.
    pub reason: String,
}

/// Chooses nodes and keeps account of what they were given.
pub trait Placer {
    /// Chooses nodes for an attempt, which is then sent to them.
    fn place(&mut self, wanted: &Wanted<'_>, now: Instant) -> Option<Placed>;
    /// The node has computed the attempt's prompt.
    fn prefilled(&mut self, node: &NodeId, id: TransferId);
    /// The node has nothing to do with the attempt any more.
    fn ended(&mut self, node: &NodeId, id: TransferId);
}

/// What every call needs.
pub struct Context<'a> {
    /// The time.
    pub now: Instant,
    /// Chooses nodes.
    pub placer: &'a mut dyn Placer,
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
}

/// All requests that have not ended. See the module's description.
#[derive(Debug)]
pub struct Requests {
    limits: Limits,
    live: BTreeMap<RequestId, Request>,
    timers: BTreeSet<(Instant, RequestId)>,
    tokens: usize,
    totals: Totals,
}

enum Flow {
    Go,
    End(Update),
}

impl Requests {
    /// No requests.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let (live, timers) = (BTreeMap::new(), BTreeSet::new());
        Self { limits, live, timers, tokens: 0, totals: Totals::default() }
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
        chain: Vec<BlockHash>,
        model: ModelInfo,
        arrived: Instant,
        cx: &mut Context<'_>,
    ) -> Result<(), SubmitError> {
        let id = new.id;
        if self.live.contains_key(&id) {
            return Err(SubmitError::DuplicateId(id));
        }
        let tokens = self.tokens.saturating_add(new.tokens.len());
        if self.live.len() >= self.limits.requests || tokens > self.limits.tokens {
            return Err(SubmitError::Overloaded { retry_after: RETRY_AFTER });
        }
        let name = model.name.clone();
        let mut request = Request::new(new, chain, model, arrived);
        if !start(&mut request, &[], cx) {
            return Err(SubmitError::NoNodes(name));
        }
        request.armed = request.due();
        self.timers.extend(request.armed.map(|at| (at, id)));
        self.tokens = tokens;
        self.live.insert(id, request);
        Ok(())
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
                    self.attempt(id, from, cx, |r, cx| take(r, from, token, cx));
                }
            }
            NodeEvent::Started { id, cached_tokens, queued } => {
                self.attempt(id, from, cx, |r, _| {
                    if r.on_nodes().is_some_and(|attempt| attempt.computes(from)) {
                        r.started(cached_tokens, queued);
                    }
                    Flow::Go
                });
            }
            NodeEvent::PromptLogprobs { id, tokens } => {
                self.attempt(id, from, cx, |r, cx| prompt_logprobs(r, from, tokens, cx));
            }
            NodeEvent::Transferred { id, hidden, exposed, bytes, .. } => {
                self.attempt(id, from, cx, |r, cx| {
                    transferred(r, from, (hidden, exposed, bytes), cx)
                });
            }
            NodeEvent::Failed { id, reason, retry } => {
                self.attempt(id, from, cx, |r, cx| node_failed(r, from, reason, retry, cx));
            }
            NodeEvent::Report(_) | NodeEvent::Cache { .. } | NodeEvent::Snapshot { .. } => {}
        }
    }

    /// A life of a node is over, or its stream is.
    pub fn node_lost(&mut self, node: &NodeRef, cx: &mut Context<'_>) {
        let on = |r: &mut Request| r.on_nodes().is_some_and(|a| a.leg(node).is_some());
        let hit: Vec<RequestId> =
            self.live.iter_mut().filter_map(|(&id, r)| on(r).then_some(id)).collect();
        for id in hit {
            self.with(id, cx, |r, cx| node_gone(r, node, cx));
        }
    }

    /// A node joined: requests that wait for one are placed.
    pub fn node_joined(&mut self, cx: &mut Context<'_>) {
        let waits = |r: &Request| matches!(r.phase, Phase::Waiting { .. });
        let waiting: Vec<RequestId> =
            self.live.iter().filter_map(|(&id, r)| waits(r).then_some(id)).collect();
        for id in waiting {
            self.with(id, cx, |r, cx| {
                start_anywhere(r, cx);
                Flow::Go
            });
        }
    }

    /// The client is gone, or wants no more.
    pub fn cancel(&mut self, id: RequestId, cx: &mut Context<'_>) {
        self.with(id, cx, |_, _| Flow::End(Update::Failed(RequestError::Cancelled)));
    }

    /// The client has what it wanted.
    pub fn stop(&mut self, id: RequestId, cx: &mut Context<'_>) {
        self.with(id, cx, |r, cx| Flow::End(Update::Done(r.summary(cx.now))));
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
            self.with(id, cx, due_now);
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
        let (tokens, attempt) = (request.new.tokens.len(), request.attempt);
        let flow = act(request, cx);
        self.totals.retried += u64::from(request.attempt - attempt);
        self.tokens += request.new.tokens.len() - tokens;
        let due = if matches!(flow, Flow::Go) { request.due() } else { None };
        if due != request.armed {
            let old = std::mem::replace(&mut request.armed, due);
            old.map(|at| self.timers.remove(&(at, id)));
            self.timers.extend(due.map(|at| (at, id)));
        }
        if let Flow::End(update) = flow {
            release(request, cx);
            self.tokens -= request.new.tokens.len();
            self.live.remove(&id);
            match update {
                Update::Done(_) => self.totals.finished += 1,
                _ => self.totals.failed += 1,
            }
            cx.out.push(Action::Update { request: id, update });
        }
    }
}

/// Sends the request's next attempt to nodes, if there are any.
fn start(request: &mut Request, avoid: &[NodeRef], cx: &mut Context<'_>) -> bool {
    let id = TransferId { request: request.new.id, attempt: request.attempt + 1 };
    let tokens = request.new.tokens.len();
    request.extend_chain();
    // Log-probabilities of the prompt have to be computed: the prefix cache is not read.
    let chain = if request.wants_prompt_logprobs() { &[][..] } else { &request.chain };
    let wanted = Wanted { id, model: &request.model, tokens, chain, avoid };
    let Some(Placed { prefill, decode, reason }) = cx.placer.place(&wanted, cx.now) else {
        return false;
    };
    request.attempt = id.attempt;
    request.placement = Some(PlacementInfo {
        prefill: prefill.as_ref().map(|peer| peer.node.clone()),
        decode: decode.node.clone(),
        reason,
        attempts: id.attempt,
    });
    let life = |peer: &Peer| NodeRef { node: peer.node.clone(), epoch: peer.epoch };
    let (source, target) = (prefill.as_ref().map(life), life(&decode));
    let attempt = Attempt::new(source.clone(), target.clone(), request.emitted());
    request.phase = Phase::Running(attempt);
    // The reservation and the prefill start together: neither waits for the other.
    let job = request.job(cx.now);
    if let Some(to) = source {
        let command = Command::Prefill { job: job.clone(), decode };
        cx.out.push(Action::Send { to, command });
    }
    cx.out.push(Action::Send { to: target, command: Command::Decode { job, prefill } });
    true
}

/// The same, with nodes where it failed before if there are no others.
fn start_anywhere(request: &mut Request, cx: &mut Context<'_>) -> bool {
    let avoid = std::mem::take(&mut request.avoid);
    let started = start(request, &avoid, cx) || (!avoid.is_empty() && start(request, &[], cx));
    request.avoid = avoid;
    started
}

/// Ends what a node does for an attempt; `cancel`: it has to be told.
fn close(leg: &mut Leg, id: TransferId, cancel: bool, cx: &mut Context<'_>) {
    if !std::mem::take(&mut leg.open) {
        return;
    }
    cx.placer.ended(&leg.node.node, id);
    if cancel {
        cx.out.push(Action::Send { to: leg.node.clone(), command: Command::Cancel(id) });
    }
}

/// Ends the attempt on all nodes that still have a part in it.
fn release(request: &mut Request, cx: &mut Context<'_>) {
    let id = request.transfer();
    if let Some(attempt) = request.on_nodes() {
        attempt.legs().for_each(|leg| close(leg, id, true, cx));
    }
}

fn close_leg(request: &mut Request, node: &NodeRef, cx: &mut Context<'_>) {
    let id = request.transfer();
    if let Some(leg) = request.on_nodes().and_then(|attempt| attempt.leg(node)) {
        close(leg, id, false, cx);
    }
}

/// The attempt is lost: try again, elsewhere if possible.
fn again(
    request: &mut Request,
    failed: Option<&NodeRef>,
    reason: String,
    counts: bool,
    cx: &mut Context<'_>,
) -> Flow {
    release(request, cx);
    if request.is_late(cx.now) {
        return Flow::End(Update::Failed(RequestError::DeadlineExceeded));
    }
    request.fruitless += u32::from(counts);
    if request.fruitless >= MAX_FRUITLESS_ATTEMPTS {
        let attempts = request.attempt;
        return Flow::End(Update::Failed(RequestError::Exhausted { attempts, reason }));
    }
    if let Some(failed) = failed.filter(|&failed| !request.avoid.contains(failed)) {
        request.avoid.push(failed.clone());
    }
    request.stalled.get_or_insert(cx.now);
    pause(request, cx.now);
    let avoid = std::mem::take(&mut request.avoid);
    start(request, &avoid, cx);
    request.avoid = avoid;
    Flow::Go
}

fn pause(request: &mut Request, now: Instant) {
    let pause = FIRST_PAUSE * 2_u32.saturating_pow(request.pauses.min(16));
    request.pauses += 1;
    request.phase = Phase::Waiting { again: now + pause.min(LONGEST_PAUSE) };
}

fn take(request: &mut Request, from: &NodeRef, event: TokenEvent, cx: &mut Context<'_>) -> Flow {
    let id = event.id;
    if event.prefill.is_some() {
        cx.placer.prefilled(&from.node, id);
    }
    let tokens = match request.take(from, event, cx.now) {
        Ok(tokens) => tokens,
        Err(Broken(reason)) => return again(request, Some(from), reason.to_owned(), true, cx),
    };
    let finish = tokens.last().and_then(|token| token.finish);
    if !tokens.is_empty() {
        let update = Update::Tokens(tokens);
        cx.out.push(Action::Update { request: id.request, update });
    }
    match finish {
        Some(finish) => finished(request, finish, cx),
        None => Flow::Go,
    }
}

fn prompt_logprobs(
    request: &mut Request,
    from: &NodeRef,
    tokens: Vec<(u32, Logprobs)>,
    cx: &mut Context<'_>,
) -> Flow {
    if !request.wants_prompt_logprobs() {
        return Flow::Go;
    }
    if tokens.len() + 1 != request.prompt_tokens {
        let reason = "a node sent another number of prompt log-probabilities".to_owned();
        return again(request, Some(from), reason, true, cx);
    }
    request.prompt_logprobs_sent = true;
    let update = Update::PromptLogprobs(tokens);
    cx.out.push(Action::Update { request: request.new.id, update });
    Flow::Go
}

/// All tokens are emitted.
fn finished(request: &mut Request, finish: NodeFinish, cx: &mut Context<'_>) -> Flow {
    let now = cx.now;
    let id = request.transfer();
    let phase = std::mem::replace(&mut request.phase, Phase::Waiting { again: now });
    let Phase::Running(mut attempt) = phase else {
        return Flow::Go;
    };
    // A first token that is the last one comes from the prefill node: then the decode node still
    // waits for KV, and everything is cancelled.
    let by_decode = attempt.handed_over;
    if by_decode {
        close(&mut attempt.decode, id, false, cx);
    }
    let awaited = by_decode && attempt.prefill.as_ref().is_some_and(|leg| leg.open);
    let until = now + TRANSFER_REPORT_WAIT;
    request.phase = Phase::Finishing { attempt, finish, until };
    if awaited { Flow::Go } else { Flow::End(Update::Done(request.summary(now))) }
}

fn transferred(
    request: &mut Request,
    from: &NodeRef,
    (hidden, exposed, bytes): (Duration, Duration, u64),
    cx: &mut Context<'_>,
) -> Flow {
    let Some(attempt) = request.on_nodes().filter(|attempt| attempt.is_prefill(from)) else {
        return Flow::Go;
    };
    attempt.handed_over = true;
    close_leg(request, from, cx);
    let timings = &mut request.timings;
    if timings.transfer_bytes == 0 {
        timings.transfer_hidden = hidden;
        timings.transfer_exposed = exposed;
        timings.transfer_bytes = bytes;
    }
    done_if_finishing(request, cx)
}

fn done_if_finishing(request: &Request, cx: &Context<'_>) -> Flow {
    match request.phase {
        Phase::Finishing { .. } => Flow::End(Update::Done(request.summary(cx.now))),
        _ => Flow::Go,
    }
}

/// Whether the attempt can go on without this node.
fn spares(request: &mut Request, node: &NodeRef) -> bool {
    let running = matches!(request.phase, Phase::Running(_));
    let attempt = request.on_nodes();
    !running || attempt.is_some_and(|a| a.is_prefill(node) && !a.needs_prefill())
}

fn node_failed(
    request: &mut Request,
    from: &NodeRef,
    reason: String,
    retry: Retry,
    cx: &mut Context<'_>,
) -> Flow {
    close_leg(request, from, cx);
    if spares(request, from) {
        return done_if_finishing(request, cx);
    }
    let reason = format!("{from_node}: {reason}", from_node = from.node);
    match retry {
        // A node's clock may see the deadline pass a little before ours does.
        Retry::Never if request.is_late(cx.now + FIRST_PAUSE) => {
            Flow::End(Update::Failed(RequestError::DeadlineExceeded))
        }
        Retry::Never => Flow::End(Update::Failed(RequestError::Rejected(reason))),
        // A node that is full for now has not failed: only time limits how often it says so.
        Retry::SameNode => again(request, Some(from), reason, false, cx),
        Retry::OtherNode => again(request, Some(from), reason, true, cx),
    }
}

fn node_gone(request: &mut Request, node: &NodeRef, cx: &mut Context<'_>) -> Flow {
    close_leg(request, node, cx);
    if spares(request, node) {
        return done_if_finishing(request, cx);
    }
    again(request, None, format!("{} was lost", node.node), true, cx)
}

/// The request's timer ran out.
fn due_now(request: &mut Request, cx: &mut Context<'_>) -> Flow {
    if matches!(request.phase, Phase::Finishing { .. }) {
        return done_if_finishing(request, cx);
    }
    if request.is_late(cx.now) {
        return Flow::End(Update::Failed(RequestError::DeadlineExceeded));
    }
    let Phase::Waiting { again } = request.phase else {
        return Flow::Go;
    };
    if again > cx.now || start_anywhere(request, cx) {
        return Flow::Go;
    }
    let since = request.stalled.unwrap_or(cx.now);
    let waited = cx.now.saturating_duration_since(since);
    if waited >= NODE_WAIT {
        return Flow::End(Update::Failed(RequestError::NoNodes { waited }));
    }
    pause(request, cx.now);
    Flow::Go
}
