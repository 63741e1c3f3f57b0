//! Which leading blocks nearly every request has: a system prompt, for instance.
//!
//! Every node that serves requests has them, or will with its next one. If they counted as a hit,
//! all requests would go to the node that was the first to compute them.

use baton_proto::hash::BlockHash;

use crate::block_map::BlockMap;

/// Share of the requests that have a popular block.
const SHARE: f64 = 0.3;
/// Requests after which older ones count half.
const WINDOW: f64 = 512.0;
/// No block is popular before so many requests.
const LEAST_REQUESTS: f64 = 8.0;
/// Leading blocks that are looked at; no system prompt is longer.
const MOST_BLOCKS: usize = 4096;

/// Counts of leading blocks among recent requests. Bounded: only blocks that follow popular ones
/// are counted, and all counts halve from time to time.
#[derive(Clone, Debug, Default)]
pub(super) struct Popular {
    counts: BlockMap<f64>,
    requests: f64,
}

impl Popular {
    /// Takes a request into account; returns how many of its leading blocks are popular.
    pub(super) fn observe(&mut self, chain: &[BlockHash]) -> usize {
        self.requests += 1.0;
        if self.requests > WINDOW {
            self.requests /= 2.0;
            self.counts.values_mut().for_each(|count| *count /= 2.0);
            self.counts.retain(|_, count| *count >= 1.0);
        }
        let least = (SHARE * self.requests).max(LEAST_REQUESTS);
        let mut popular = 0;
        for hash in chain.iter().take(MOST_BLOCKS) {
            let count = self.counts.entry(*hash).or_default();
            *count += 1.0;
            if *count < least {
                break;
            }
            popular += 1;
        }
        popular
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u64) -> BlockHash {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        BlockHash(bytes)
    }

    #[test]
    fn finds_the_system_prompt_and_forgets_it() {
        let mut popular = Popular::default();
        let mut found = 0;
        for n in 0..1000 {
            let own = [100 + n, 1_000_000 + n].map(hash);
            let chain: Vec<_> = (0..10).map(hash).chain(own).collect();
            found = popular.observe(&chain);
        }
        assert_eq!(found, 10);
        for n in 0..3000 {
            popular.observe(&[hash(5_000_000 + n)]);
        }
        assert_eq!(popular.observe(&[hash(0)]), 0);
        assert!(popular.counts.len() <= WINDOW as usize + 1);
    }
}
