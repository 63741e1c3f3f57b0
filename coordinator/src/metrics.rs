//! What the coordinator counts. Names are `baton_*`, and those of vLLM that `vllm` has; durations are
//! seconds.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_proto::ids::Role;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_util::MetricKindMask;

use crate::alerts::SILENT;
use crate::core::{NodeView, RequestError, StatusView, SubmitError, Summary, Timings, Update};
use crate::decision::Outcome;
use crate::vllm;

/// A gauge that is not set for so long is about something that is gone, and is shown no more.
const STALE: Duration = Duration::from_secs(10);

/// Upper bounds of buckets. Per output token: a GPU's decode step takes 2 to 8 ms.
pub(crate) const PER_TOKEN: [f64; 26] = [
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025,
    0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];
/// To the first token, and phases of a request.
pub(crate) const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
];
/// Whole requests.
pub(crate) const REQUEST: [f64; 22] = [
    0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0,
];
/// Decisions and transfers.
const SHORT: [f64; 18] = [
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0, 60.0,
];
/// What something took, relative to what was predicted.
const RATIOS: [f64; 15] =
    [0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0];
/// Times below this count as this in such a ratio: how far off a microsecond was is nobody's concern.
const LEAST_IN_RATIO: Duration = Duration::from_millis(1);
const TOKENS: [f64; 21] = [
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
    32768.0,
    65536.0,
    131_072.0,
    262_144.0,
    524_288.0,
    1_048_576.0,
];

/// Histograms whose buckets do not follow from their unit.
const BUCKETS: [(&str, &[f64]); 6] = [
    ("baton_time_per_output_token_seconds", &PER_TOKEN),
    ("baton_inter_token_latency_seconds", &PER_TOKEN),
    ("baton_time_to_first_token_seconds", &FIRST_TOKEN),
    ("baton_request_phase_seconds", &FIRST_TOKEN),
    ("baton_embedding_seconds", &FIRST_TOKEN),
    ("baton_request_seconds", &REQUEST),
];

const COUNTERS: [(&str, &str); 11] = [
    ("baton_client_disconnects_total", "Requests whose client left before their end"),
    ("baton_requests_total", "Requests that ended, by outcome"),
    ("baton_requests_rejected_total", "Requests that the core did not take, by reason"),
    ("baton_retries_total", "Attempts after a request's first"),
    ("baton_placements_total", "Answered requests, by who computed the prompt"),
    ("baton_prompt_tokens_total", "Tokens of prompts, by where their KV came from"),
    ("baton_output_tokens_total", "Tokens generated"),
    ("baton_embeddings_total", "Prompts that were embedded"),
    ("baton_transfer_bytes_total", "KV that prefill nodes sent"),
    ("baton_refused_connections_total", "Clients' connections not taken"),
    (
        "baton_refused_requests_total",
        "Requests for text or embeddings that were refused before any of it was made, whether for their \
         parameters, their prompt, a quota or by the core, and those of any kind whose key, idempotency-key \
         or body was not taken; by gRPC's code",
    ),
];

const HISTOGRAMS: [(&str, &str); 13] = [
    ("baton_prompt_tokens", "Tokens of a prompt"),
    ("baton_output_tokens", "Tokens of an answer"),
    ("baton_time_to_first_token_seconds", "Arrival to first token"),
    ("baton_time_per_output_token_seconds", "Mean gap between a request's tokens"),
    ("baton_inter_token_latency_seconds", "From one token of a request to its next"),
    ("baton_request_seconds", "Arrival to last token"),
    ("baton_embedding_seconds", "Arrival to embedding"),
    ("baton_request_phase_seconds", "Phases of a request; they add up to it"),
    ("baton_place_seconds", "Choosing the nodes"),
    ("baton_transfer_hidden_seconds", "KV transfer while the prompt was computed"),
    ("baton_transfer_exposed_seconds", "KV transfer after the first token"),
    (
        "baton_prediction_error_seconds",
        "How far off a term of the chosen placement's predicted cost was, either way",
    ),
    (
        "baton_prediction_ratio",
        "What a term took, relative to its prediction; less than a millisecond counts as one",
    ),
];

const GAUGES: [(&str, &str); 8] = [
    ("baton_requests_active", "Requests that are not over"),
    ("baton_requests_waiting", "Of these, those that wait for their turn on a node"),
    ("baton_nodes", "Joined nodes by role and state"),
    ("baton_peers", "Other coordinators that are heard"),
    ("baton_index_blocks", "KV blocks in the index of the nodes' caches"),
    ("baton_ready", "1 if a request would be served now"),
    (
        "baton_tls_certificate_expiry_timestamp_seconds",
        "When a certificate expires, as seconds since 1970",
    ),
    ("baton_build_info", "1; the version is a label"),
];

