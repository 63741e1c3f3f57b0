//! The index against a naive model: per node and tier a set of blocks, of which whoever holds one
//! holds those before it.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// A block is its own and all earlier choices: `[1, 0]` comes after `[1]`.
type Block = Vec<u8>;

/// Nodes from this number have host memory too.
const FIRST_WITH_HOST: u32 = 3;
const NODES: u32 = 5;

fn hash(block: &[u8]) -> BlockHash {
    block.iter().fold(BlockHash([7; 16]), |parent, &choice| parent.child(&[choice.into()]))
}

fn hashes<'a>(blocks: impl IntoIterator<Item = &'a Block>) -> Vec<BlockHash> {
    blocks.into_iter().map(|block| hash(block)).collect()
}

fn chain(last: &[u8]) -> Vec<Block> {
    (1..=last.len()).map(|length| last[..length].to_vec()).collect()
}

/// A block that no other test names.
fn single(number: u32) -> BlockHash {
    BlockHash([9; 16]).child(&[number])
}

fn tier_of(node: u32) -> Tier {
    if node < FIRST_WITH_HOST { Tier::Device } else { Tier::Host }
}

#[derive(Clone, Debug)]
enum Op {
    Join(u32),
    Leave(u32),
    Store { node: u32, last: Block, lost: bool },
    Drop { node: u32, which: usize, tier: Tier, lost: bool },
    Snapshot { node: u32, part: usize },
    Match(Block),
    Sweep(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let node = || 0..NODES;
    // Few branches, so that nodes share much; many lengths.
    let block = || proptest::collection::vec(prop_oneof![6 => Just(0_u8), 1 => Just(1)], 1..24);
    let lost = || proptest::bool::weighted(0.05);
    let tier = prop_oneof![Just(Tier::Device), Just(Tier::Host)];
    let op = prop_oneof![
        2 => node().prop_map(Op::Join),
        1 => node().prop_map(Op::Leave),
        8 => (node(), block(), lost()).prop_map(|(node, last, lost)| Op::Store { node, last, lost }),
        8 => (node(), 0..100_usize, tier, lost())
            .prop_map(|(node, which, tier, lost)| Op::Drop { node, which, tier, lost }),
        4 => (node(), 1..9_usize).prop_map(|(node, part)| Op::Snapshot { node, part }),
        8 => block().prop_map(Op::Match),
        1 => (0..2000_usize).prop_map(Op::Sweep),
    ];
    proptest::collection::vec(op, 1..150)
}

/// The blocks of both tiers, as [`Tier`] counts them: whatever is in device memory is in both.
#[derive(Clone, Default)]
struct Cache {
    device: BTreeSet<Block>,
    all: BTreeSet<Block>,
}

/// A node as it really is, and what of it the coordinator can know.
#[derive(Default)]
struct Real {
    cache: Cache,
    sequence: u64,
    joined: bool,
    /// What the coordinator should believe; `None` until a snapshot.
    known: Option<Cache>,
    /// An event was lost since.
    missed: bool,
}

struct World {
    index: Index,
    found: Matches,
    real: BTreeMap<u32, Real>,
}

impl World {
    fn new(cap: usize) -> Self {
        let real = (0..NODES).map(|node| (node, Real::default())).collect();
        Self { index: Index::new(cap), found: Matches::default(), real }
    }

    fn naive(&self, blocks: &[Block]) -> BTreeMap<NodeKey, Held> {
        let length =
            |held: &BTreeSet<Block>| blocks.iter().take_while(|b| held.contains(*b)).count();
        let known = self.real.iter().filter_map(|(&n, r)| Some((NodeKey(n), r.known.as_ref()?)));
        let held = |cache: &Cache| Held {
            device_blocks: length(&cache.device),
            blocks: length(&cache.all),
        };
        known.map(|(n, cache)| (n, held(cache))).filter(|(_, held)| held.blocks > 0).collect()
    }

