//! Shifts nodes between prefill and decode as load shifts, one at a time.
//!
//! The pressure of a role is the mean over its nodes, averaged over time: for prefill the share of
//! time that they compute plus a second's worth of queue per 1; for decode the larger of the share of
//! KV blocks in use and the step's share of [`STEP_TARGET_MS`]. A node moves when one role has much
//! pressure and the other would have little even without that node, which its others bear then:
//! `n / (n - 1)` of what it was. Taking the node back would need much pressure there, so under the same
//! load no move is undone.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_proto::hash::ModelRoot;
use baton_proto::ids::{NodeId, Role};

use crate::cluster::Member;

/// Pause between observations.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time over which pressures are averaged.
const MEMORY: Duration = Duration::from_secs(10);
/// Least time between two moves of one model's nodes, and before the first: pressures follow a move
/// within it.
pub const LEAST_PAUSE: Duration = Duration::from_secs(30);
/// A role above this may take a node.
const HIGH: f64 = 0.8;
/// A role that would be below this without one of its nodes may give it.
const LOW: f64 = 0.6;
/// A decode step of this length is full pressure.
const STEP_TARGET_MS: f64 = 50.0;
/// A prompt queue of this length is full pressure, on top of being busy.
const QUEUE_TARGET_MS: f64 = 1000.0;
/// Prefill speed of a node that has not measured its own.
const DEFAULT_TOKENS_PER_SECOND: f64 = 2000.0;

/// A node that takes work.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Its name.
    pub node: NodeId,
    /// What it is.
    pub role: Role,
    /// Pressure on it, in its role.
    pub pressure: f64,
    /// Sequences on it.
    pub sequences: u32,
}

impl Seen {
    /// A joined node as its last report shows it.
    #[must_use]
    pub fn new(node: &NodeId, member: &Member) -> Self {
        let (report, role) = (&member.report, member.hello.role);
        let sequences = report.running.saturating_add(report.waiting);
        let pressure = match role {
            Role::Prefill => {
                let measured = report.prefill_tokens_per_second;
                let speed = if measured > 0.0 { measured } else { DEFAULT_TOKENS_PER_SECOND };
                let queue_ms = report.queued_tokens as f64 / speed * 1e3;
                f64::from(u8::from(sequences > 0)) + queue_ms / QUEUE_TARGET_MS
            }
            Role::Decode => {
                let used = (report.blocks.active + report.blocks.leased) as f64;
                // An idle node still reports its last step.
                let step_ms = if report.running > 0 { report.decode_step_ms } else { 0.0 };
                (used / member.hello.total_blocks as f64).max(step_ms / STEP_TARGET_MS)
            }
        };
        Self { node: node.clone(), role, pressure, sequences }
    }
}

/// Decides which node changes its role. Pure.
#[derive(Debug)]
pub struct Roles {
    /// This coordinator: of several, the first by name decides.
    pub name: NodeId,
    models: BTreeMap<ModelRoot, Balance>,
    due: Instant,
}

/// The nodes of one model.
#[derive(Debug)]
struct Balance {
    prefill: f64,
    decode: f64,
    /// When it was first seen, or a node last moved.
    since: Instant,
    seen: Instant,
}

impl Roles {
    /// A controller of the coordinator `name` that has seen nothing yet.
    #[must_use]
    pub fn new(name: NodeId, now: Instant) -> Self {
        Self { name, models: BTreeMap::new(), due: now }
    }

    /// When [`Self::observe`] must be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        self.due
    }

    /// Looks at all nodes that take work, by model, and names those that are to change and to what.
    /// `decides`: no other coordinator does.
    pub fn observe(
        &mut self,
        nodes: &BTreeMap<ModelRoot, Vec<Seen>>,
        decides: bool,
        now: Instant,
    ) -> Vec<(NodeId, Role)> {
        self.due = now + INTERVAL;
        self.models.retain(|model, _| nodes.contains_key(model));
        let mut moves = Vec::new();
        for (model, nodes) in nodes {
            let balance = self.models.entry(*model).or_insert_with(|| Balance::new(nodes, now));
            balance.observe(nodes, now);
            if decides && let Some((node, role)) = balance.decide(nodes, now) {
                *balance = Balance::new(nodes, now);
                moves.push((node, role));
            }
        }
        moves
    }
}

impl Balance {
    fn new(nodes: &[Seen], now: Instant) -> Self {
        let (prefill, decode) = (mean(nodes, Role::Prefill), mean(nodes, Role::Decode));
        Self { prefill, decode, since: now, seen: now }
    }

    fn observe(&mut self, nodes: &[Seen], now: Instant) {
        let passed = now.saturating_duration_since(self.seen).as_secs_f64();
        let weight = 1.0 - (-passed / MEMORY.as_secs_f64()).exp();
        self.prefill += weight * (mean(nodes, Role::Prefill) - self.prefill);
        self.decode += weight * (mean(nodes, Role::Decode) - self.decode);
        self.seen = now;
    }

    fn decide(&self, nodes: &[Seen], now: Instant) -> Option<(NodeId, Role)> {
        if now.saturating_duration_since(self.since) < LEAST_PAUSE {
            return None;
        }
        let (to, taker, giver) = if self.prefill > self.decode {
            (Role::Prefill, self.prefill, self.decode)
        } else {
            (Role::Decode, self.decode, self.prefill)
        };
        let takers = nodes.iter().filter(|seen| seen.role == to).count();
        let givers = nodes.iter().filter(|seen| seen.role != to);
        let count = givers.clone().count() as f64;
        if takers == 0 || count < 2.0 || taker < HIGH || giver * count / (count - 1.0) > LOW {
            return None;
        }
        let least = givers.min_by(|a, b| {
            let by_work = a.sequences.cmp(&b.sequences);
            by_work.then(a.pressure.total_cmp(&b.pressure)).then(a.node.cmp(&b.node))
        })?;
        Some((least.node.clone(), to))
    }
}

/// 0 without nodes.
fn mean(nodes: &[Seen], role: Role) -> f64 {
    let pressures = nodes.iter().filter(|seen| seen.role == role).map(|seen| seen.pressure);
    let (count, sum) = pressures.fold((0.0, 0.0), |(count, sum), p| (count + 1.0, sum + p));
    if count > 0.0 { sum / count } else { 0.0 }
}

#[cfg(test)]
#[path = "roles_tests.rs"]
mod tests;
