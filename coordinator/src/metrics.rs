//! What the coordinator counts. Names are `baton_*`; durations are seconds.

use metrics::{counter, gauge, histogram};

use crate::core::{RequestError, StatusView, SubmitError, Update};

/// News of a request.
pub(crate) fn update(update: &Update) {
    match update {
        Update::Tokens(tokens) => {
            counter!("baton_output_tokens_total").increment(tokens.len() as u64);
        }
        Update::PromptLogprobs(_) => {}
        Update::Done(summary) => {
            counter!("baton_requests_total", "outcome" => "done").increment(1);
            let retries = summary.placement.attempts.saturating_sub(1);
            counter!("baton_retries_total").increment(retries.into());
            let usage = summary.usage;
            counter!("baton_prompt_tokens_total").increment(usage.prompt_tokens.into());
            counter!("baton_cached_tokens_total").increment(usage.cached_tokens.into());
            let way = if summary.placement.prefill.is_some() { "remote" } else { "local" };
            counter!("baton_placements_total", "prefill" => way).increment(1);
            let times = &summary.timings;
            histogram!("baton_time_to_first_token_seconds").record(times.first_token);
            histogram!("baton_request_seconds").record(times.total);
            histogram!("baton_place_seconds").record(times.place);
            histogram!("baton_transfer_exposed_seconds").record(times.transfer_exposed);
        }
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

/// A request was not taken in.
pub(crate) fn refused(error: &SubmitError) {
    let outcome = match error {
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
    counter!("baton_requests_total", "outcome" => outcome).increment(1);
}

/// What is there now.
pub(crate) fn gauges(status: &StatusView, index_blocks: u64) {
    gauge!("baton_requests_active").set(status.requests_active as f64);
    gauge!("baton_requests_waiting").set(status.requests_waiting as f64);
    gauge!("baton_nodes", "role" => "prefill").set(status.prefill_nodes as f64);
    gauge!("baton_nodes", "role" => "decode").set(status.decode_nodes as f64);
    gauge!("baton_peers").set(status.peers.len() as f64);
    gauge!("baton_index_blocks").set(index_blocks as f64);
    gauge!("baton_ready").set(f64::from(u8::from(status.ready)));
}
