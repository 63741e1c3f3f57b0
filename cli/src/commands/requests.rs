//! `baton requests`: what runs, and what ended or was refused lately.

use baton_proto::wire::v1::{
    ListRequestsRequest, ListRequestsResponse, RequestInfo, Timings, Usage,
};
use serde_json::{Value, json};

use super::CommandError;
use crate::client::{Target, explain};
use crate::output::{OutputArgs, table, time};

/// Digits of an id that are shown: enough to name the request.
const SHOWN_DIGITS: usize = 12;
/// Characters of a reason that fit into a line.
const SHOWN_REASON: usize = 48;

/// Command line of `baton requests`.
#[derive(clap::Args)]
pub(crate) struct RequestsArgs {
    /// Leave out those that ended or were refused
    #[arg(long)]
    active: bool,
    /// Most requests to show
    #[arg(long, value_name = "N", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    limit: u32,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `baton requests`.
pub(crate) async fn run(args: RequestsArgs) -> Result<(), CommandError> {
    args.output.print(|| show(&args)).await
}

async fn show(args: &RequestsArgs) -> Result<String, CommandError> {
    let request = ListRequestsRequest { active: args.active, limit: Some(args.limit) };
    let response = args.target.cluster().await?.list_requests(request).await;
    let list = response.map_err(|status| explain(&status))?.into_inner();
    if args.output.is_json() {
        let requests = list.requests.iter().map(as_json).collect::<Value>();
        return Ok(json!({"requests": requests, "active": list.active}).to_string());
    }
    Ok(as_text(&list))
}

/// One request as JSON.
pub(super) fn as_json(request: &RequestInfo) -> Value {
    let mut timings = timings_json(request.timings);
    timings["held_ms"] = request.held_ms.into();
    json!({
        "id": request.id,
        "model": request.model,
        "tenant": request.tenant,
        "priority": request.priority,
        "phase": request.phase,
        "prefill_node": request.prefill_node,
        "decode_node": request.decode_node,
        "attempts": request.attempts,
        "usage": usage_json(request.usage),
        "timings": timings,
        "ended_ms": request.ended_ms,
        "error": request.error,
    })
}

pub(super) fn usage_json(usage: Option<Usage>) -> Value {
    let usage = usage.unwrap_or_default();
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    })
}

pub(super) fn timings_json(timings: Option<Timings>) -> Value {
    let timings = timings.unwrap_or_default();
    json!({
        "queue_ms": timings.queue_ms,
        "place_ms": timings.place_ms,
        "prefill_ms": timings.prefill_ms,
        "transfer_hidden_ms": timings.transfer_hidden_ms,
        "transfer_exposed_ms": timings.transfer_exposed_ms,
        "ttft_ms": timings.ttft_ms,
        "total_ms": timings.total_ms,
        "transfer_bytes": timings.transfer_bytes,
    })
}

fn as_text(list: &ListRequestsResponse) -> String {
    let head = [
        "REQUEST", "PHASE", "TIME", "ENDED", "PROMPT", "CACHED", "OUT", "TTFT", "NODES", "CLASS",
        "TENANT", "MODEL", "",
    ];
    let rows: Vec<_> = list.requests.iter().map(row).collect();
    let shown = list.requests.iter().filter(|request| runs(request)).count();
    let hidden = (list.active as usize).saturating_sub(shown);
    let more = match hidden {
        0 => String::new(),
        hidden => format!("{hidden} more run; --limit shows them\n"),
    };
    table(&head, &rows) + &more
}

fn row(request: &RequestInfo) -> Vec<String> {
    let usage = request.usage.unwrap_or_default();
    let timings = request.timings.unwrap_or_default();
    let or_dash = |known: bool, text: String| if known { text } else { "-".to_owned() };
    let ended = request.ended_ms.map(|ms| format!("{} ago", time(ms as f64)));
    let reason: String = request.error.chars().take(SHOWN_REASON).collect();
    vec![
        request.id.chars().take(SHOWN_DIGITS).collect(),
        request.phase.clone(),
        time(timings.total_ms),
        ended.unwrap_or_else(|| "-".to_owned()),
        usage.prompt_tokens.to_string(),
        usage.cached_tokens.to_string(),
        usage.completion_tokens.to_string(),
        or_dash(timings.ttft_ms > 0.0, time(timings.ttft_ms)),
        nodes(request),
        request.priority.clone(),
        or_dash(!request.tenant.is_empty(), request.tenant.clone()),
        request.model.clone(),
        reason,
    ]
}

/// Whether it has not ended.
pub(super) fn runs(request: &RequestInfo) -> bool {
    request.ended_ms.is_none()
}

/// Who works or worked on it.
pub(super) fn nodes(request: &RequestInfo) -> String {
    match (&*request.prefill_node, &*request.decode_node) {
        (_, "") => "-".to_owned(),
        ("", decode) => decode.to_owned(),
        (prefill, decode) => format!("{prefill} > {decode}"),
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::v1::{Timings, Usage};

    use super::*;

    #[test]
    fn a_line_says_where_a_request_is() {
        let running = RequestInfo {
            id: "00112233445566778899aabbccddeeff".to_owned(),
            model: "demo".to_owned(),
            tenant: "acme".to_owned(),
            priority: "batch".to_owned(),
            phase: "decode".to_owned(),
            prefill_node: "p".to_owned(),
            decode_node: "d".to_owned(),
            usage: Some(Usage { prompt_tokens: 9, cached_tokens: 4, completion_tokens: 2 }),
            timings: Some(Timings { ttft_ms: 35.0, total_ms: 1500.0, ..Timings::default() }),
            ..RequestInfo::default()
        };
        let refused = RequestInfo {
            id: "f".repeat(32),
            phase: "refused".to_owned(),
            priority: "standard".to_owned(),
            model: "demo".to_owned(),
            ended_ms: Some(61_000),
            error: "too many requests".to_owned(),
            ..RequestInfo::default()
        };
        let text = as_text(&ListRequestsResponse { requests: vec![running, refused], active: 3 });
        let wanted = "\
REQUEST       PHASE    TIME   ENDED       PROMPT  CACHED  OUT  TTFT   NODES  CLASS     TENANT  MODEL
001122334455  decode   1.5 s  -           9       4       2    35 ms  p > d  batch     acme    demo
ffffffffffff  refused  0 ms   1m 01s ago  0       0       0    -      -      standard  -       demo   too many requests
2 more run; --limit shows them
";
        assert_eq!(text, wanted);
    }
}
