//! What happens to one request: its attempts start, give tokens, fail and are repeated.

use std::time::{Duration, Instant};

use baton_proto::ids::TransferId;
use baton_proto::message::{Command, Logprobs, NodeFinish, Retry, TokenEvent};

use crate::cluster::NodeRef;
use crate::core::{RequestError, Update};
use crate::events::Happening;
use crate::request::{Broken, Leg, Phase, Request};
use crate::requests::{Action, Context, MAX_FRUITLESS_ATTEMPTS, NODE_WAIT};

mod start;

use start::start;
pub(crate) use start::{Start, arrive, go, start_anywhere};

/// First pause before nodes that failed are used again; doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a request with all its tokens waits for the report of its transfer.
const TRANSFER_REPORT_WAIT: Duration = Duration::from_millis(100);

/// Whether the request goes on.
#[expect(clippy::large_enum_variant, reason = "moved once, from function to caller")]
pub(crate) enum Flow {
    /// It does.
    Go,
    /// It ends with this.
    End(Update),
}

/// Ends what a node does for an attempt; `cancel`: it has to be told.
fn close(leg: &mut Leg, id: TransferId, cancel: bool, cx: &mut Context<'_>) {
    if !std::mem::take(&mut leg.open) {
        return;
    }
    cx.placer.ended(&leg.node.node, id, cx.now);
    if cancel {
        cx.out.push(Action::Send { to: leg.node.clone(), command: Command::Cancel(id) });
    }
}

/// Ends the attempt on all nodes that still have a part in it.
pub(crate) fn release(request: &mut Request, cx: &mut Context<'_>) {
    if matches!(request.phase, Phase::Held) {
        cx.placer.withdraw(request.new.id);
    }
    let id = request.transfer();
    if let Some(attempt) = request.on_nodes() {
        if let Some(to) = attempt.pull.take() {
            cx.out.push(Action::Send { to, command: Command::Cancel(id.pull()) });
        }
        attempt.legs().for_each(|leg| close(leg, id, true, cx));
    }
}

/// The attempt's pull brings nothing any more: who waits for it need not.
pub(crate) fn pull_failed(request: &mut Request, cx: &mut Context<'_>) {
    let id = request.transfer().pull();
    let Some(attempt) = request.on_nodes() else { return };
    if attempt.pull.take().is_some() && attempt.computing().open {
        let to = attempt.computing().node.clone();
        cx.out.push(Action::Send { to, command: Command::Cancel(id) });
    }
}

pub(crate) fn close_leg(request: &mut Request, node: &NodeRef, cx: &mut Context<'_>) {
    let id = request.transfer();
    if let Some(leg) = request.on_nodes().and_then(|attempt| attempt.leg(node)) {
        close(leg, id, false, cx);
    }
}

/// The attempt is lost: try again, elsewhere if possible.
pub(crate) fn again(
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
    if request.waited >= NODE_WAIT || request.fruitless >= MAX_FRUITLESS_ATTEMPTS {
        let attempts = request.attempt;
        return Flow::End(Update::Failed(RequestError::Exhausted { attempts, reason }));
    }
    if let Some(failed) = failed.filter(|&failed| !request.avoid.contains(failed)) {
        request.avoid.push(failed.clone());
    }
    request.failed_by(&reason);
    let (id, attempt) = (request.new.id, request.attempt);
    cx.events.push(Happening::Retried { request: id, attempt, reason }, cx.now);
    pause(request, cx.now);
    let avoid = std::mem::take(&mut request.avoid);
    start(request, &avoid, cx);
    request.avoid = avoid;
    Flow::Go
}

/// The request has no nodes for now.
pub(crate) fn pause(request: &mut Request, now: Instant) {
    let pause = FIRST_PAUSE * 2_u32.saturating_pow(request.pauses.min(16));
    request.pauses += 1;
    request.idle_since.get_or_insert(now);
    request.phase = Phase::Waiting { again: now + pause.min(LONGEST_PAUSE) };
}

