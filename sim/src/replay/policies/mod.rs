//! Placement policies: the coordinator's, and others to compare it with.

mod baton;
mod blind;
mod load;
mod prefix;

use std::collections::VecDeque;

use super::{Admission, Cluster, Decision, Dispatch, Policy};

/// The policies by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// The coordinator's own.
    Baton,
    /// Any node.
    Random,
    /// The nodes in turn.
    RoundRobin,
    /// The node with the fewest prompt tokens to compute.
    LeastLoaded,
    /// The node that had the first request beginning with the same 1,024 tokens.
    Session,
    /// The node that holds most of the prompt, blocks that everybody has not counted.
    Prefix,
    /// llm-d's: among nodes that hold at least 80 % of the prompt, unless waiting costs too much.
    Sticky,
    /// Mooncake's: the node where the first token comes earliest.
    MinTtft,
}

impl PolicyKind {
    /// The policy; `seed` drives its random choices.
    #[must_use]
    pub fn build(self, seed: u64) -> Box<dyn Policy> {
        let random = fastrand::Rng::with_seed(seed ^ 0x9e37_79b9_7f4a_7c15);
        match self {
            Self::Baton => Box::new(baton::Baton::new()),
            Self::Random => Baseline::boxed(random, blind::Random),
            Self::RoundRobin => Baseline::boxed(random, blind::RoundRobin::default()),
            Self::LeastLoaded => Baseline::boxed(random, load::LeastLoaded),
            Self::Session => Baseline::boxed(random, load::Session::default()),
            Self::Prefix => Baseline::boxed(random, prefix::Prefix::default()),
            Self::Sticky => Baseline::boxed(random, prefix::Sticky),
            Self::MinTtft => Baseline::boxed(random, load::MinTtft),
        }
    }
}

/// A request that arrived, and what its place is chosen by.
struct Arrival<'a> {
    now_ms: f64,
    request: usize,
    cluster: &'a Cluster<'a>,
    random: &'a mut fastrand::Rng,
}

/// What differs between the policies: the choice of the prefill node.
trait Choose {
    fn choose(&mut self, arrival: Arrival<'_>) -> usize;
}

/// Places at once, always computes prompts on prefill nodes, and decodes where the least KV is.
struct Baseline<C> {
    random: fastrand::Rng,
    choose: C,
    arrived: VecDeque<usize>,
}

impl<C: Choose + 'static> Baseline<C> {
    fn boxed(random: fastrand::Rng, choose: C) -> Box<dyn Policy> {
        Box::new(Self { random, choose, arrived: VecDeque::new() })
    }
}

impl<C: Choose> Policy for Baseline<C> {
    fn arrive(&mut self, _now_ms: f64, request: usize, _cluster: &Cluster<'_>) -> Admission {
        self.arrived.push_back(request);
        Admission::Taken
    }

    fn next(&mut self, now_ms: f64, cluster: &Cluster<'_>) -> Option<Decision> {
        let request = self.arrived.pop_front()?;
        let decode_nodes = cluster.settings().decode_nodes;
        let random = &mut self.random;
        let decode = (decode_nodes > 0)
            .then(|| least(random, 0..decode_nodes, |at| cluster.promised_tokens(at) as f64));
        let prefill = (cluster.settings().prefill_nodes > 0)
            .then(|| self.choose.choose(Arrival { now_ms, request, cluster, random }));
        Some(Decision::Dispatch(Dispatch { request, prefill, decode, pull: None }))
    }
}

/// One of those with the least cost, at random.
fn least(
    random: &mut fastrand::Rng,
    nodes: impl Iterator<Item = usize>,
    cost: impl Fn(usize) -> f64,
) -> usize {
    let mut best = (f64::INFINITY, 0, 0_usize);
    for node in nodes {
        let cost = cost(node);
        if cost < best.0 {
            best = (cost, node, 1);
        } else if cost == best.0 {
            best.2 += 1;
            if random.usize(..best.2) == 0 {
                best.1 = node;
            }
        }
    }
    best.1
}
