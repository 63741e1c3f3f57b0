//! How busy the cluster is, in the numbers by which a gateway chooses between engines.

use std::time::SystemTime;

use baton_proto::ids::Role;
use baton_proto::wire::engine::{GetLoadsResponse, SchedulerLoad};

use crate::core::{NodeView, StatusView};
use crate::front::{VERSION, strftime};
use crate::requests::Totals;

/// Counts requests here, and tokens where they are generated.
pub(super) fn response(
    status: &StatusView,
    nodes: &[NodeView],
    totals: &Totals,
) -> GetLoadsResponse {
    let decode = || nodes.iter().filter(|node| node.hello.role == Role::Decode);
    let tokens = |blocks: fn(&NodeView) -> u64| -> u64 {
        decode().map(|node| blocks(node) * u64::from(node.hello.geometry.block_tokens)).sum()
    };
    let used = tokens(|node| node.report.blocks.active + node.report.blocks.leased);
    let total = tokens(|node| node.hello.total_blocks);
    let running = status.requests_active.saturating_sub(status.requests_waiting);
    let load = SchedulerLoad {
        dp_rank: 0,
        num_running_reqs: clamped(running as u64),
        num_waiting_reqs: clamped(status.requests_waiting as u64),
        num_total_reqs: clamped(status.requests_active as u64),
        num_used_tokens: clamped(used),
        max_total_num_tokens: clamped(total),
        token_usage: ratio(used, total),
        gen_throughput: decode().map(generates).sum(),
        cache_hit_rate: ratio(totals.cached_tokens, totals.prompt_tokens),
    };
    GetLoadsResponse {
        timestamp: strftime::utc("%Y-%m-%dT%H:%M:%SZ", SystemTime::now()),
        version: VERSION.to_owned(),
        dp_rank_count: 1,
        loads: vec![load],
    }
}

/// Tokens a second: each step gives every running sequence one.
fn generates(node: &NodeView) -> f64 {
    let steps =
        if node.report.decode_step_ms > 0.0 { 1e3 / node.report.decode_step_ms } else { 0.0 };
    f64::from(node.report.running) * steps
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn clamped(count: u64) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
