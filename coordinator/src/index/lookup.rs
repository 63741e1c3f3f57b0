//! How much of a chain each node holds.
//!
//! Caches evict leaves first, so whoever holds a block holds all blocks before it, and the holders
//! along a chain only ever become fewer. They change a few times in thousands of blocks, and these
//! places are found by doubling steps and then by parts, instead of asking for every block. A block is
//! as a rule in no cache of the processor, so several are read at a time.
//!
//! A block that is missing in between was forgotten at the cap: the blocks behind it tell who has it.

use baton_proto::hash::BlockHash;

use super::holders::Holders;
use super::matches::Matches;
use super::{Index, key};

/// Blocks asked for per lookup; what lies deeper in a chain with more changes counts for nobody.
const MAX_PROBES: usize = 1024;
/// Blocks that are read at a time.
const LANES: usize = 8;
/// Blocks asked for in place of a missing one.
const BRIDGE: usize = 4;
/// A lookup keeps every so many blocks that are held from being forgotten, each time others.
const MARK_EVERY: usize = 32;

/// The last block of the chain with these holders.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    holders: Holders,
    last: usize,
}

impl Index {
    /// How many leading blocks of `chain` each node holds. Takes time in the logarithm of its length
    /// and in the number of nodes that hold its first block.
    pub fn longest(&mut self, chain: &[BlockHash], found: &mut Matches) {
        self.longest_beyond(chain, 0, found);
    }

    /// The same of the nodes that hold more than the first `skipped` blocks, when those that hold no
    /// more are of no interest and many.
    pub fn longest_beyond(&mut self, chain: &[BlockHash], skipped: usize, found: &mut Matches) {
        found.clear();
        let mut runs = std::mem::take(&mut self.runs);
        self.runs_of(chain, skipped, &mut runs);
        if let Some(last) = runs.last().map(|run| run.last) {
            self.keep(&chain[..=last]);
        }
        // From the deepest: whoever holds that holds the others too.
        for run in runs.drain(..).rev() {
            self.count(run, found);
        }
        self.runs = runs;
    }

    fn runs_of(&mut self, chain: &[BlockHash], skipped: usize, runs: &mut Vec<Run>) {
        let mut search = Search { index: self, chain, probes: 0 };
        let mut next = search.first(skipped, chain.len());
        while let Some((at, holders)) = next {
            let last = search.last_with(holders, at);
            runs.push(Run { holders, last });
            next = search.first(last + 1, chain.len());
        }
    }

    /// Marks some of the blocks, when the index is so full that the others are forgotten.
    fn keep(&mut self, held: &[BlockHash]) {
        if self.len() < self.max_blocks / 2 {
            return;
        }
        self.lookups = self.lookups.wrapping_add(1);
        for lanes in held[(self.lookups % MARK_EVERY).min(held.len())..].chunks(LANES * MARK_EVERY)
        {
            let marked = || lanes.iter().step_by(MARK_EVERY);
            marked().for_each(|hash| self.table.touch(key(hash)));
            marked().for_each(|hash| {
                self.probe(hash);
            });
        }
    }

    /// The holders of a block, which is marked as asked for.
    fn probe(&mut self, hash: &BlockHash) -> Option<Holders> {
        let at = self.table.find(key(hash))?;
        let (_, packed) = self.table.entry(at)?;
        let (holders, marked) = Holders::unpack(packed);
        if !marked {
            self.table.set(at, holders.pack(true));
        }
        Some(holders)
    }

    fn count(&self, run: Run, found: &mut Matches) {
        self.sets.each(run.holders, |mut chunk| {
            let at = chunk.at as usize;
            if found.seen.len() <= at {
                found.seen.resize(at + 1, 0);
            }
            chunk.bits &= self.lives.live(chunk.at) & !found.seen[at];
            found.seen[at] |= chunk.bits;
            chunk.each(|slot| {
                if let Some((node, tier)) = self.lives.owner(slot) {
                    found.raise(node, tier, run.last + 1);
                }
            });
        });
    }
}

struct Search<'a> {
    index: &'a mut Index,
    chain: &'a [BlockHash],
    probes: usize,
}

impl Search<'_> {
    /// The last block that has the same holders as the one at `from`.
    fn last_with(&mut self, holders: Holders, from: usize) -> usize {
        let (mut last, mut end, mut step) = (from, self.chain.len(), 1_usize);
        while last + 1 < end {
            // Doubling steps until the first block with others is found, then equal parts.
            let (begin, parts) = (last, (end - last - 1).min(LANES));
            let lane = |lane: usize| {
                let part = (end - begin - 1) * (lane + 1) / parts;
                begin + part.min(step.saturating_mul(1 << lane))
            };
            let lanes: [usize; LANES] = std::array::from_fn(|at| lane(at.min(parts - 1)));
            lanes.iter().for_each(|&at| self.index.table.touch(key(&self.chain[at])));
            for at in lanes.into_iter().take(parts) {
                match self.first(at, end) {
                    Some((at, others)) if others == holders => last = at,
                    _ => {
                        (end, step) = (at, usize::MAX);
                        break;
                    }
                }
            }
            step = step.saturating_mul(1 << LANES);
        }
        last
    }

    /// The first known block from `from`, near it and before `end`, and its holders.
    fn first(&mut self, from: usize, end: usize) -> Option<(usize, Holders)> {
        let end = end.min(from + BRIDGE);
        for at in from..end {
            if at == from + 1 {
                let missing = &self.chain[at..end];
                missing.iter().for_each(|hash| self.index.table.touch(key(hash)));
            }
            if self.probes == MAX_PROBES {
                return None;
            }
            self.probes += 1;
            if let Some(holders) = self.index.probe(&self.chain[at]) {
                return Some((at, holders));
            }
        }
        None
    }
}
