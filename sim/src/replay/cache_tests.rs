use proptest::prelude::*;

use super::*;

/// The same by brute force: a list with the least recently used first.
struct Naive {
    capacity: usize,
    private: usize,
    blocks: Vec<u32>,
    pins: std::collections::BTreeMap<u32, u32>,
}

impl Naive {
    fn pinned(&self, block: u32) -> bool {
        self.pins.get(&block).is_some_and(|&pins| pins > 0)
    }

    fn renew(&mut self, blocks: &[u32]) {
        for block in blocks.iter().rev() {
            self.blocks.retain(|held| held != block);
            self.blocks.push(*block);
        }
    }

    fn evict(&mut self, room: usize) -> bool {
        while self.blocks.len() + self.private + room > self.capacity {
            let victim = self.blocks.iter().position(|&block| !self.pinned(block));
            let Some(victim) = victim else { return false };
            self.blocks.remove(victim);
        }
        true
    }

    fn insert(&mut self, blocks: &[u32]) {
        let held = blocks.iter().take_while(|block| self.blocks.contains(block)).count();
        blocks[..held].iter().for_each(|&block| *self.pins.entry(block).or_default() += 1);
        let mut end = held;
        while end < blocks.len() && self.evict(1) {
            self.blocks.push(blocks[end]);
            *self.pins.entry(blocks[end]).or_default() += 1;
            end += 1;
        }
        self.unpin(&blocks[..end]);
    }

    fn unpin(&mut self, blocks: &[u32]) {
        for block in blocks.iter().rev() {
            *self.pins.get_mut(block).unwrap() -= 1;
            if !self.pinned(*block) {
                self.renew(&[*block]);
            }
        }
    }
}

/// Prefixes of a few conversations: block `c * 100 + i` is the i-th of conversation c, and all
/// conversations share the block 0.
fn prefix() -> impl Strategy<Value = Vec<u32>> {
    (1_u32..5, 1_u32..9).prop_map(|(conversation, length)| {
        (0..length).map(|i| if i == 0 { 0 } else { conversation * 100 + i }).collect()
    })
}

proptest! {
    #[test]
    fn like_a_list_in_order_of_use(
        capacity in 0_usize..24,
        steps in prop::collection::vec((0_u8..4, prefix(), 0_usize..6), 1..80),
    ) {
        let mut cache = BlockCache::new(capacity);
        let (blocks, pins) = (Vec::new(), Default::default());
        let mut naive = Naive { capacity, private: 0, blocks, pins };
        let mut held: Vec<(Vec<u32>, usize)> = Vec::new();
        let mut known: Vec<u32> = Vec::new();
        for (kind, blocks, extra) in steps {
            let mut changes = Changes::default();
            match kind {
                0 => {
                    cache.insert(&blocks, &mut changes);
                    naive.insert(&blocks);
                }
                1 => {
                    let matched = cache.matched(&blocks);
                    cache.touch(&blocks[..matched]);
                    naive.renew(&blocks[..matched]);
                }
                2 => {
                    // A request: pins what is there, reserves the rest, then shares it.
                    let matched = cache.matched(&blocks);
                    cache.pin(&blocks[..matched]);
                    for &block in &blocks[..matched] {
                        *naive.pins.entry(block).or_default() += 1;
                    }
                    let need = blocks.len() - matched + extra;
                    let pinned = naive.blocks.iter().filter(|&&b| naive.pinned(b)).count();
                    let fits = pinned + naive.private + need <= capacity;
                    prop_assert_eq!(cache.reserve(need, &mut changes), fits);
                    if fits {
                        naive.evict(need);
                        naive.private += extra;
                        for &block in &blocks[matched..] {
                            if !naive.blocks.contains(&block) {
                                naive.blocks.push(block);
                            }
                            *naive.pins.entry(block).or_default() += 1;
                        }
                        cache.share(&blocks, matched, &mut changes);
                        held.push((blocks, extra));
                    } else {
                        cache.unpin(&blocks[..matched]);
                        naive.unpin(&blocks[..matched]);
                    }
                }
                _ => if let Some((blocks, extra)) = held.pop() {
                    cache.unpin(&blocks);
                    cache.release(extra);
                    naive.unpin(&blocks);
                    naive.private -= extra;
                },
            }
            prop_assert!(cache.used() <= capacity);
            prop_assert_eq!(cache.used(), naive.blocks.len() + naive.private);
            known.retain(|block| !changes.evicted.contains(block));
            known.extend(&changes.stored);
            let (mut expected, mut told) = (naive.blocks.clone(), known.clone());
            expected.sort_unstable();
            told.sort_unstable();
            prop_assert_eq!(&told, &expected);
            for block in &expected {
                prop_assert_eq!(cache.matched(&[*block]), 1);
            }
        }
    }
}
