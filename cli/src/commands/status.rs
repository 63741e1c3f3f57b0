//! `baton status`: whether the cluster serves, and what.

use baton_proto::wire::v1::{GetStatusRequest, GetStatusResponse};
use serde_json::json;

use super::CommandError;
use crate::client::{Target, explain};
use crate::output::OutputArgs;

/// Command line of `baton status`.
#[derive(clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `baton status`.
pub(crate) async fn run(args: StatusArgs) -> Result<(), CommandError> {
    args.output.print(|| show(&args)).await
}

async fn show(args: &StatusArgs) -> Result<String, CommandError> {
    let response = args.target.cluster().await?.get_status(GetStatusRequest {}).await;
    let status = response.map_err(|status| explain(&status))?.into_inner();
    Ok(if args.output.json { as_json(&status) } else { as_text(&status) })
}

fn as_json(status: &GetStatusResponse) -> String {
    json!({
        "version": status.version,
        "ready": status.ready,
        "reason": status.reason,
        "models": status.models,
        "prefill_nodes": status.prefill_nodes,
        "decode_nodes": status.decode_nodes,
        "peers": status.peers,
        "uptime_ms": status.uptime_ms,
        "requests": {
            "active": status.requests_active,
            "finished": status.requests_finished,
            "failed": status.requests_failed,
            "retried": status.requests_retried,
        },
    })
    .to_string()
}

fn as_text(status: &GetStatusResponse) -> String {
    let ready =
        if status.ready { "ready".to_owned() } else { format!("not ready: {}", status.reason) };
    let GetStatusResponse { prefill_nodes, decode_nodes, requests_active, .. } = status;
    let GetStatusResponse { requests_finished, requests_failed, requests_retried, .. } = status;
    let peers = match status.peers.as_slice() {
        [] => String::new(),
        some => format!("peers     {}\n", some.join(", ")),
    };
    format!(
        "{ready}\nversion   {}\nup        {} s\nmodels    {}\nnodes     {prefill_nodes} prefill, \
         {decode_nodes} decode\nrequests  {requests_active} active, {requests_finished} finished, \
         {requests_failed} failed, {requests_retried} retried\n{peers}",
        status.version,
        status.uptime_ms / 1000,
        status.models.join(", "),
    )
}