    fn longest(&mut self, blocks: &[Block]) -> BTreeMap<NodeKey, Held> {
        self.index.longest(&hashes(blocks), &mut self.found);
        self.found.iter().collect()
    }

    fn event(&mut self, node: u32, tier: Tier, stored: &[Block], removed: &[Block], lost: bool) {
        let real = self.real.get_mut(&node).unwrap();
        real.sequence += 1;
        let change = |cache: &mut Cache| {
            cache.device.retain(|block| !removed.contains(block));
            if tier == Tier::Host || tier_of(node) == Tier::Device {
                cache.all.retain(|block| !removed.contains(block));
            }
            cache.device.extend(stored.iter().cloned());
            cache.all.extend(stored.iter().cloned());
        };
        change(&mut real.cache);
        if lost {
            real.missed = true;
            return;
        }
        let gap = real.joined && real.known.is_some() && real.missed;
        real.known = real.known.take().filter(|_| !real.missed);
        real.known.iter_mut().for_each(change);
        // In parts, as a driver that must not be held up hears it.
        let (stored, removed) = (hashes(stored), hashes(removed));
        let (key, sequence) = (NodeKey(node), real.sequence);
        let mut heard = vec![];
        for part in removed.chunks(3) {
            heard.push(self.index.event(key, sequence, tier, &[], part));
        }
        for part in stored.chunks(3) {
            heard.push(self.index.event(key, sequence, tier, part, &[]));
        }
        let asked = heard.iter().filter(|&&heard| heard == Heard::NeedSnapshot).count();
        assert_eq!(asked, usize::from(gap), "a gap asks for a snapshot, once");
    }

    fn snapshot(&mut self, node: u32, part: usize) {
        let real = self.real.get_mut(&node).unwrap();
        let (key, sequence) = (NodeKey(node), real.sequence);
        let Cache { device, all } = &real.cache;
        for part in hashes(all.difference(device)).chunks(part) {
            self.index.snapshot(key, sequence, Tier::Host, part, false);
        }
        for part in hashes(device).chunks(part) {
            self.index.snapshot(key, sequence, Tier::Device, part, false);
        }
        self.index.snapshot(key, sequence, Tier::Device, &[], true);
        real.known = real.joined.then(|| real.cache.clone());
        real.missed = false;
    }

