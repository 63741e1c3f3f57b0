//! `baton status`: whether the cluster serves, and how it does, on one screen.

use baton_proto::wire::v1::{Alert, GetStatusRequest, GetStatusResponse, Percentiles};
use serde_json::{Value, json};

use super::{CommandError, Failed};
use crate::client::{Target, explain};
use crate::output::{OutputArgs, bytes, time};

/// Command line of `baton status`.
#[derive(clap::Args)]
pub(crate) struct StatusArgs {
    /// End with status 5 if the cluster does not serve, or if an alert asks for somebody
    #[arg(long, conflicts_with = "watch")]
    exit_code: bool,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `baton status`.
pub(crate) async fn run(args: StatusArgs) -> Result<(), CommandError> {
    let mut problems = Vec::new();
    let show = || async {
        let response = args.target.cluster().await?.get_status(GetStatusRequest {}).await;
        response.map(tonic::Response::into_inner).map_err(|status| explain(&status))
    };
    let mut shown = |status: GetStatusResponse| {
        problems = status
            .alerts
            .iter()
            .filter(|alert| is_problem(alert))
            .map(|alert| alert.code.clone())
            .collect();
        if args.output.is_json() { as_json(&status) } else { as_text(&status) }
    };
    args.output.print_each(show, &mut shown).await?;
    match args.exit_code && !problems.is_empty() {
        true => Err(Failed::with(Failed::UNHEALTHY, problems.join(", "))),
        false => Ok(()),
    }
}

fn is_problem(alert: &Alert) -> bool {
    alert.severity != "info"
}

fn as_json(status: &GetStatusResponse) -> String {
    let tokens = status.tokens.unwrap_or_default();
    let recent = status.recent.unwrap_or_default();
    let alert = |alert: &Alert| json!({"severity": alert.severity, "code": alert.code, "message": alert.message});
    json!({
        "version": status.version,
        "ready": status.ready,
        "reason": status.reason,
        "alerts": status.alerts.iter().map(alert).collect::<Value>(),
        "models": status.models,
        "prefill_nodes": status.prefill_nodes,
        "decode_nodes": status.decode_nodes,
        "peers": status.peers,
        "uptime_ms": status.uptime_ms,
        "requests": {
            "active": status.requests_active,
            "waiting": status.requests_waiting,
            "finished": status.requests_finished,
            "failed": status.requests_failed,
            "retried": status.requests_retried,
        },
        "tokens": {
            "prompt": tokens.prompt,
            "cached": tokens.cached,
            "generated": tokens.generated,
        },
        "recent": {
            "requests": recent.requests,
            "ttft_ms": percentiles_json(recent.ttft),
            "tpot_ms": percentiles_json(recent.tpot),
        },
        "transfers": {"active": status.transfers_active, "bytes": tokens.transfer_bytes},
    })
    .to_string()
}

fn percentiles_json(of: Option<Percentiles>) -> Value {
    let of = of.unwrap_or_default();
    json!({"p50": of.p50, "p95": of.p95, "p99": of.p99})
}

fn as_text(status: &GetStatusResponse) -> String {
    let GetStatusResponse { prefill_nodes, decode_nodes, requests_active, .. } = status;
    let GetStatusResponse { requests_finished, requests_failed, requests_retried, .. } = status;
    let GetStatusResponse { version, requests_waiting, transfers_active, .. } = status;
    let ready = match status.ready {
        true if status.alerts.iter().any(is_problem) => "ready, but see the alerts".to_owned(),
        true => "ready".to_owned(),
        false => format!("not ready: {}", status.reason),
    };
    let tokens = status.tokens.unwrap_or_default();
    let (models, up) = (status.models.join(", "), time(status.uptime_ms as f64));
    let moved = bytes(tokens.transfer_bytes);
    let mut text = format!(
        "{ready}\nversion   {version}, up {up}\nmodels    {models}\n\
         nodes     {prefill_nodes} prefill, {decode_nodes} decode\n\
         requests  {requests_active} active, {requests_waiting} of them waiting for a node; \
         {requests_finished} finished, {requests_failed} failed, {requests_retried} retried\n\
         tokens    {} of prompts, {}% of them cached; {} generated\n\
         transfers {transfers_active} under way, {moved} moved\n{}",
        tokens.prompt,
        percent(tokens.cached, tokens.prompt),
        tokens.generated,
        last_minute(status),
    );
    if !status.peers.is_empty() {
        text += &format!("peers     {}\n", status.peers.join(", "));
    }
    for Alert { severity, code, message } in &status.alerts {
        text += &format!("{severity:<9} {code}: {message}\n");
    }
    text
}

fn last_minute(status: &GetStatusResponse) -> String {
    let recent = status.recent.unwrap_or_default();
    if recent.requests == 0 {
        return String::new();
    }
    let (ttft, tpot) = (recent.ttft.unwrap_or_default(), recent.tpot.unwrap_or_default());
    format!(
        "last min  {} finished; TTFT {} (p50), {} (p99); TPOT {:.1} ms (p50), {:.1} ms (p99)\n",
        recent.requests,
        time(ttft.p50),
        time(ttft.p99),
        tpot.p50,
        tpot.p99
    )
}

/// Of a whole; 0 of nothing.
pub(super) fn percent(part: u64, whole: u64) -> u64 {
    (100 * part).checked_div(whole).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::v1::{RecentRequests, TokenTotals};

    use super::*;

    #[test]
    fn one_screen_says_how_the_cluster_does() {
        let alert = Alert {
            severity: "warning".to_owned(),
            code: "NODE_LOST".to_owned(),
            message: "d left".to_owned(),
        };
        let percentiles = Percentiles { p50: 20.0, p95: 30.0, p99: 1500.0 };
        let status = GetStatusResponse {
            version: "1.2.3".to_owned(),
            ready: true,
            models: vec!["demo".to_owned()],
            requests_active: 5,
            requests_waiting: 2,
            requests_finished: 7,
            prefill_nodes: 1,
            decode_nodes: 2,
            uptime_ms: 61_000,
            transfers_active: 1,
            tokens: Some(TokenTotals {
                prompt: 100,
                cached: 62,
                generated: 9,
                transfer_bytes: 2048,
            }),
            recent: Some(RecentRequests {
                requests: 4,
                ttft: Some(percentiles),
                tpot: Some(percentiles),
            }),
            alerts: vec![alert],
            ..GetStatusResponse::default()
        };
        let wanted = "\
ready, but see the alerts
version   1.2.3, up 1m 01s
models    demo
nodes     1 prefill, 2 decode
requests  5 active, 2 of them waiting for a node; 7 finished, 0 failed, 0 retried
tokens    100 of prompts, 62% of them cached; 9 generated
transfers 1 under way, 2.0 KiB moved
last min  4 finished; TTFT 20 ms (p50), 1.5 s (p99); TPOT 20.0 ms (p50), 1500.0 ms (p99)
warning   NODE_LOST: d left
";
        assert_eq!(as_text(&status), wanted);
    }
}
