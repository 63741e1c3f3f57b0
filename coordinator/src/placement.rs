//! Which nodes a request goes to: the cheapest of all (prefill, decode) pairs and of all decode
//! nodes by themselves, in milliseconds.
//!
//! With `L` tokens in all, `m_x` of them cached on node `x`, and
//! `S_x = a + b_x (L - m_x) + c_x (L^2 - m_x^2)`:
//!
//! - `remote(p, d) = queue_p + S_p + w (S_p - best S) + transfer(d) + decode(d)`
//! - `local(d) = queue_d + S_d + decode(d) + harm (1 + sequences_d) S_d`
//!
//! `w = rho / (1 - rho)` is the delay that a second of extra prefill inflicts on later arrivals when
//! the share `rho` of the prefill nodes is busy. The harm of a local prefill is what it costs the
//! sequences on `d`, and the next one to come, in inter-token time. Skipping the remote prefill of
//! a short or cached prompt falls out of the comparison.

use std::cmp::Ordering;

use baton_proto::ids::NodeId;
use serde::Deserialize;

/// Fixed cost of a prefill, `a`.
const PREFILL_START_MS: f64 = 1.0;
/// Tokens of context at which attending to them costs a token as much as all else: `b / 2c`.
const ATTENTION_PARITY_TOKENS: f64 = 16384.0;
/// Prefill speed of nodes before any was measured.
const DEFAULT_TOKENS_PER_SECOND: f64 = 2000.0;
/// Duration of a decode step before it was measured.
const DEFAULT_STEP_MS: f64 = 20.0;
/// Fixed cost of a KV transfer: offer, grant, acknowledgement.
const TRANSFER_START_MS: f64 = 1.0;
/// Throughput of a KV transfer.
const TRANSFER_BYTES_PER_MS: f64 = 1e6;
/// Share of a KV transfer that runs while the prompt is still computed.
const HIDDEN_SHARE: f64 = 0.8;
/// Cost of one more sequence on a decode node, for all that are there.
const CROWDING_MS: f64 = 0.5;
/// Cost of memory pressure on a decode node: this times k / (1 - k) at the share k of its blocks.
const PRESSURE_MS: f64 = 20.0;
/// Weight of a millisecond by which a local prefill delays a sequence's next token.
const HARM: f64 = 0.3;
/// Bounds `rho` and `k`, so that no cost becomes infinite.
const MOST_BUSY: f64 = 0.95;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Tokens whose KV is needed.
    pub tokens: usize,
    /// Bytes of KV per token.
    pub token_bytes: usize,
    /// Blocks that the decode node needs.
    pub blocks: u64,
    /// Whether a decode node may compute the prompt.
    pub local_prefill: LocalPrefill,
}

/// When decode nodes compute prompts themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LocalPrefill {
    /// When that is cheaper, or no prefill node is there.
    #[default]
    Auto,
    /// Only when no prefill node is there.
    Never,
}

/// A node that may take a request.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// Its name.
    pub node: &'a NodeId,
    /// Leading tokens that its prefix cache holds.
    pub cached_tokens: usize,
    /// Prompt tokens that it has still to compute.
    pub queued_tokens: u64,
    /// Sequences on it.
    pub sequences: u32,
    /// Prefill speed; 0 until measured.
    pub tokens_per_second: f64,
    /// Duration of a decode step; 0 until measured.
    pub step_ms: f64,
    /// Blocks that sequences neither use nor were promised.
    pub room: u64,
    /// Size of its block pool.
    pub total_blocks: u64,
}

/// Where to, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Index of the prefill node; `None`: the decode node computes the prompt itself.
    pub prefill: Option<usize>,
    /// Index of the decode node.
    pub decode: usize,
    /// Its cost.
    pub cost: Cost,
    /// How many others were compared.
    pub runners_up: usize,
    /// In words.
    pub reason: String,
}

/// Terms of a placement's cost, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Waiting for the node that computes the prompt.
    pub queue: f64,
    /// Computing what is not cached.
    pub prefill: f64,
    /// Transfer that computing does not hide.
    pub transfer: f64,
    /// Wait, crowding and memory pressure on the decode node.
    pub decode: f64,
    /// What it costs other requests.
    pub harm: f64,
}

impl Cost {
    /// The sum.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.queue + self.prefill + self.transfer + self.decode + self.harm
    }
}