    /// True if it looked something up, and found this, and this is in the naive model.
    fn apply(&mut self, op: &Op) -> Option<[BTreeMap<NodeKey, Held>; 2]> {
        match op {
            Op::Join(node) => {
                self.index.join(NodeKey(*node), tier_of(*node));
                self.real.insert(*node, Real { joined: true, ..Real::default() });
            }
            Op::Leave(node) => {
                self.index.leave(NodeKey(*node));
                self.real.insert(*node, Real::default());
            }
            Op::Store { node, last, lost } => {
                self.event(*node, Tier::Device, &chain(last), &[], *lost);
            }
            Op::Drop { node, which, tier, lost } => {
                let Cache { device, all } = &self.real[node].cache;
                let on_device_only = *tier == Tier::Device || tier_of(*node) == Tier::Device;
                let held = if on_device_only { device } else { all };
                let leaf = |b: &&Block| !held.iter().any(|c| c.len() > b.len() && c.starts_with(b));
                let leaves: Vec<Block> = held.iter().filter(leaf).cloned().collect();
                if !leaves.is_empty() {
                    let leaf = leaves[which % leaves.len()].clone();
                    self.event(*node, *tier, &[], &[leaf], *lost);
                }
            }
            Op::Snapshot { node, part } => self.snapshot(*node, *part),
            Op::Match(last) => {
                let blocks = chain(last);
                let (all, skipped) = (self.longest(&blocks), blocks.len() / 3);
                self.index.longest_beyond(&hashes(&blocks), skipped, &mut self.found);
                let mut beyond: BTreeMap<_, _> = self.found.iter().collect();
                for (node, held) in &all {
                    // Device memory may end before, and the host's go on.
                    let more = beyond.get_mut(node).filter(|_| held.device_blocks <= skipped);
                    more.into_iter().for_each(|more| more.device_blocks = held.device_blocks);
                }
                let more = all.iter().filter(|(_, held)| held.blocks > skipped);
                if self.index.max_blocks > 1000 {
                    assert_eq!(beyond, more.map(|(&node, &held)| (node, held)).collect());
                }
                return Some([all, self.naive(&blocks)]);
            }
            Op::Sweep(steps) => self.index.sweep(*steps),
        }
        None
    }
}

proptest! {
    #[test]
    fn matches_are_those_of_a_naive_model(ops in ops()) {
        let mut world = World::new(100_000);
        for op in &ops {
            if let Some([found, naive]) = world.apply(op) {
                prop_assert_eq!(found, naive);
            }
            for (&node, real) in &world.real {
                let known = real.known.as_ref().map_or(0, |cache| cache.all.len());
                prop_assert_eq!(world.index.blocks_of(NodeKey(node)), known as u64);
            }
        }
        // Once every node has left, the hand leaves nothing behind.
        (0..NODES).for_each(|node| world.index.leave(NodeKey(node)));
        world.index.sweep(100_000);
        prop_assert_eq!(world.index.len(), 0);
        prop_assert_eq!(world.index.pairs(), 0);
        prop_assert_eq!(world.index.lives.stale(), 0);
        prop_assert_eq!(world.index.sets.len(), 0);
    }

    #[test]
    fn at_the_cap_matches_are_only_ever_shorter(ops in ops(), cap in 1..60_usize) {
        let mut world = World::new(cap);
        for op in &ops {
            if let Some([found, naive]) = world.apply(op) {
                for (node, held) in found {
                    let all = naive.get(&node).copied().unwrap_or_default();
                    prop_assert!(held.blocks <= all.blocks);
                    prop_assert!(held.device_blocks <= all.device_blocks);
                }
            }
            prop_assert!(world.index.len() <= cap);
        }
    }
}

/// An index of `cap` blocks that follows `nodes` nodes.
fn following(cap: usize, nodes: u32) -> Index {
    let mut index = Index::new(cap);
    for node in 0..nodes {
        index.join(NodeKey(node), Tier::Device);
        index.snapshot(NodeKey(node), 0, Tier::Device, &[], true);
    }
    index
}

fn store(index: &mut Index, node: u32, stored: &[BlockHash]) {
    // The number that it has already: a further part of the same event.
    assert_eq!(index.event(NodeKey(node), 0, Tier::Device, stored, &[]), Heard::Fine);
}

#[test]
fn what_is_matched_outlives_what_is_not() {
    let (mut index, mut found) = (following(4, 1), Matches::default());
    let prompt = [single(1), single(2)];
    store(&mut index, 0, &prompt);
    for other in 10..60 {
        index.longest(&prompt, &mut found);
        assert_eq!(found.of(NodeKey(0)), Held { device_blocks: 2, blocks: 2 });
        store(&mut index, 0, &[single(other)]);
    }
}

#[test]
fn a_long_prompt_that_is_asked_for_stays_whole_enough_at_the_cap() {
    let (mut index, mut found) = (following(2000, 2), Matches::default());
    let prompt: Vec<_> = (0..1000).map(single).collect();
    store(&mut index, 0, &prompt);
    for other in 0..20_000 {
        if other % 20 == 0 {
            index.longest(&prompt, &mut found);
        }
        store(&mut index, other % 2, &[single(1_000_000 + other)]);
    }
    index.longest(&prompt, &mut found);
    assert_eq!(found.of(NodeKey(0)).blocks, 1000);
}

#[test]
fn a_large_cache_does_not_push_out_a_small_one() {
    let (mut index, mut found) = (following(1000, 2), Matches::default());
    let small: Vec<_> = (0..400).map(single).collect();
    store(&mut index, 1, &small);
    (1000..50_000).for_each(|other| store(&mut index, 0, &[single(other)]));
    index.longest(&small, &mut found);
    assert_eq!(found.of(NodeKey(1)).blocks, 400);
    assert_eq!((index.blocks_of(NodeKey(0)), index.blocks_of(NodeKey(1))), (600, 400));
}

#[test]
fn a_block_that_all_nodes_have_costs_little_more_than_one() {
    let (nodes, blocks) = (1000, 500);
    let mut index = following(1_000_000, nodes);
    let own = index.bytes();
    let prompt: Vec<_> = (0..blocks).map(single).collect();
    (0..nodes).for_each(|node| store(&mut index, node, &prompt));
    assert_eq!(index.pairs(), u64::from(nodes * blocks));
    assert!(index.bytes() - own < 100_000, "{} bytes", index.bytes() - own);
    let mut found = Matches::default();
    index.longest(&prompt, &mut found);
    assert_eq!(found.iter().filter(|(_, held)| held.blocks == 500).count(), 1000);
}

#[test]
fn memory_stays_the_same_while_caches_turn_over() {
    let (nodes, blocks) = (20_u32, 2000_u32);
    let mut index = following(100_000, nodes);
    let apply = |index: &mut Index, round: u32| {
        for node in 0..nodes {
            // Half of what it holds is what its neighbour holds too.
            let hash = |round: u32| single((node + round) % 2 * (node + 1) + 50 * round);
            let removed = (round >= blocks).then(|| hash(round - blocks));
            let removed = removed.as_slice();
            let heard = index.event(NodeKey(node), 0, Tier::Device, &[hash(round)], removed);
            assert_eq!(heard, Heard::Fine);
        }
    };
    // Until each part of the table has been as full as it gets.
    (0..10 * blocks).for_each(|round| apply(&mut index, round));
    let (before, pairs) = (index.bytes(), index.pairs());
    (10 * blocks..40 * blocks).for_each(|round| apply(&mut index, round));
    assert_eq!(index.pairs(), pairs);
    assert!(index.bytes() < before * 5 / 4, "{before} bytes, then {}", index.bytes());
}

#[test]
fn memory_is_at_most_what_the_cap_allows() {
    let (cap, nodes) = (100_000, 50_u32);
    let mut index = following(cap, nodes);
    let mut found = Matches::default();
    for number in 0..600_000_u32 {
        // More different sets of holders than there is room for.
        let block = single(number.wrapping_mul(2_654_435_761) % 150_000);
        store(&mut index, number % nodes, &[block]);
        if number % 3 == 0 {
            index.longest(&[block], &mut found);
        }
    }
    assert_eq!(index.len(), cap);
    assert!(index.bytes() <= cap * BYTES_PER_BLOCK, "{} bytes", index.bytes());
}

#[test]
fn many_lives_of_many_nodes_take_bounded_memory() {
    let (mut index, mut found) = (Index::new(1000), Matches::default());
    let mut bytes = 0;
    for life in 0..40_000_u32 {
        if life == 20_000 {
            bytes = index.bytes();
        }
        let node = NodeKey(life % 70);
        index.join(node, Tier::Device);
        index.snapshot(node, 1, Tier::Device, &[single(1), single(life % 250 + 2)], true);
    }
    assert!(index.bytes() <= bytes, "{bytes} bytes, then {}", index.bytes());
    index.longest(&[single(1)], &mut found);
    assert_eq!(found.iter().count(), 70);
    index.sweep(100_000);
    assert_eq!((index.lives.stale(), index.pairs()), (0, 140));
}

#[test]
fn a_chain_with_other_holders_at_every_block_is_searched_for_a_bounded_time() {
    let nodes = 900_u32;
    let (mut index, mut found) = (following(100_000, nodes), Matches::default());
    let prompt: Vec<_> = (0..2 * nodes).map(single).collect();
    for node in 0..nodes {
        store(&mut index, node, &prompt[..2 * node as usize]);
    }
    index.longest(&prompt, &mut found);
    for node in 0..nodes {
        let held = found.of(NodeKey(node)).blocks;
        assert!(held <= 2 * node as usize);
        assert!(node > 100 || held == 2 * node as usize);
    }
}
