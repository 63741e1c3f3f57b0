//! Policies that look at nothing.

use super::{Choose, Cluster};

pub(super) struct Random;

#[derive(Default)]
pub(super) struct RoundRobin {
    next: usize,
}

impl Choose for Random {
    fn choose(
        &mut self,
        _now_ms: f64,
        _request: usize,
        cluster: &Cluster<'_>,
        random: &mut fastrand::Rng,
    ) -> usize {
        random.usize(..cluster.settings().prefill_nodes)
    }
}

impl Choose for RoundRobin {
    fn choose(
        &mut self,
        _now_ms: f64,
        _request: usize,
        cluster: &Cluster<'_>,
        _random: &mut fastrand::Rng,
    ) -> usize {
        let node = self.next % cluster.settings().prefill_nodes;
        self.next = node + 1;
        node
    }
}
