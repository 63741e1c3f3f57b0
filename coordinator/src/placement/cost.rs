//! What a placement costs, in milliseconds.
//!
//! With `L` tokens in all, `m_x` of them cached on node `x`, `S` the time to compute what is not
//! ([`fit`](super::fit)), and `T` the duration of a decode step:
//!
//! - `remote(p, d) = max(queue_p, pull) + S_p + max(w, n_p) S_p + exposed transfer + decode(d)`
//! - `local(d) = max(queue_d, pull) + S_d in chunks between decode steps + their harm + n_d S_d +
//!   decode(d)`
//!
//! `n` requests in the node's queue here would stand behind this one, and wait longer for it.
//! `w = rho / (1 - rho)` is the delay that a second of prefill inflicts on later arrivals when the
//! prefill nodes are busy for the share `rho` of the time: at leisure the nearest node in time is
//! the best one, under load the one that has the prefix cached. Skipping the remote prefill of a
//! short or cached prompt falls out of the comparison, and needs no threshold.

use super::fit;

/// Fixed cost of a KV transfer: offer, grant, acknowledgement.
const TRANSFER_START_MS: f64 = 1.0;
/// A pull must be cheaper than computing by this share of itself.
const PULL_MARGIN: f64 = 0.1;
/// Tokens of one chunk of a prompt that is computed between decode steps.
const CHUNK_TOKENS: f64 = 512.0;
/// Decode steps longer than this are felt by those who read along; on a slow node, those so many
/// times as long as a step of one sequence.
const LONGEST_STEP_MS: f64 = 150.0;
const LONGEST_STEP: f64 = 6.0;
/// The same on average over [`TAKEN_WINDOW_MS`].
const SLOWEST_STEP_MS: f64 = 43.0;
const SLOWEST_STEP: f64 = 2.0;
/// Harm of exceeding either: nobody computes a prompt so who has a choice.
const UNBEARABLE_MS: f64 = 1e6;
/// Weight of a millisecond by which a local prefill delays a sequence's next token.
const CHUNK_HARM: f64 = 0.3;
/// Time over which the slowdown of sequences by prompts is averaged.
pub const TAKEN_WINDOW_MS: f64 = 10_000.0;
/// Weight of the time that the output will take, against the time to the first token.
const OUTPUT_WEIGHT: f64 = 0.5;
/// Cost of memory pressure on a decode node: this times k / (1 - k) at the share k of its blocks.
const PRESSURE_MS: f64 = 150.0;
/// Bounds k, so that no cost becomes infinite.
const MOST_PRESSURE: f64 = 0.97;

/// Harm of making another request miss its deadline: more than anything else can cost.
pub const MAKES_OTHERS_LATE_MS: f64 = 1e9;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Tokens whose KV is needed.
    pub tokens: usize,
    /// Bytes of KV per token.
    pub token_bytes: f64,
    /// Blocks that the decode node needs.
    pub blocks: u64,
    /// Tokens that the answer is expected to have.
    pub output: f64,
}

/// A node that may take a part of a request, in numbers.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Leading tokens that it has, or will have by then.
    pub cached: usize,
    /// Time until it could start with the prompt.
    pub queue_ms: f64,
    /// Requests that would wait longer because of this one.
    pub behind: usize,
    /// One of them would miss its deadline because of that.
    pub late: bool,
    /// Coefficients of a prefill on a typical node of its model.
    pub typical: [f64; 3],
    /// Coefficients of its prefill.
    pub prefill: [f64; 3],
    /// Coefficients of its decode steps.
    pub step: [f64; 3],
    /// Time that prompts have lately taken from its sequences, older time counting less.
    pub taken_ms: f64,
    /// Sequences on it.
    pub sequences: f64,
    /// Tokens that they hold.
    pub kv_tokens: f64,
    /// Blocks that sequences neither use nor were promised.
    pub room: u64,
    /// Size of its block pool.
    pub total_blocks: u64,
    /// What its time is worth, relative to other nodes.
    pub price: f64,
    /// How much longer everything is taken to last there: above 1 for a node that just joined.
    pub caution: f64,
}

