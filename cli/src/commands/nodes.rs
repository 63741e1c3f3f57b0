//! `baton nodes`: every node with its load and KV blocks.

use baton_proto::wire::v1::{ListNodesRequest, Node};
use serde_json::{Value, json};

use super::CommandError;
use crate::client::{Target, explain};
use crate::output::{OutputArgs, table};

/// Command line of `baton nodes`.
#[derive(clap::Args)]
pub(crate) struct NodesArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `baton nodes`.
pub(crate) async fn run(args: NodesArgs) -> Result<(), CommandError> {
    args.output.print(|| show(&args)).await
}

async fn show(args: &NodesArgs) -> Result<String, CommandError> {
    let response = args.target.cluster().await?.list_nodes(ListNodesRequest {}).await;
    let nodes = response.map_err(|status| explain(&status))?.into_inner().nodes;
    if args.output.is_json() {
        return Ok(nodes.iter().map(as_json).collect::<Value>().to_string());
    }
    let head = [
        "NODE",
        "ROLE",
        "STATE",
        "RUNNING",
        "WAITING",
        "BLOCKS",
        "FREE",
        "ACTIVE",
        "CACHED",
        "LEASED",
        "PREFILL tok/s",
        "STEP ms",
        "KV BY",
        "KV ADDRESS",
    ];
    Ok(table(&head, &nodes.iter().map(as_row).collect::<Vec<_>>()))
}

fn as_json(node: &Node) -> Value {
    let blocks = node.kv_blocks.unwrap_or_default();
    json!({
        "id": node.id,
        "role": node.role,
        "epoch": node.epoch,
        "model": node.model,
        "kv_address": node.kv_address,
        "transports": node.transports,
        "draining": node.draining,
        "report_age_ms": node.report_age_ms,
        "running": node.running,
        "waiting": node.waiting,
        "prefill_tokens_per_second": node.prefill_tokens_per_second,
        "decode_step_ms": node.decode_step_ms,
        "kv_transport": node.kv_transport,
        "kv_blocks": {
            "total": blocks.total,
            "free": blocks.free,
            "active": blocks.active,
            "cached": blocks.cached,
            "leased": blocks.leased,
            "block_tokens": blocks.block_tokens,
            "bytes_per_block": blocks.bytes_per_block,
        },
    })
}

fn as_row(node: &Node) -> Vec<String> {
    let blocks = node.kv_blocks.unwrap_or_default();
    let state = if node.draining { "draining" } else { "up" };
    let mut row = vec![node.id.clone(), node.role.clone(), state.to_owned()];
    let counts = [node.running.into(), node.waiting.into(), blocks.total, blocks.free];
    row.extend(counts.map(|n: u64| n.to_string()));
    row.extend([blocks.active, blocks.cached, blocks.leased].map(|n| n.to_string()));
    row.push(format!("{:.0}", node.prefill_tokens_per_second));
    row.push(format!("{:.1}", node.decode_step_ms));
    row.push(match &*node.kv_transport {
        "" => "-".to_owned(),
        transport => transport.to_owned(),
    });
    row.push(node.kv_address.clone());
    row
}
