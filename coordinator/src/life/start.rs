//! An attempt starts: nodes are chosen for it, and told.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::embedding::Pooling;
use baton_proto::ids::TransferId;
use baton_proto::message::{Command, Job, Peer, Pull};

use super::waited;
use crate::cluster::NodeRef;
use crate::request::{Attempt, Phase, Request};
use crate::requests::{Action, Answer, Context, Placed, Wanted};

/// What came of the wish for nodes.
pub(crate) enum Start {
    /// It was sent to nodes, or its turn will come.
    Begun,
    /// The coordinator holds all that it may.
    Full,
    /// No node can take it.
    NoNodes,
    /// It would not be answered in time.
    TooLate {
        /// When it might.
        retry_after: Duration,
    },
}

/// A request arrives, and may be refused.
pub(crate) fn arrive(request: &mut Request, cx: &mut Context<'_>) -> Start {
    place(request, &[], true, cx)
}

/// Has the request's next attempt placed, if there are nodes for it.
pub(super) fn start(request: &mut Request, avoid: &[NodeRef], cx: &mut Context<'_>) -> bool {
    matches!(place(request, avoid, false, cx), Start::Begun)
}

fn place(request: &mut Request, avoid: &[NodeRef], arrives: bool, cx: &mut Context<'_>) -> Start {
    request.extend_chain();
    // What is wanted of every token of the prompt has to be computed: the prefix cache is not read.
    let nothing = Arc::default();
    let whole = request.wants_prompt_logprobs() || request.new.embed == Some(Pooling::Mean);
    let chain = if whole { &nothing } else { &request.chain };
    let most = request.prompt_tokens().saturating_add(request.new.sampling.max_tokens as usize);
    let wanted = Wanted {
        id: TransferId { request: request.new.id, attempt: request.attempt + 1 },
        model: &request.model,
        tokens: request.len(),
        longest: most.min(request.model.max_model_len as usize),
        embeds: request.new.embed.is_some(),
        chain,
        avoid,
        standing: request.new.standing,
        arrived: request.arrived,
        deadline: request.deadline,
        arrives,
    };
    match cx.placer.place(&wanted, cx.now) {
        Answer::Go(placed) => go(request, placed, cx),
        Answer::Held(decision) => {
            request.decision = Some(decision);
            request.waited = waited(request, cx.now);
            request.idle_since = None;
            request.phase = Phase::Held;
        }
        Answer::NoNodes(decision) => {
            request.decision = Some(decision);
            return Start::NoNodes;
        }
        Answer::TooLate { retry_after, decision } => {
            request.decision = Some(decision);
            return Start::TooLate { retry_after };
        }
    }
    Start::Begun
}

/// Sends the request's next attempt to nodes.
pub(crate) fn go(request: &mut Request, placed: Placed, cx: &mut Context<'_>) {
    let Placed { prefill, decode, pull, decision } = placed;
    request.attempt += 1;
    request.waited = waited(request, cx.now);
    request.idle_since = None;
    request.held = cx.now.saturating_duration_since(request.arrived);
    request.decision = Some(decision);
    let on = prefill.as_ref().map(|peer| peer.node.clone());
    request.placement = Some((on, decode.node.clone()));
    let life = |peer: &Peer| NodeRef { node: peer.node.clone(), epoch: peer.epoch };
    let (source, target) = (prefill.as_ref().map(life), life(&decode));
    let server = pull.as_ref().map(|(peer, _)| life(peer));
    let attempt = Attempt::new(source.clone(), target.clone(), server, request.emitted());
    request.phase = Phase::Running(attempt);
    let job = request.job(cx.now);
    if let Some(pooling) = request.new.embed {
        let command = Command::Embed { job, pooling };
        return cx.out.push(Action::Send { to: target, command });
    }
    let pull = pull.map(|(from, tokens)| {
        let to = prefill.as_ref().unwrap_or(&decode).clone();
        serve(&job, &from, tokens, to, cx);
        Pull { from, tokens }
    });
    // The reservation and the prefill start together: neither waits for the other.
    let Some(to) = source else {
        let command = Command::Decode { job, prefill, pull };
        return cx.out.push(Action::Send { to: target, command });
    };
    let command = Command::Prefill { job: job.clone(), decode, pull };
    cx.out.push(Action::Send { to, command });
    let command = Command::Decode { job, prefill, pull: None };
    cx.out.push(Action::Send { to: target, command });
}

/// Asks a node for the cached prefix that an attempt is to fetch.
fn serve(job: &Job, from: &Peer, tokens: usize, to: Peer, cx: &mut Context<'_>) {
    let tokens = job.tokens[..tokens.min(job.tokens.len())].to_vec();
    let command = Command::Serve { id: job.id.pull(), tokens, salt: job.salt, to };
    let to = NodeRef { node: from.node.clone(), epoch: from.epoch };
    cx.out.push(Action::Send { to, command });
}

/// The same, with nodes where it failed before if there are no others.
pub(crate) fn start_anywhere(request: &mut Request, cx: &mut Context<'_>) -> bool {
    let avoid = std::mem::take(&mut request.avoid);
    let started = start(request, &avoid, cx) || (!avoid.is_empty() && start(request, &[], cx));
    request.avoid = avoid;
    started
}