/// How long it was on no node since it last got on.
fn waited(request: &Request, now: Instant) -> Duration {
    let idle = request.idle_since.map(|since| now.saturating_duration_since(since));
    request.waited + idle.unwrap_or_default()
}

pub(crate) fn take(
    request: &mut Request,
    from: &NodeRef,
    event: TokenEvent,
    cx: &mut Context<'_>,
) -> Flow {
    let id = event.id;
    if let Some(took) = event.prefill {
        cx.placer.prefilled(&from.node, id, took, cx.now);
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

/// A node begins with the prompt, of which it found so many tokens cached.
pub(crate) fn started(
    request: &mut Request,
    from: &NodeRef,
    cached_tokens: u32,
    queued: Duration,
    cx: &mut Context<'_>,
) -> Flow {
    let id = request.transfer();
    if request.on_nodes().is_some_and(|attempt| attempt.computes(from)) {
        cx.placer.started(&from.node, id, cached_tokens as usize);
        request.started(cached_tokens, queued);
    }
    Flow::Go
}

pub(crate) fn prompt_logprobs(
    request: &mut Request,
    from: &NodeRef,
    tokens: Vec<(u32, Logprobs)>,
    cx: &mut Context<'_>,
) -> Flow {
    let computes = request.on_nodes().is_some_and(|attempt| attempt.computes(from));
    let running = matches!(request.phase, Phase::Running(_));
    if !(running && computes && request.wants_prompt_logprobs()) {
        return Flow::Go;
    }
    if tokens.len() + 1 != request.prompt_tokens() {
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
    answered(request, cx);
    if awaited { Flow::Go } else { Flow::End(Update::Done(request.summary(now))) }
}

/// The client has all that it wanted of the attempt on nodes now, if there is one.
pub(crate) fn answered(request: &mut Request, cx: &mut Context<'_>) {
    let (root, tokens) = (request.model.root, request.emitted());
    if let Some(attempt) = request.on_nodes().filter(|_| tokens > 0) {
        let by = if attempt.handed_over { Some(&attempt.decode) } else { attempt.prefill.as_ref() };
        if let Some(leg) = by {
            cx.placer.answered(&leg.node.node, root, tokens, cx.now);
        }
    }
}

pub(crate) fn transferred(
    request: &mut Request,
    from: &NodeRef,
    (hidden, exposed, bytes): (Duration, Duration, u64),
    cx: &mut Context<'_>,
) -> Flow {
    let Some(attempt) = request.on_nodes().filter(|attempt| attempt.is_prefill(from)) else {
        return Flow::Go;
    };
    attempt.handed_over = true;
    cx.placer.handed_over(request.transfer(), exposed, bytes, cx.now);
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

pub(crate) fn node_failed(
    request: &mut Request,
    from: &NodeRef,
    reason: String,
    retry: Retry,
    may_repeat: bool,
    cx: &mut Context<'_>,
) -> Flow {
    if retry == Retry::OtherNode {
        cx.placer.failed(&from.node, cx.now);
    }
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
        Retry::OtherNode => {
            if !may_repeat {
                // The retries that all requests share are used up: this failure is its last one.
                request.fruitless = MAX_FRUITLESS_ATTEMPTS;
            }
            again(request, Some(from), reason, true, cx)
        }
    }
}

pub(crate) fn node_gone(request: &mut Request, node: &NodeRef, cx: &mut Context<'_>) -> Flow {
    if request.pulls_from(node) {
        pull_failed(request, cx);
    }
    if request.on_nodes().is_none_or(|attempt| attempt.leg(node).is_none()) {
        return Flow::Go;
    }
    close_leg(request, node, cx);
    if spares(request, node) {
        return done_if_finishing(request, cx);
    }
    again(request, None, format!("{} was lost", node.node), true, cx)
}

/// The request's timer ran out.
pub(crate) fn due_now(request: &mut Request, cx: &mut Context<'_>) -> Flow {
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
    let waited = waited(request, cx.now);
    if waited >= NODE_WAIT {
        return Flow::End(Update::Failed(RequestError::NoNodes { waited }));
    }
    pause(request, cx.now);
    Flow::Go
}
