//! Blocks that nodes do not hold yet, and will once they have done what they were asked for.
//!
//! A request that shares its prompt with one that still waits should go where that one goes. What
//! nodes say of their caches comes too late for that, so the blocks of every placed request are
//! expected on its node until that node has had time to tell. Only every so many blocks are kept
//! of each request: an estimate is enough here.

use std::collections::VecDeque;

use baton_proto::hash::BlockHash;
use smallvec::SmallVec;

use crate::block_map::BlockMap;
use crate::index::NodeKey;

/// Tokens between blocks that are kept.
const STRIDE_TOKENS: usize = 256;
/// How long the blocks of a request are expected after it was sent to its node.
const PATIENCE_MS: f64 = 30_000.0;
/// Most blocks expected of requests that were sent; beyond it the oldest are forgotten.
const MOST_SENT: usize = 1 << 18;

/// See the module's description. Pure; times are milliseconds of the caller's clock.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    /// A block's nodes, each with the number of requests that will bring it there.
    blocks: BlockMap<SmallVec<[(NodeKey, u32); 2]>>,
    /// Requests that were sent, with the time until which their blocks are expected.
    sent: VecDeque<(f64, Nodes, Sampled)>,
    /// Blocks of all of them.
    sent_blocks: usize,
}

/// One node that will have a request's blocks, or two.
pub(super) type Nodes = [Option<NodeKey>; 2];

/// Every so many blocks of a chain.
pub(super) type Sampled = Box<[BlockHash]>;

/// How many blocks there are from one kept block to the next.
fn stride(block_tokens: usize) -> usize {
    (STRIDE_TOKENS / block_tokens.max(1)).max(1)
}

/// Positions and hashes of the blocks of a chain that are kept; none of the first `popular`, which
/// are expected everywhere anyway.
fn kept(
    chain: &[BlockHash],
    block_tokens: usize,
    popular: usize,
) -> impl Iterator<Item = (usize, &BlockHash)> {
    let stride = stride(block_tokens);
    let first = (popular + 1).next_multiple_of(stride) - 1;
    chain.iter().enumerate().skip(first).step_by(stride)
}

/// The blocks of a chain that are kept, of which the first `popular` are everywhere.
pub(super) fn sample(chain: &[BlockHash], block_tokens: usize, popular: usize) -> Sampled {
    kept(chain, block_tokens, popular).map(|(_, hash)| *hash).collect()
}

impl Expected {
    /// A request waits that will bring these blocks to a node.
    pub(super) fn add(&mut self, sampled: &Sampled, node: NodeKey) {
        self.add_all(sampled, [Some(node), None]);
    }

    /// It waits no more.
    pub(super) fn remove(&mut self, sampled: &Sampled, node: NodeKey) {
        self.remove_all(sampled, [Some(node), None]);
    }

    /// A request was sent that brings these blocks to these nodes.
    pub(super) fn send(&mut self, sampled: Sampled, nodes: Nodes, now: f64) {
        self.add_all(&sampled, nodes);
        self.sent_blocks += sampled.len();
        self.sent.push_back((now + PATIENCE_MS, nodes, sampled));
        while let Some((until, ..)) = self.sent.front()
            && (*until <= now || self.sent_blocks > MOST_SENT)
        {
            self.forget_first();
        }
    }

    /// Nothing is expected any more of requests that were sent to this node.
    pub(super) fn leave(&mut self, node: NodeKey) {
        let mut sent = std::mem::take(&mut self.sent);
        for (_, nodes, sampled) in &mut sent {
            for gone in nodes.iter_mut().filter(|other| **other == Some(node)) {
                self.remove_all(sampled, [gone.take(), None]);
            }
        }
        sent.retain(|(_, nodes, sampled)| {
            let stays = nodes.iter().any(Option::is_some);
            self.sent_blocks -= if stays { 0 } else { sampled.len() };
            stays
        });
        self.sent = sent;
    }

