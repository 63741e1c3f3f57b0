//! Blocks that nodes do not hold yet, and will once they have done what they were asked for.
//!
//! A request that shares its prompt with one that still waits should go where that one goes. What
//! nodes say of their caches comes too late for that, so the blocks of every placed request are
//! expected on its node until that node has had time to tell. Only every so many blocks are kept
//! of each request: an estimate is enough here.

use std::collections::{HashMap, VecDeque};

use baton_proto::hash::BlockHash;

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
    blocks: HashMap<BlockHash, Vec<(NodeKey, u32)>>,
    /// Requests that were sent, with the time until which their blocks are expected.
    sent: VecDeque<(f64, NodeKey, Sampled)>,
    /// Blocks of all of them.
    sent_blocks: usize,
}

/// Every so many blocks of a chain.
pub(super) type Sampled = Box<[BlockHash]>;

/// How many blocks there are from one kept block to the next.
fn stride(block_tokens: usize) -> usize {
    (STRIDE_TOKENS / block_tokens.max(1)).max(1)
}

/// The blocks of a chain that are kept.
pub(super) fn sample(chain: &[BlockHash], block_tokens: usize) -> Sampled {
    let stride = stride(block_tokens);
    chain.iter().skip(stride - 1).step_by(stride).copied().collect()
}

impl Expected {
    /// A request waits that will bring these blocks to a node.
    pub(super) fn add(&mut self, sampled: &Sampled, node: NodeKey) {
        for hash in sampled {
            let nodes = self.blocks.entry(*hash).or_default();
            match nodes.iter_mut().find(|(holder, _)| *holder == node) {
                Some((_, requests)) => *requests += 1,
                None => nodes.push((node, 1)),
            }
        }
    }

    /// It waits no more.
    pub(super) fn remove(&mut self, sampled: &Sampled, node: NodeKey) {
        for hash in sampled {
            let Some(nodes) = self.blocks.get_mut(hash) else { continue };
            nodes.iter_mut().filter(|(holder, _)| *holder == node).for_each(|(_, n)| *n -= 1);
            nodes.retain(|(_, requests)| *requests > 0);
            if nodes.is_empty() {
                self.blocks.remove(hash);
            }
        }
    }

    /// A request was sent that brings these blocks to a node.
    pub(super) fn send(&mut self, sampled: Sampled, node: NodeKey, now: f64) {
        self.add(&sampled, node);
        self.sent_blocks += sampled.len();
        self.sent.push_back((now + PATIENCE_MS, node, sampled));
        while let Some((until, ..)) = self.sent.front()
            && (*until <= now || self.sent_blocks > MOST_SENT)
        {
            self.forget_first();
        }
    }

    /// Nothing is expected any more of requests that were sent to this node.
    pub(super) fn leave(&mut self, node: NodeKey) {
        let (gone, stay): (VecDeque<_>, _) =
            std::mem::take(&mut self.sent).into_iter().partition(|(_, holder, _)| *holder == node);
        self.sent = stay;
        for (_, node, sampled) in gone {
            self.sent_blocks -= sampled.len();
            self.remove(&sampled, node);
        }
    }

    /// Calls `found` with `(node, leading blocks)` for every node of which any is expected; the
    /// last call for a node has the largest number.
    pub(super) fn longest(
        &self,
        chain: &[BlockHash],
        block_tokens: usize,
        mut found: impl FnMut(NodeKey, usize),
    ) {
        let stride = stride(block_tokens);
        for (at, hash) in chain.iter().enumerate().skip(stride - 1).step_by(stride) {
            let Some(nodes) = self.blocks.get(hash) else {
                return;
            };
            nodes.iter().for_each(|(node, _)| found(*node, at + 1));
        }
    }

    fn forget_first(&mut self) {
        if let Some((_, node, sampled)) = self.sent.pop_front() {
            self.sent_blocks -= sampled.len();
            self.remove(&sampled, node);
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
        let mut best: HashMap<u32, usize> = HashMap::new();
        expected.longest(chain, 16, |node, blocks| {
            best.insert(node.0, blocks);
        });
        let mut best: Vec<_> = best.into_iter().collect();
        best.sort_unstable();
        best
    }

    #[test]
    fn matches_to_within_a_stride_until_it_expires() {
        let (mut expected, all) = (Expected::default(), chain(0, 100));
        let short = sample(&all[..40], 16);
        expected.add(&short, NodeKey(1));
        expected.send(sample(&all, 16), NodeKey(2), 1.0);
        assert_eq!(longest(&expected, &all), [(1, 32), (2, 96)]);
        assert_eq!(longest(&expected, &all[..20]), [(1, 16), (2, 16)]);
        assert_eq!(longest(&expected, &chain(500, 50)), []);
        expected.remove(&short, NodeKey(1));
        assert_eq!(longest(&expected, &all), [(2, 96)]);
        // Sent twice: the first time runs out without effect on the second.
        expected.send(short, NodeKey(2), 2.0);
        expected.send(sample(&chain(1000, 16), 16), NodeKey(3), 1.0 + PATIENCE_MS);
        assert_eq!(longest(&expected, &all), [(2, 32)]);
        expected.leave(NodeKey(2));
        assert_eq!(longest(&expected, &all), []);
        expected.leave(NodeKey(3));
        assert!(expected.blocks.is_empty() && expected.sent_blocks == 0);
    }
}