/// The longest cached prefix anywhere, and what it takes to fetch it.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its tokens.
    pub tokens: usize,
    /// Milliseconds per token.
    pub token_ms: f64,
}

/// Terms of a placement's cost, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Waiting for the node that computes the prompt.
    pub queue: f64,
    /// Waiting for a cached prefix from another node beyond that.
    pub pull: f64,
    /// Computing what is not cached.
    pub prefill: f64,
    /// Transfer that computing does not hide.
    pub transfer: f64,
    /// The decode node's speed and memory pressure.
    pub decode: f64,
    /// What it costs other requests.
    pub harm: f64,
}

impl Cost {
    /// The sum.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.first_token() + self.transfer + self.decode + self.harm
    }

    /// Time to the first token.
    #[must_use]
    pub fn first_token(&self) -> f64 {
        self.queue + self.pull + self.prefill
    }

    /// Both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            queue: self.queue + other.queue,
            pull: self.pull + other.pull,
            prefill: self.prefill + other.prefill,
            transfer: self.transfer + other.transfer,
            decode: self.decode + other.decode,
            harm: self.harm + other.harm,
        }
    }
}

/// Computing a prompt on one node.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prefill {
    /// Milliseconds of computing.
    pub ms: f64,
    /// The same on a typical node: a slow node's time is worth less.
    pub typical_ms: f64,
    /// Milliseconds that a pull takes before it; 0 without one.
    pub pull_ms: f64,
    /// Tokens that it computes.
    pub new_tokens: f64,
    /// Time that computing it on a decode node takes from the sequences there.
    pub taken_ms: f64,
    /// A cached prefix is fetched from elsewhere.
    pub pulls: bool,
}

/// How a node would compute the prompt: with its own cache, or after a pull if that is cheaper.
#[must_use]
pub fn prefill(demand: &Demand, node: &Candidate, source: Option<Source>) -> Prefill {
    // The last token is always computed, for its logits.
    let most = demand.tokens.saturating_sub(1);
    let alone = |cached: usize| {
        let quantities = fit::prefill(demand.tokens, cached.min(most));
        let ms = |c: &[f64; 3]| (0..3).map(|at| c[at] * quantities[at]).sum::<f64>();
        let (own, typical_ms) = (ms(&node.prefill) * node.caution, ms(&node.typical));
        Prefill { ms: own, typical_ms, new_tokens: quantities[1], ..Prefill::default() }
    };
    let own = alone(node.cached);
    let Some(source) = source.filter(|source| source.tokens > node.cached) else {
        return own;
    };
    let pull_ms = TRANSFER_START_MS + (source.tokens - node.cached) as f64 * source.token_ms;
    let rest = alone(source.tokens);
    if own.ms <= rest.ms + pull_ms * (1.0 + PULL_MARGIN) {
        return own;
    }
    Prefill { pull_ms, pulls: true, ..rest }
}

/// The prefill node's part of a remote placement. `scarcity`: `w`.
#[must_use]
pub fn computing(node: &Candidate, prefill: &Prefill, scarcity: f64) -> Cost {
    let later = scarcity * prefill.typical_ms * node.price;
    // `w` is how many wait for a second of work on average; here, they may be known to be more.
    let harm = later.max(waiting(node, prefill.ms));
    Cost {
        queue: node.queue_ms,
        pull: (prefill.pull_ms - node.queue_ms).max(0.0),
        prefill: prefill.ms,
        harm,
        ..Cost::default()
    }
}

/// The decode node's part of a remote placement. `ms_per_byte`: what the link at its present load
/// takes beyond the time that computing hides.
#[must_use]
pub fn receiving(demand: &Demand, node: &Candidate, ms_per_byte: f64) -> Cost {
    let missing = demand.tokens.saturating_sub(node.cached) as f64 * demand.token_bytes;
    let transfer = TRANSFER_START_MS + missing * ms_per_byte;
    Cost { transfer, decode: decode(demand, node), ..Cost::default() }
}

