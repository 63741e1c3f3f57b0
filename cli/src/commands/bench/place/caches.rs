//! The prefix caches of simulated nodes: full, and turning over prompt by prompt, leaves first.

use std::collections::{HashMap, VecDeque};

use baton_proto::hash::BlockHash;

use super::prompts::{PARTS, Prompts, Segment};

/// What changed in a cache.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) stored: Vec<BlockHash>,
    pub(super) removed: Vec<BlockHash>,
}

/// One node's cache.
#[derive(Default)]
pub(super) struct Cache {
    /// Most blocks.
    capacity: usize,
    /// Blocks that it holds now.
    blocks: usize,
    /// Numbers of the prompts that it is given, over and over.
    prompts: Vec<usize>,
    given: usize,
    /// Prompts that it holds, the oldest first, in segments.
    held: VecDeque<Vec<Segment>>,
    /// How many prompts of `held` each segment is part of.
    uses: HashMap<Segment, u32>,
    /// Segments not stored yet, and how much of the first is.
    coming: VecDeque<Segment>,
    came: u32,
    /// A segment that is being removed, and how much of it is left.
    going: Option<(Segment, u32)>,
}

/// Caches of `nodes` nodes with `blocks` blocks in all. Prompts of one conversation go to one node.
pub(super) fn caches(prompts: &Prompts, nodes: usize, blocks: usize) -> Vec<Cache> {
    let capacity = blocks.div_ceil(nodes);
    let mut caches: Vec<_> = (0..nodes).map(|_| Cache { capacity, ..Cache::default() }).collect();
    let conversations =
        (0..prompts.len()).filter_map(|number| Some((number, prompts.conversation(number)?)));
    let conversations: Vec<_> = conversations.collect();
    for &(number, conversation) in &conversations {
        caches[conversation as usize % nodes].prompts.push(number);
    }
    for (at, cache) in caches.iter_mut().enumerate() {
        if cache.prompts.is_empty() {
            cache.prompts.push(conversations[at % conversations.len()].0);
        }
        while cache.blocks < capacity {
            cache.store(prompts);
        }
    }
    caches
}

impl Cache {
    /// Everything that it holds.
    pub(super) fn all(&self) -> Vec<BlockHash> {
        let whole = |segment: &Segment| !self.coming.contains(segment);
        let segments = self.uses.keys().copied().filter(whole).map(|segment| (segment, PARTS));
        let first = self.coming.front().map(|&segment| (segment, self.came));
        let parts = segments.chain(first).chain(self.going);
        parts.flat_map(|(segment, parts)| (0..parts).map(move |part| segment.block(part))).collect()
    }

    /// A prompt that it holds.
    pub(super) fn prompt(&self, chance: u64) -> &[Segment] {
        &self.held[chance as usize % self.held.len()]
    }

    /// Stores the next `blocks` blocks and removes as many.
    pub(super) fn turn_over(&mut self, prompts: &Prompts, blocks: usize) -> Change {
        let mut change = Change::default();
        for _ in 0..blocks {
            change.removed.extend((self.blocks >= self.capacity).then(|| self.remove()).flatten());
            change.stored.push(self.store(prompts));
        }
        change
    }

    fn store(&mut self, prompts: &Prompts) -> BlockHash {
        while self.coming.is_empty() {
            self.take_prompt(prompts);
        }
        let segment = self.coming[0];
        let block = segment.block(self.came);
        self.came += 1;
        if self.came == PARTS {
            self.came = 0;
            self.coming.pop_front();
        }
        self.blocks += 1;
        block
    }

    fn take_prompt(&mut self, prompts: &Prompts) {
        let (round, at) = (self.given / self.prompts.len(), self.given % self.prompts.len());
        self.given += 1;
        let number = round * prompts.len() + self.prompts[at];
        // So that what is removed is never what is being stored.
        let most = self.capacity / PARTS as usize / 2;
        let segments: Vec<_> = prompts.segments(number).take(most.max(1)).collect();
        for &segment in &segments {
            let uses = self.uses.entry(segment).or_insert(0);
            *uses += 1;
            if *uses == 1 {
                self.coming.push_back(segment);
            }
        }
        self.held.push_back(segments);
    }

    /// Removes the last block of the oldest prompt that no other prompt has.
    fn remove(&mut self) -> Option<BlockHash> {
        while self.going.is_none() {
            let oldest = self.held.front_mut()?;
            match oldest.pop() {
                None => drop(self.held.pop_front()),
                Some(segment) => {
                    let uses = self.uses.get_mut(&segment)?;
                    *uses -= 1;
                    if *uses == 0 {
                        self.uses.remove(&segment);
                        self.going = Some((segment, PARTS));
                    }
                }
            }
        }
        let (segment, left) = self.going.take()?;
        self.blocks -= 1;
        self.going = (left > 1).then_some((segment, left - 1));
        Some(segment.block(left - 1))
    }
}