/// Lets the process count, and gives what shows the counts.
pub(crate) fn install() -> Result<PrometheusHandle, BuildError> {
    let named = BUCKETS.into_iter().chain(vllm::HISTOGRAMS);
    let named = named.map(|(name, buckets)| (Matcher::Full(name.to_owned()), buckets));
    let others: [(&str, &[f64]); 3] =
        [("_seconds", &SHORT), ("_tokens", &TOKENS), ("_ratio", &RATIOS)];
    let others = others.map(|(unit, buckets)| (Matcher::Suffix(unit.to_owned()), buckets));
    let builder = PrometheusBuilder::new().idle_timeout(MetricKindMask::GAUGE, Some(STALE));
    let builder = named.chain(others).try_fold(builder, |builder, (matcher, buckets)| {
        builder.set_buckets_for_metric(matcher, buckets)
    });
    let handle = builder?.install_recorder()?;
    COUNTERS.into_iter().for_each(|(name, what)| describe_counter!(name, what));
    HISTOGRAMS.into_iter().for_each(|(name, what)| describe_histogram!(name, what));
    GAUGES.into_iter().for_each(|(name, what)| describe_gauge!(name, what));
    Ok(handle)
}

/// News of a request. `gap`: since each of its tokens' previous one, unless these are its first.
pub(crate) fn update(update: &Update, gap: Option<Duration>) {
    match update {
        Update::Tokens(tokens) => {
            if let Some(gap) = gap {
                histogram!("baton_inter_token_latency_seconds").record_many(gap, tokens.len());
            }
            counter!("baton_output_tokens_total").increment(tokens.len() as u64);
        }
        Update::PromptLogprobs(_) => {}
        Update::Embedding(_) => counter!("baton_embeddings_total").increment(1),
        Update::Done(summary) => done(summary),
        Update::Failed(error) => {
            let outcome = match error {
                RequestError::DeadlineExceeded => "deadline_exceeded",
                RequestError::Cancelled => "cancelled",
                RequestError::NoNodes { .. } => "no_nodes",
                RequestError::Exhausted { .. } => "exhausted",
                RequestError::Rejected(_) => "rejected",
                RequestError::ShuttingDown => "shutting_down",
            };
            counter!("baton_requests_total", "outcome" => outcome).increment(1);
        }
    }
}

fn done(summary: &Summary) {
    counter!("baton_requests_total", "outcome" => "done").increment(1);
    let usage = summary.usage;
    let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
    counter!("baton_prompt_tokens_total", "source" => "computed").increment(computed.into());
    let cached = u64::from(usage.cached_tokens);
    counter!("baton_prompt_tokens_total", "source" => "cached").increment(cached);
    histogram!("baton_prompt_tokens").record(usage.prompt_tokens);
    histogram!("baton_place_seconds").record(summary.timings.place);
    if usage.completion_tokens == 0 {
        // The other figures are of tokens, which an embedding has none of.
        return histogram!("baton_embedding_seconds").record(summary.timings.total);
    }
    let remote = summary.placement.prefill.is_some();
    let way = if remote { "remote" } else { "local" };
    counter!("baton_placements_total", "prefill" => way).increment(1);
    if remote {
        transfer(&summary.timings);
    }
    histogram!("baton_output_tokens").record(usage.completion_tokens);
    times(&summary.timings, usage.completion_tokens);
    summary.outcomes.iter().for_each(outcome);
}

/// How good a prediction was, if that is known.
fn outcome(outcome: &Outcome) {
    let Outcome { term, predicted, took } = *outcome;
    let Some(took) = took else { return };
    histogram!("baton_prediction_error_seconds", "term" => term.as_str())
        .record(took.abs_diff(predicted));
    histogram!("baton_prediction_ratio", "term" => term.as_str()).record(ratio(took, predicted));
}

fn ratio(took: Duration, predicted: Duration) -> f64 {
    took.max(LEAST_IN_RATIO).as_secs_f64() / predicted.max(LEAST_IN_RATIO).as_secs_f64()
}

