//! Policies that look at nothing.

use super::{Arrival, Choose};

pub(super) struct Random;

#[derive(Default)]
pub(super) struct RoundRobin {
    next: usize,
}

impl Choose for Random {
    fn choose(&mut self, Arrival { cluster, random, .. }: Arrival<'_>) -> usize {
        random.usize(..cluster.settings().prefill_nodes)
    }
}

impl Choose for RoundRobin {
    fn choose(&mut self, Arrival { cluster, .. }: Arrival<'_>) -> usize {
        let node = self.next % cluster.settings().prefill_nodes;
        self.next = node + 1;
        node
    }
}
