//! How many nodes a trace needs.
//!
//! More nodes of either kind never make a cluster miss its targets: what is known of one pair of
//! counts settles those that are smaller or larger in both, and only the border between is walked.

use std::collections::BTreeMap;

use crate::replay::{Distribution, Summary};

/// What is asked of a cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    /// Time to first token.
    pub ttft_ms: f64,
    /// Mean time per output token of a request.
    pub tpot_ms: f64,
    /// Which requests must meet them.
    pub percentile: Percentile,
}

/// Which share of the requests must meet a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Percentile {
    /// 90 %.
    P90,
    /// 99 %.
    P99,
}

/// A cluster that was tried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// Prefill nodes.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
    /// Time to first token at the percentile.
    pub ttft_ms: f64,
    /// Time per output token at the percentile.
    pub tpot_ms: f64,
    /// Requests that were not served.
    pub rejected: usize,
    /// Whether all was served as asked.
    pub meets: bool,
}

/// What nodes cost, in any unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prices {
    /// A prefill node.
    pub prefill: f64,
    /// A decode node.
    pub decode: f64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Every cluster that was tried, by counts.
    pub trials: Vec<Trial>,
    /// The fewest nodes that meet the targets; `None`: not even the largest cluster does.
    pub smallest: Option<Trial>,
    /// The cheapest ones.
    pub cheapest: Option<Trial>,
}

impl Targets {
    /// Judges a replay.
    #[must_use]
    pub fn judge(&self, prefill: usize, decode: usize, summary: &Summary) -> Trial {
        let at = |times: Distribution| match self.percentile {
            Percentile::P90 => times.p90,
            Percentile::P99 => times.p99,
        };
        let (ttft_ms, tpot_ms) = (at(summary.ttft_ms), at(summary.tpot_ms));
        let rejected = summary.requests - summary.completed;
        let meets = rejected == 0 && ttft_ms <= self.ttft_ms && tpot_ms <= self.tpot_ms;
        Trial { prefill, decode, ttft_ms, tpot_ms, rejected, meets }
    }
}

impl Prices {
    /// Of a cluster.
    #[must_use]
    pub fn of(&self, prefill: usize, decode: usize) -> f64 {
        self.prefill * prefill as f64 + self.decode * decode as f64
    }
}

/// Finds the smallest and the cheapest cluster of `fewest` to `most` prefill nodes and 1 to `most`
/// decode nodes. `fewest` is 0 for a policy that may always have decode nodes compute prompts: others
/// do so only where there is no prefill node, and may do worse with the first one.
///
/// # Errors
///
/// Those of `evaluate`, which tries a cluster.
pub fn search<E>(
    fewest: usize,
    most: usize,
    prices: Prices,
    evaluate: impl FnMut(usize, usize) -> Result<Trial, E>,
) -> Result<Plan, E> {
    let mut search = Search { evaluate, tried: BTreeMap::new() };
    let mut enough = 1;
    while !search.meets(enough, enough)? && enough < most {
        enough = most.min(2 * enough);
    }
    if search.meets(enough, enough)? {
        search.walk(fewest, enough, most, prices)?;
    }
    let trials: Vec<Trial> = search.tried.into_values().collect();
    let price = |trial: &Trial| prices.of(trial.prefill, trial.decode);
    let nodes = |trial: &Trial| trial.prefill + trial.decode;
    let met = || trials.iter().filter(|trial| trial.meets).copied();
    let smallest = met().min_by(|a, b| {
        nodes(a).cmp(&nodes(b)).then(price(a).total_cmp(&price(b))).then(a.prefill.cmp(&b.prefill))
    });
    let cheapest = met().min_by(|a, b| {
        price(a).total_cmp(&price(b)).then(nodes(a).cmp(&nodes(b))).then(a.prefill.cmp(&b.prefill))
    });
    Ok(Plan { smallest, cheapest, trials })
}

struct Search<F> {
    evaluate: F,
    tried: BTreeMap<(usize, usize), Trial>,
}

impl<E, F: FnMut(usize, usize) -> Result<Trial, E>> Search<F> {
    /// Walks the border from the fewest prefill nodes on, for as long as it may get better than
    /// `enough` nodes of each kind, which do.
    fn walk(&mut self, fewest: usize, enough: usize, most: usize, prices: Prices) -> Result<(), E> {
        let (mut nodes, mut price) = (2 * enough, prices.of(enough, enough));
        // Beyond these, one kind alone is more, and dearer.
        let bound = |of_one: f64| most.min(nodes.max((price / of_one) as usize));
        let (most_prefill, most_decode) = (bound(prices.prefill), bound(prices.decode));
        let least_decode = least(1, enough, |decode| self.meets(most_prefill, decode))?;
        let mut prefill = least(fewest, enough, |prefill| self.meets(prefill, most_decode))?;
        let mut decode = least(least_decode, most_decode, |decode| self.meets(prefill, decode))?;
        loop {
            nodes = nodes.min(prefill + decode);
            price = price.min(prices.of(prefill, decode));
            prefill += 1;
            let hopeless =
                prefill + least_decode > nodes && prices.of(prefill, least_decode) > price;
            if decode == least_decode || prefill > most_prefill || hopeless {
                return Ok(());
            }
            while decode > least_decode && self.meets(prefill, decode - 1)? {
                decode -= 1;
            }
        }
    }

    fn meets(&mut self, prefill: usize, decode: usize) -> Result<bool, E> {
        let tried = self.tried.iter();
        let known = tried.map(|(&(p, d), trial)| (p, d, trial.meets)).find(|&(p, d, meets)| {
            if meets { p <= prefill && d <= decode } else { p >= prefill && d >= decode }
        });
        if let Some((.., meets)) = known {
            return Ok(meets);
        }
        let trial = (self.evaluate)(prefill, decode)?;
        self.tried.insert((prefill, decode), trial);
        Ok(trial.meets)
    }
}

/// The least count between `low` and `high` that will do; `high` does.
fn least<E>(
    mut low: usize,
    mut high: usize,
    mut does: impl FnMut(usize) -> Result<bool, E>,
) -> Result<usize, E> {
    while low < high {
        let middle = usize::midpoint(low, high);
        if does(middle)? {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Ok(low)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
