//! KV on its way: every node has one link in and one out, shared evenly by what runs over it.

use std::collections::BTreeMap;

use super::Node;

/// Transfers in progress.
#[derive(Debug)]
pub(super) struct Network {
    /// Of each link, each way.
    bytes_per_ms: f64,
    now_ms: f64,
    flows: BTreeMap<u64, Flow>,
    next: u64,
    sending: BTreeMap<Node, u32>,
    receiving: BTreeMap<Node, u32>,
}

#[derive(Debug)]
struct Flow {
    from: Node,
    to: Node,
    bytes: f64,
    rate: f64,
}

impl Network {
    /// `gbps` in gigabits per second.
    pub(super) fn new(gbps: f64) -> Self {
        Self {
            bytes_per_ms: gbps * 1e9 / 8.0 / 1000.0,
            now_ms: 0.0,
            flows: BTreeMap::new(),
            next: 0,
            sending: BTreeMap::new(),
            receiving: BTreeMap::new(),
        }
    }

    /// Begins a transfer and returns its number.
    pub(super) fn begin(&mut self, now_ms: f64, from: Node, to: Node, bytes: f64) -> u64 {
        self.advance(now_ms);
        let number = self.next;
        self.next += 1;
        self.flows.insert(number, Flow { from, to, bytes, rate: 0.0 });
        *self.sending.entry(from).or_default() += 1;
        *self.receiving.entry(to).or_default() += 1;
        self.share();
        number
    }

    /// When the next transfer ends, if nothing else begins.
    pub(super) fn next_end_ms(&self) -> Option<f64> {
        self.next_end().map(|(end, _)| end)
    }

    /// Ends the transfer that ends next, which must be now, and returns its number.
    pub(super) fn end(&mut self, now_ms: f64) -> Option<u64> {
        let (_, number) = self.next_end()?;
        self.advance(now_ms);
        let flow = self.flows.remove(&number)?;
        for (links, node) in [(&mut self.sending, flow.from), (&mut self.receiving, flow.to)] {
            if let Some(count) = links.get_mut(&node) {
                *count -= 1;
            }
        }
        self.share();
        Some(number)
    }

    fn next_end(&self) -> Option<(f64, u64)> {
        let ends = self.flows.iter().map(|(&n, flow)| (self.now_ms + flow.bytes / flow.rate, n));
        ends.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    fn advance(&mut self, now_ms: f64) {
        for flow in self.flows.values_mut() {
            flow.bytes = (flow.bytes - flow.rate * (now_ms - self.now_ms)).max(0.0);
        }
        self.now_ms = now_ms;
    }

    fn share(&mut self) {
        for flow in self.flows.values_mut() {
            let busiest = self.sending[&flow.from].max(self.receiving[&flow.to]);
            flow.rate = self.bytes_per_ms / f64::from(busiest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_shared_while_two_use_it() {
        let mut network = Network::new(8.0); // 1e6 bytes per ms
        let (p, q, d) = (Node::Prefill(0), Node::Prefill(1), Node::Decode(0));
        let first = network.begin(0.0, p, d, 4e6);
        assert_eq!(network.next_end_ms(), Some(4.0));
        let second = network.begin(2.0, q, d, 1e6); // 2e6 left of the first, half speed for both
        assert_eq!(network.next_end_ms(), Some(4.0));
        assert_eq!(network.end(4.0), Some(second));
        assert_eq!(network.next_end_ms(), Some(5.0)); // 1e6 left at full speed
        assert_eq!(network.end(5.0), Some(first));
        assert_eq!(network.next_end_ms(), None);
    }
}
