//! Requests, and why they went where they went, in the words of the API.

use std::time::{Duration, Instant};

use baton_proto::ids::NodeId;
use baton_proto::wire::v1;

use crate::alerts::Alert;
use crate::core::{Explained, Timings};
use crate::decision::{Considered, Decision, Outcome, Why};
use crate::history::{self, Recent, Record, RequestView};
use crate::placement::WaitsFor;
use crate::placement::cost::Cost;
use crate::requests::Totals;

pub(super) fn response(explained: Explained, now: Instant) -> v1::ExplainResponse {
    let Explained { record: Record { view, decision: how, failures }, waits } = explained;
    let run = how.as_ref().filter(|_| view.attempts > 0);
    let outcomes = run.map(|how| how.outcomes(&view.timings, view.held)).unwrap_or_default();
    v1::ExplainResponse {
        request: Some(request(&view, now)),
        decision: how.map(|how| decision(&how, view.arrived)),
        failures,
        turn: waits.as_ref().map(turn),
        outcomes: outcomes.into_iter().map(outcome).collect(),
    }
}

pub(super) fn request(view: &RequestView, now: Instant) -> v1::RequestInfo {
    v1::RequestInfo {
        id: view.id.to_string(),
        model: view.model.clone(),
        tenant: view.tenant.to_string(),
        priority: view.class.as_str().to_owned(),
        phase: view.stage.as_str().to_owned(),
        prefill_node: name(view.prefill.as_ref()),
        decode_node: name(view.decode.as_ref()),
        attempts: view.attempts,
        usage: Some(v1::Usage {
            prompt_tokens: view.usage.prompt_tokens,
            cached_tokens: view.usage.cached_tokens,
            completion_tokens: view.usage.completion_tokens,
        }),
        timings: Some(timings(&view.timings)),
        held_ms: ms(view.held),
        ended_ms: view.ended.map(|at| now.saturating_duration_since(at).as_millis() as u64),
        error: view.error.clone().unwrap_or_default(),
    }
}

pub(super) fn timings(times: &Timings) -> v1::Timings {
    v1::Timings {
        queue_ms: ms(times.queue),
        place_ms: ms(times.place),
        prefill_ms: ms(times.prefill),
        transfer_hidden_ms: ms(times.transfer_hidden),
        transfer_exposed_ms: ms(times.transfer_exposed),
        ttft_ms: ms(times.first_token),
        total_ms: ms(times.total),
        transfer_bytes: times.transfer_bytes,
    }
}

fn decision(how: &Decision, arrived: Instant) -> v1::Decision {
    v1::Decision {
        tokens: how.tokens as u32,
        prefill_nodes_compared: how.prefill_nodes as u32,
        decode_nodes_compared: how.decode_nodes as u32,
        reason: how.reason(),
        at_ms: ms(how.at.saturating_duration_since(arrived)),
        candidates: how.considered.iter().map(candidate).collect(),
        left_out: how.left_out.iter().map(left_out).collect(),
        more_left_out: how.more_left_out as u32,
        of_other_models: how.of_other_models as u32,
    }
}

fn left_out((node, why): &(NodeId, Why)) -> v1::LeftOut {
    v1::LeftOut { node: node.to_string(), why: why.as_str().to_owned() }
}

fn outcome(outcome: Outcome) -> v1::Outcome {
    v1::Outcome {
        term: outcome.term.as_str().to_owned(),
        predicted_ms: ms(outcome.predicted),
        took_ms: outcome.took.map(ms),
    }
}

fn candidate(considered: &Considered) -> v1::Candidate {
    let (pull_node, pull_tokens) = match &considered.pull {
        Some((node, tokens)) => (node.to_string(), *tokens as u32),
        None => (String::new(), 0),
    };
    v1::Candidate {
        prefill_node: name(considered.prefill.as_ref()),
        decode_node: considered.decode.to_string(),
        pull_node,
        pull_tokens,
        cached_tokens: considered.cached as u32,
        cost: Some(cost(&considered.cost)),
    }
}

fn cost(cost: &Cost) -> v1::Cost {
    v1::Cost {
        queue_ms: cost.queue,
        pull_ms: cost.pull,
        prefill_ms: cost.prefill,
        transfer_ms: cost.transfer,
        decode_ms: cost.decode,
        harm_ms: cost.harm,
        total_ms: cost.total(),
    }
}

fn turn(waits: &WaitsFor) -> v1::Turn {
    v1::Turn {
        node: waits.node.to_string(),
        ahead: waits.ahead as u32,
        ahead_ms: waits.ahead_ms,
        behind: waits.behind as u32,
    }
}

pub(super) fn alert(alert: &Alert) -> v1::Alert {
    v1::Alert {
        severity: alert.severity.as_str().to_owned(),
        code: alert.code.to_owned(),
        message: alert.message.clone(),
    }
}

pub(super) fn totals(totals: &Totals) -> v1::TokenTotals {
    v1::TokenTotals {
        prompt: totals.prompt_tokens,
        cached: totals.cached_tokens,
        generated: totals.generated_tokens,
        transfer_bytes: totals.transfer_bytes,
    }
}

pub(super) fn recent(recent: &Recent) -> v1::RecentRequests {
    let percentiles = |of: &history::Percentiles| v1::Percentiles {
        p50: ms(of.p50),
        p95: ms(of.p95),
        p99: ms(of.p99),
    };
    v1::RecentRequests {
        requests: recent.requests as u32,
        ttft: Some(percentiles(&recent.first_token)),
        tpot: Some(percentiles(&recent.per_token)),
    }
}

fn name(node: Option<&NodeId>) -> String {
    node.map(ToString::to_string).unwrap_or_default()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