    /// Calls `found` with `(node, leading blocks)` for every node of which more than `popular` are
    /// expected; the last call for a node has the largest number.
    pub(super) fn longest(
        &self,
        chain: &[BlockHash],
        block_tokens: usize,
        popular: usize,
        mut found: impl FnMut(NodeKey, usize),
    ) {
        for (at, hash) in kept(chain, block_tokens, popular) {
            let Some(nodes) = self.blocks.get(hash) else {
                return;
            };
            nodes.iter().for_each(|(node, _)| found(*node, at + 1));
        }
    }

    fn forget_first(&mut self) {
        if let Some((_, nodes, sampled)) = self.sent.pop_front() {
            self.sent_blocks -= sampled.len();
            self.remove_all(&sampled, nodes);
        }
    }

    fn add_all(&mut self, sampled: &Sampled, nodes: Nodes) {
        for hash in sampled {
            let holders = self.blocks.entry(*hash).or_default();
            for node in nodes.into_iter().flatten() {
                match holders.iter_mut().find(|(holder, _)| *holder == node) {
                    Some((_, requests)) => *requests += 1,
                    None => holders.push((node, 1)),
                }
            }
        }
    }

    fn remove_all(&mut self, sampled: &Sampled, nodes: Nodes) {
        for hash in sampled {
            let Some(holders) = self.blocks.get_mut(hash) else { continue };
            for node in nodes.into_iter().flatten() {
                holders.iter_mut().filter(|(holder, _)| *holder == node).for_each(|(_, n)| *n -= 1);
            }
            holders.retain(|(_, requests)| *requests > 0);
            if holders.is_empty() {
                self.blocks.remove(hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(from: u64, blocks: u64) -> Vec<BlockHash> {
        let hash = |n: u64| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            BlockHash(bytes)
        };
        (from..from + blocks).map(hash).collect()
    }

    fn longest(expected: &Expected, chain: &[BlockHash]) -> Vec<(u32, usize)> {
        let mut best = std::collections::BTreeMap::new();
        expected.longest(chain, 16, 0, |node, blocks| {
            best.insert(node.0, blocks);
        });
        let mut best: Vec<_> = best.into_iter().collect();
        best.sort_unstable();
        best
    }

    #[test]
    fn matches_to_within_a_stride_until_it_expires() {
        let (mut expected, all) = (Expected::default(), chain(0, 100));
        let short = sample(&all[..40], 16, 0);
        expected.add(&short, NodeKey(1));
        expected.send(sample(&all, 16, 0), [Some(NodeKey(2)), None], 1.0);
        assert_eq!(longest(&expected, &all), [(1, 32), (2, 96)]);
        assert_eq!(longest(&expected, &all[..20]), [(1, 16), (2, 16)]);
        assert_eq!(longest(&expected, &chain(500, 50)), []);
        expected.remove(&short, NodeKey(1));
        assert_eq!(longest(&expected, &all), [(2, 96)]);
        // Sent twice: the first time runs out without effect on the second.
        expected.send(short, [Some(NodeKey(2)), None], 2.0);
        expected.send(sample(&chain(1000, 16), 16, 0), [Some(NodeKey(3)), None], 1.0 + PATIENCE_MS);
        assert_eq!(longest(&expected, &all), [(2, 32)]);
        expected.leave(NodeKey(2));
        assert_eq!(longest(&expected, &all), []);
        expected.leave(NodeKey(3));
        assert!(expected.blocks.is_empty() && expected.sent_blocks == 0);
    }

    #[test]
    fn one_of_two_nodes_leaves_and_popular_blocks_are_not_kept() {
        let (mut expected, all) = (Expected::default(), chain(0, 100));
        expected.send(sample(&all, 16, 40), [Some(NodeKey(1)), Some(NodeKey(2))], 1.0);
        assert_eq!(longest(&expected, &all), [], "what is popular is not looked up either");
        let mut found = Vec::new();
        expected.longest(&all, 16, 40, |node, blocks| found.push((node.0, blocks)));
        assert_eq!(found, [(1, 48), (2, 48), (1, 64), (2, 64), (1, 80), (2, 80), (1, 96), (2, 96)]);
        expected.leave(NodeKey(2));
        assert!(expected.blocks.values().all(|holders| holders[..] == [(NodeKey(1), 1)]));
        expected.leave(NodeKey(1));
        assert!(expected.blocks.is_empty() && expected.sent_blocks == 0);
    }
}