/// A placement on a decode node alone.
#[must_use]
pub fn local(demand: &Demand, node: &Candidate, prefill: &mut Prefill) -> Cost {
    let steps = (prefill.new_tokens / CHUNK_TOKENS).ceil();
    let others = node.step[1] * node.sequences + node.step[2] * node.kv_tokens;
    let usual = node.step[0] + others;
    // What the node measured contains the decode steps around its chunks.
    let computing = prefill.ms.max(steps * usual);
    let extra = computing - steps * usual;
    prefill.taken_ms = extra;
    // One more sequence is always about to come.
    let mut harm = CHUNK_HARM * (node.sequences + 1.0) * extra + waiting(node, computing);
    let left = (TAKEN_WINDOW_MS - node.taken_ms - extra).max(1.0);
    let felt = usual * TAKEN_WINDOW_MS / left;
    let step = computing / steps.max(1.0);
    let alone = node.step[0] + node.step[1];
    let jerks = step > LONGEST_STEP_MS.max(LONGEST_STEP * alone);
    let drags = felt > SLOWEST_STEP_MS.max(SLOWEST_STEP * alone);
    if node.sequences > 0.0 && (jerks || drags) {
        harm += UNBEARABLE_MS;
    }
    Cost {
        queue: node.queue_ms,
        pull: (prefill.pull_ms - node.queue_ms).max(0.0),
        prefill: computing,
        decode: decode(demand, node),
        harm,
        ..Cost::default()
    }
}

/// What it costs those that wait behind it.
fn waiting(node: &Candidate, ms: f64) -> f64 {
    node.behind as f64 * ms + if node.late { MAKES_OTHERS_LATE_MS } else { 0.0 }
}

/// Generating on a node: what its steps will cost this sequence and the others, and its memory.
fn decode(demand: &Demand, node: &Candidate) -> f64 {
    let mine = fit::step(node.sequences + 1.0, node.kv_tokens + demand.tokens as f64);
    let step: f64 = (0..3).map(|at| node.step[at] * mine[at]).sum();
    let slower = node.step[1] + node.step[2] * demand.tokens as f64;
    let output = demand.output * (step + slower * node.sequences) * node.caution;
    let used = node.total_blocks.saturating_sub(node.room) + demand.blocks;
    let k = (used as f64 / node.total_blocks.max(1) as f64).min(MOST_PRESSURE);
    step + OUTPUT_WEIGHT * output + PRESSURE_MS * k / (1.0 - k)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether four sequences on a node of this speed bear that it computes 64 tokens, after
    /// prompts took `taken_ms` of their time.
    fn bears(step: [f64; 3], taken_ms: f64) -> bool {
        let demand = Demand { tokens: 64, token_bytes: 1.0, blocks: 4, output: 10.0 };
        let prefill = [0.0, step[0] / 50.0, 0.0];
        let node = Candidate {
            cached: 0,
            queue_ms: 0.0,
            behind: 0,
            late: false,
            typical: prefill,
            prefill,
            step,
            taken_ms,
            sequences: 4.0,
            kv_tokens: 0.0,
            room: 100,
            total_blocks: 100,
            price: 1.0,
            caution: 1.0,
        };
        let mut work = super::prefill(&demand, &node, None);
        local(&demand, &node, &mut work).harm < UNBEARABLE_MS
    }

    #[test]
    fn a_slow_node_computes_prompts_between_its_steps_too() {
        for floor in [18.0, 60.0, 600.0] {
            let step = [floor, 0.1, 0.0];
            assert!(bears(step, 0.0), "steps of {floor} ms");
            assert!(!bears(step, 0.9 * TAKEN_WINDOW_MS), "steps of {floor} ms");
        }
    }
}
