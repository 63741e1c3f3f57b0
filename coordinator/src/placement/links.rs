//! Speeds of links between nodes, as transfers measure them.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::index::NodeKey;
use crate::node_map::Fnv;

/// Weight of one more transfer in the average of all links, and in that of its own.
const NOVELTY: f64 = 0.02;
const LINK_NOVELTY: f64 = 0.2;
/// One transfer counts as at most so many times as slow as was expected.
const MOST_SURPRISE: f64 = 10.0;
/// How long what was measured of a link is believed.
const MEMORY_MS: f64 = 60_000.0;
/// Most links that are told apart; others count as typical.
const MOST_LINKS: usize = 1 << 16;

/// By link. Tens of thousands in a large cluster, of which a placement asks for many.
type Measured = HashMap<(NodeKey, NodeKey), Speed, BuildHasherDefault<Fnv>>;

/// Milliseconds per byte of all links between the nodes of a model.
#[derive(Clone, Debug)]
pub(super) struct Links {
    measured: Measured,
    typical: Speed,
    prior: f64,
}

#[derive(Clone, Copy, Debug)]
struct Speed {
    ms_per_byte: f64,
    at: f64,
}

impl Speed {
    /// What was measured, or what is taken for granted when that is long ago: a link that is
    /// thought to be slow is not used, and would never be measured again.
    fn now(self, otherwise: f64, now: f64) -> f64 {
        let age = (now - self.at).max(0.0);
        otherwise + (self.ms_per_byte - otherwise) * (-age / MEMORY_MS).exp()
    }
}

impl Links {
    /// Links that take `prior` milliseconds per byte until they are measured.
    pub(super) fn new(prior: f64) -> Self {
        let typical = Speed { ms_per_byte: prior, at: 0.0 };
        Self { measured: Measured::default(), typical, prior }
    }

    /// So many bytes took so long, with so many other transfers at the same time.
    pub(super) fn observe(
        &mut self,
        link: (NodeKey, NodeKey),
        bytes: f64,
        ms: f64,
        others: u32,
        now: f64,
    ) {
        // A transfer without bytes says nothing of the link.
        if bytes < 1.0 {
            return;
        }
        let each = ms / bytes / (1.0 + f64::from(others));
        let learnt = |known: f64, novelty: f64| {
            let ms_per_byte = known + novelty * (each.min(MOST_SURPRISE * known) - known);
            Speed { ms_per_byte, at: now }
        };
        let own = learnt(self.at(now).ms_per_byte(link.0, link.1), LINK_NOVELTY);
        self.typical = learnt(self.typical.now(self.prior, now), NOVELTY);
        if self.measured.len() < MOST_LINKS || self.measured.contains_key(&link) {
            self.measured.insert(link, own);
        }
    }

    /// Their speeds at one time.
    pub(super) fn at(&self, now: f64) -> Speeds<'_> {
        let typical = self.typical.now(self.prior, now);
        Speeds { measured: &self.measured, typical, now }
    }

    /// A node is there no more.
    pub(super) fn forget(&mut self, node: NodeKey) {
        self.measured.retain(|&(from, to), _| from != node && to != node);
    }
}

/// Speeds of links at one time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speeds<'a> {
    measured: &'a Measured,
    typical: f64,
    now: f64,
}

impl Speeds<'_> {
    /// Milliseconds per byte from one node to another.
    pub(super) fn ms_per_byte(&self, from: NodeKey, to: NodeKey) -> f64 {
        let measured = self.measured.get(&(from, to));
        measured.map_or(self.typical, |speed| speed.now(self.typical, self.now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: (NodeKey, NodeKey) = (NodeKey(0), NodeKey(1));

    #[test]
    fn learns_a_slow_link_and_gives_it_another_chance() {
        let mut links = Links::new(1e-7);
        let speed = |links: &Links, (from, to): (NodeKey, NodeKey), now| {
            links.at(now).ms_per_byte(from, to)
        };
        for n in 0..50 {
            links.observe(LINK, 1e6, 1.0, 0, f64::from(n));
        }
        assert!((speed(&links, LINK, 50.0) / 1e-6 - 1.0).abs() < 0.1);
        let other = (NodeKey(2), NodeKey(1));
        assert!(speed(&links, other, 50.0) < 8e-7);
        assert!(speed(&links, LINK, 50.0 + 10.0 * MEMORY_MS) < 1.1e-7);
        links.forget(NodeKey(1));
        assert_eq!(speed(&links, LINK, 50.0), speed(&links, other, 50.0));
    }

    #[test]
    fn a_transfer_of_nothing_is_not_a_slow_one() {
        let mut links = Links::new(1e-7);
        (0..50).for_each(|n| links.observe(LINK, 0.0, 2.0, 0, f64::from(n)));
        assert_eq!(links.at(50.0).ms_per_byte(LINK.0, LINK.1), 1e-7);
    }

    #[test]
    fn shares_of_a_link_are_not_its_speed() {
        let mut links = Links::new(1e-7);
        (0..50).for_each(|n| links.observe(LINK, 1e6, 0.4, 3, f64::from(n)));
        assert!((links.at(50.0).ms_per_byte(LINK.0, LINK.1) / 1e-7 - 1.0).abs() < 0.01);
    }
}