/// Of a request without one, zeros would hide how long those take that there are.
fn transfer(times: &Timings) {
    histogram!("baton_transfer_hidden_seconds").record(times.transfer_hidden);
    histogram!("baton_transfer_exposed_seconds").record(times.transfer_exposed);
    counter!("baton_transfer_bytes_total").increment(times.transfer_bytes);
}

fn times(times: &Timings, output_tokens: u32) {
    histogram!("baton_time_to_first_token_seconds").record(times.first_token);
    histogram!("baton_request_seconds").record(times.total);
    let after_first = times.total.saturating_sub(times.first_token);
    if output_tokens > 1 {
        let each = after_first / (output_tokens - 1);
        histogram!("baton_time_per_output_token_seconds").record(each);
    }
    for (phase, took) in phases(times) {
        histogram!("baton_request_phase_seconds", "phase" => phase).record(took);
    }
}

/// The phases of a request, which add up to its duration. `other`: on the way between coordinator
/// and nodes, and the nodes of attempts that failed.
fn phases(times: &Timings) -> [(&'static str, Duration); 5] {
    let mut left = times.first_token;
    // Clocks of several machines, and waiting for the driver, which is a part of both `place` and
    // `queue`, may make them longer than the whole.
    let mut part = |time: Duration| {
        let part = time.min(left);
        left -= part;
        part
    };
    let (place, prefill) = (part(times.place), part(times.prefill));
    let queue = part(times.queue);
    [
        ("queue", queue),
        ("place", place),
        ("prefill", prefill),
        ("other", left),
        ("decode", times.total.saturating_sub(times.first_token)),
    ]
}

/// A request was not taken in.
pub(crate) fn refused(error: &SubmitError) {
    let reason = match error {
        SubmitError::UnknownModel(_)
        | SubmitError::PromptTooLong { .. }
        | SubmitError::EmptyPrompt
        | SubmitError::UnknownToken { .. }
        | SubmitError::DuplicateId(_) => "invalid",
        SubmitError::NoNodes(_) => "no_nodes",
        SubmitError::Overloaded { .. } => "overloaded",
        SubmitError::TooLate { .. } => "too_late",
        SubmitError::ShuttingDown => "shutting_down",
    };
    counter!("baton_requests_rejected_total", "reason" => reason).increment(1);
}

/// What is there now.
pub(crate) fn gauges(status: &StatusView, nodes: &[NodeView], index_blocks: u64) {
    counter!("baton_retries_total").absolute(status.requests_retried);
    gauge!("baton_requests_active").set(status.requests_active as f64);
    gauge!("baton_requests_waiting").set(status.requests_waiting as f64);
    for role in [Role::Prefill, Role::Decode] {
        for state in ["up", "draining", "silent"] {
            let count = nodes.iter().filter(|n| n.hello.role == role && node_state(n) == state);
            gauge!("baton_nodes", "role" => role.as_str(), "state" => state)
                .set(count.count() as f64);
        }
    }
    gauge!("baton_peers").set(status.peers.len() as f64);
    gauge!("baton_index_blocks").set(index_blocks as f64);
    gauge!("baton_ready").set(f64::from(u8::from(status.ready)));
    gauge!("baton_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

fn node_state(node: &NodeView) -> &'static str {
    match node {
        node if node.report_age > SILENT => "silent",
        node if node.report.draining => "draining",
        _ => "up",
    }
}

/// When a certificate expires: the cluster's `member`'s, or that of the `client_port`s.
pub(crate) fn certificate(whose: &'static str, expires: SystemTime) {
    let expires = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!("baton_tls_certificate_expiry_timestamp_seconds", "certificate" => whose)
        .set(expires.as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phases_add_up_to_the_whole() {
        let ms = Duration::from_millis;
        let times = Timings {
            queue: ms(5),
            place: ms(1),
            prefill: ms(30),
            first_token: ms(40),
            total: ms(100),
            ..Timings::default()
        };
        let slow_clock = Timings { prefill: ms(38), ..times };
        for times in [times, slow_clock] {
            let sum: Duration = phases(&times).iter().map(|(_, took)| *took).sum();
            assert_eq!(sum, times.total, "{times:?}");
        }
        assert_eq!(phases(&times).map(|(_, took)| took), [5, 1, 30, 4, 60].map(ms));
    }

    #[test]
    fn small_times_are_no_large_ratios() {
        let us = Duration::from_micros;
        assert_eq!(ratio(us(3), us(900)), 1.0);
        assert_eq!(ratio(us(2000), us(0)), 2.0);
        assert_eq!(ratio(us(10_000), us(40_000)), 0.25);
    }
}