/// The cheapest placement; `None` without a decode node. Ties go to the earlier candidate.
#[must_use]
pub fn choose(
    demand: Demand,
    prefill: &[Candidate<'_>],
    decode: &[Candidate<'_>],
) -> Option<Choice> {
    let view = View::new(demand, prefill, decode);
    // Links are taken as equal, so a pair's cost is a sum of what depends on either node alone:
    // the cheapest of each side make the cheapest of all pairs.
    let receiver = cheapest(decode, |d| view.fits(d), |d| view.receiving(d))?;
    let alone = cheapest(decode, |d| view.fits(d), |d| view.local(d))?;
    let remote = cheapest(prefill, |_| true, |p| view.remote_prefill(p))
        .map(|(p, cost)| (p, add(cost, receiver.1)));
    let runners_up = (prefill.len() + 1) * decode.len() - 1;
    let local_ms = alone.1.total();
    let never = demand.local_prefill == LocalPrefill::Never;
    Some(match remote {
        Some((p, cost)) if never || cost.total() < local_ms => {
            let reason = format!(
                "remote: {:.1} ms, {}% cached on {}; local would be {local_ms:.1} ms",
                cost.total(),
                view.percent(&prefill[p]),
                prefill[p].node,
            );
            Choice { prefill: Some(p), decode: receiver.0, cost, runners_up, reason }
        }
        other => {
            let d = &decode[alone.0];
            let against = match other {
                Some((_, cost)) => format!("remote would be {:.1} ms", cost.total()),
                None => "no prefill node is free".to_owned(),
            };
            let percent = view.percent(d);
            let reason =
                format!("local: {local_ms:.1} ms, {percent}% cached on {}; {against}", d.node);
            Choice { prefill: None, decode: alone.0, cost: alone.1, runners_up, reason }
        }
    })
}

/// The cheapest of the candidates that fit, or of all if none does.
fn cheapest<'a, 'b>(
    all: &'b [Candidate<'a>],
    fits: impl Fn(&Candidate<'a>) -> bool,
    cost: impl Fn(&'b Candidate<'a>) -> Cost,
) -> Option<(usize, Cost)> {
    let any_fits = all.iter().any(&fits);
    let candidates = all.iter().enumerate().filter(|(_, c)| !any_fits || fits(c));
    candidates
        .map(|(at, candidate)| (at, cost(candidate)))
        .min_by(|(_, a), (_, b)| a.total().partial_cmp(&b.total()).unwrap_or(Ordering::Equal))
}

fn add(a: Cost, b: Cost) -> Cost {
    Cost {
        queue: a.queue + b.queue,
        prefill: a.prefill + b.prefill,
        transfer: a.transfer + b.transfer,
        decode: a.decode + b.decode,
        harm: a.harm + b.harm,
    }
}

/// What all candidates have in common.
struct View {
    demand: Demand,
    /// Speed of nodes that have not measured theirs: the fastest one's, for they get less work
    /// than they could do if it is too low, and never measure.
    default_speed: f64,
    best_prefill: f64,
    /// `w`.
    scarcity: f64,
}

impl View {
    fn new(demand: Demand, prefill: &[Candidate<'_>], decode: &[Candidate<'_>]) -> Self {
        let measured = prefill.iter().chain(decode).map(|c| c.tokens_per_second);
        let fastest = measured.fold(0.0, f64::max);
        let default_speed = if fastest > 0.0 { fastest } else { DEFAULT_TOKENS_PER_SECOND };
        let busy = prefill.iter().filter(|p| p.queued_tokens > 0).count();
        let rho = (busy as f64 / prefill.len().max(1) as f64).min(MOST_BUSY);
        let mut view =
            Self { demand, default_speed, best_prefill: 0.0, scarcity: rho / (1.0 - rho) };
        let all = prefill.iter().map(|p| view.prefill(p));
        view.best_prefill = all.fold(f64::INFINITY, f64::min);
        view
    }

    fn fits(&self, node: &Candidate<'_>) -> bool {
        node.room >= self.demand.blocks
    }

    /// Tokens of the request on a node; the last one is always computed, for its logits.
    fn cached(&self, node: &Candidate<'_>) -> usize {
        node.cached_tokens.min(self.demand.tokens.saturating_sub(1))
    }

    fn percent(&self, node: &Candidate<'_>) -> usize {
        100 * self.cached(node) / self.demand.tokens.max(1)
    }

    fn compute(&self, node: &Candidate<'_>, tokens: f64) -> f64 {
        let speed = node.tokens_per_second;
        tokens * 1000.0 / if speed > 0.0 { speed } else { self.default_speed }
    }

    /// `S`.
    fn prefill(&self, node: &Candidate<'_>) -> f64 {
        let (all, cached) = (self.demand.tokens as f64, self.cached(node) as f64);
        let attention = (all * all - cached * cached) / (2.0 * ATTENTION_PARITY_TOKENS);
        PREFILL_START_MS + self.compute(node, all - cached + attention)
    }

    fn queue(&self, node: &Candidate<'_>) -> f64 {
        self.compute(node, node.queued_tokens as f64)
    }

    fn remote_prefill(&self, p: &Candidate<'_>) -> Cost {
        let prefill = self.prefill(p);
        let harm = self.scarcity * (prefill - self.best_prefill);
        Cost { queue: self.queue(p), prefill, harm, ..Cost::default() }
    }

    fn receiving(&self, d: &Candidate<'_>) -> Cost {
        let bytes = (self.demand.tokens - self.cached(d)) as f64 * self.demand.token_bytes as f64;
        let exposed = bytes / TRANSFER_BYTES_PER_MS * (1.0 - HIDDEN_SHARE);
        let transfer = TRANSFER_START_MS + exposed;
        Cost { transfer, decode: self.decode(d), ..Cost::default() }
    }

    fn local(&self, d: &Candidate<'_>) -> Cost {
        let prefill = self.prefill(d);
        let harm = HARM * (1.0 + f64::from(d.sequences)) * prefill;
        Cost { queue: self.queue(d), prefill, decode: self.decode(d), harm, ..Cost::default() }
    }

    fn decode(&self, d: &Candidate<'_>) -> f64 {
        let step = if d.step_ms > 0.0 { d.step_ms } else { DEFAULT_STEP_MS };
        let used = d.total_blocks.saturating_sub(d.room) + self.demand.blocks;
        let k = (used as f64 / d.total_blocks.max(1) as f64).min(MOST_BUSY);
        step + CROWDING_MS * f64::from(d.sequences) + PRESSURE_MS * k / (1.0 - k)
    }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
