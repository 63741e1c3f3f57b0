//! The index against a naive model.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::testing::node;

fn hash(number: u8) -> BlockHash {
    BlockHash([number; 16])
}

fn hashes(numbers: &[u8]) -> Vec<BlockHash> {
    numbers.iter().map(|&number| hash(number)).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Join(u8),
    Leave(u8),
    Event { node: u8, stored: Vec<u8>, removed: Vec<u8>, lost: bool },
    Snapshot { node: u8, parts: usize },
    Match(Vec<u8>),
    Sweep(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let block = 0..40_u8;
    let blocks = || proptest::collection::vec(block.clone(), 0..8);
    let op = prop_oneof![
        1 => (0..4_u8).prop_map(Op::Join),
        1 => (0..4_u8).prop_map(Op::Leave),
        6 => (0..4_u8, blocks(), blocks(), proptest::bool::weighted(0.1))
            .prop_map(|(node, stored, removed, lost)| Op::Event { node, stored, removed, lost }),
        3 => (0..4_u8, 1..4_usize).prop_map(|(node, parts)| Op::Snapshot { node, parts }),
        6 => blocks().prop_map(Op::Match),
        1 => (0..100_usize).prop_map(Op::Sweep),
    ];
    proptest::collection::vec(op, 1..120)
}

/// A node as it really is, and what of it the coordinator can know.
#[derive(Default)]
struct Real {
    held: BTreeSet<u8>,
    sequence: u64,
    joined: bool,
    /// What the coordinator should believe; `None` until a snapshot.
    known: Option<BTreeSet<u8>>,
    /// An event was lost since.
    missed: bool,
}

fn name(number: u8) -> NodeId {
    node(&format!("n{number}"))
}

fn naive(real: &BTreeMap<u8, Real>, chain: &[u8]) -> BTreeMap<NodeId, usize> {
    let known = |real: &Real| real.known.clone().filter(|_| real.joined);
    let known = real.iter().filter_map(|(&n, r)| Some((name(n), known(r)?)));
    let length = |held: &BTreeSet<u8>| chain.iter().take_while(|&b| held.contains(b)).count();
    known.map(|(n, held)| (n, length(&held))).filter(|&(_, length)| length > 0).collect()
}

fn apply(index: &mut Index, real: &mut BTreeMap<u8, Real>, op: &Op) {
    match op {
        Op::Join(n) => {
            index.join(&name(*n));
            *real.entry(*n).or_default() = Real { joined: true, ..Real::default() };
        }
        Op::Leave(n) => {
            index.leave(&name(*n));
            real.insert(*n, Real::default());
        }
        Op::Event { node, stored, removed, lost } => {
            let r = real.entry(*node).or_default();
            r.sequence += 1;
            let change = |held: &mut BTreeSet<u8>| {
                held.retain(|block| !removed.contains(block));
                held.extend(stored);
            };
            change(&mut r.held);
            if *lost {
                r.missed = true;
                return;
            }
            let (stored, removed) = (hashes(stored), hashes(removed));
            let heard = index.event(&name(*node), r.sequence, &stored, &removed);
            let gap = r.joined && r.known.is_some() && r.missed;
            assert_eq!(heard == Heard::NeedSnapshot, gap, "a gap asks for a snapshot, once");
            r.known = r.known.take().filter(|_| !r.missed);
            r.known.iter_mut().for_each(change);
        }
        Op::Snapshot { node, parts } => {
            let r = real.entry(*node).or_default();
            let all: Vec<u8> = r.held.iter().copied().collect();
            let size = all.len().div_ceil(*parts).max(1);
            let chunks: Vec<&[u8]> = all.chunks(size).collect();
            for (i, part) in chunks.iter().enumerate() {
                index.snapshot(&name(*node), r.sequence, &hashes(part), i + 1 == chunks.len());
            }
            if chunks.is_empty() {
                index.snapshot(&name(*node), r.sequence, &[], true);
            }
            (r.known, r.missed) = (r.joined.then(|| r.held.clone()), false);
        }
        Op::Match(chain) => {
            let found: BTreeMap<_, _> = index.longest(&hashes(chain)).into_iter().collect();
            assert_eq!(found, naive(real, chain));
        }
        Op::Sweep(steps) => index.sweep(*steps),
    }
}

proptest! {
    #[test]
    fn matches_are_those_of_a_naive_model(ops in ops()) {
        let (mut index, mut real) = (Index::new(1000), BTreeMap::new());
        for op in &ops {
            apply(&mut index, &mut real, op);
            for (&n, r) in &real {
                let known = r.known.as_ref().filter(|_| r.joined).map_or(0, BTreeSet::len);
                prop_assert_eq!(index.blocks_of(&name(n)), known as u64);
            }
        }
        // Once every node has left, the hand leaves nothing behind.
        (0..4).for_each(|n| index.leave(&name(n)));
        index.sweep(1000);
        prop_assert_eq!(index.len(), 0);
        prop_assert_eq!(index.stale, 0);
    }

    #[test]
    fn at_the_cap_matches_are_only_ever_shorter(ops in ops(), cap in 1..20_usize) {
        let (mut index, mut real) = (Index::new(cap), BTreeMap::new());
        for op in &ops {
            if let Op::Match(chain) = op {
                let all = naive(&real, chain);
                for (node, length) in index.longest(&hashes(chain)) {
                    prop_assert!(length <= all.get(&node).copied().unwrap_or(0));
                }
            } else {
                apply(&mut index, &mut real, op);
            }
            prop_assert!(index.len() <= cap && index.entries.len() <= cap);
        }
    }
}

#[test]
fn what_is_matched_outlives_what_is_not() {
    let mut index = Index::new(4);
    index.join(&name(0));
    index.snapshot(&name(0), 0, &hashes(&[1, 2]), true);
    for other in 10..60 {
        assert_eq!(index.longest(&hashes(&[1, 2])), [(name(0), 2)]);
        assert_eq!(index.event(&name(0), u64::from(other) - 9, &[hash(other)], &[]), Heard::Fine);
    }
}

#[test]
fn many_lives_of_many_nodes_take_bounded_memory() {
    let mut index = Index::new(100);
    for life in 0..10_000_u32 {
        let name = node(&format!("n{}", life % 70));
        index.join(&name);
        index.snapshot(&name, 1, &hashes(&[1, (life % 250) as u8]), true);
    }
    assert!(index.slots.len() <= MAX_SLOTS);
    assert_eq!(index.longest(&[hash(1)]).len(), 70);
}
