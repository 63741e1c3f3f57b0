//! Prompts of a trace, cut into blocks as nodes cache them.

use baton_proto::hash::BlockHash;
use baton_sim::trace::Trace;

use crate::commands::{CommandError, usage};

/// Tokens per block.
pub(super) const BLOCK_TOKENS: u32 = 16;
/// Tokens per block of the trace.
const TRACE_TOKENS: u32 = 512;
/// Blocks that one of the trace's is cut into.
pub(super) const PARTS: u32 = TRACE_TOKENS / BLOCK_TOKENS;
/// Blocks of more than one in so many prompts are the same in every round through the trace.
const COMMON: usize = 3;

/// A block of the trace in one round through it. Like there, it stands for all before it too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct Segment(u64);

impl Segment {
    /// One that nobody has. The bit is kept by the multiplication in [`Self::block`].
    pub(super) fn new(number: u64) -> Self {
        Self(1 << 58 | number)
    }

    /// Hash of one of its [`PARTS`] blocks. As uniform as BLAKE3's, and cheaper to make.
    pub(super) fn block(self, part: u32) -> BlockHash {
        let seed = self.0.wrapping_mul(u64::from(PARTS)).wrapping_add(part.into());
        let (low, high) = (mix(seed), mix(!seed));
        BlockHash((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
    }
}

/// See the module's description.
pub(super) struct Prompts {
    trace: Trace,
    /// By the trace's block.
    common: Vec<bool>,
}

impl Prompts {
    pub(super) fn new(trace: Trace) -> Result<Self, CommandError> {
        let mut uses = vec![0_usize; trace.unique_blocks as usize];
        let all = || trace.requests.iter().map(|request| request.full_blocks(TRACE_TOKENS));
        all().flatten().for_each(|&block| uses[block as usize] += 1);
        let often = trace.requests.len() / COMMON;
        let common: Vec<_> = uses.into_iter().map(|uses| uses > often).collect();
        if all().flatten().all(|&block| common[block as usize]) {
            return Err(usage("the trace's prompts differ in no full block that hash_ids names"));
        }
        Ok(Self { common, trace })
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.trace.requests.len()
    }

    /// The blocks of prompt `number`; numbers go on after the last with further rounds.
    pub(super) fn segments(&self, number: usize) -> impl Iterator<Item = Segment> + '_ {
        let (round, at) = (number / self.len(), number % self.len());
        let blocks = self.trace.requests[at].full_blocks(TRACE_TOKENS).iter();
        blocks.map(move |&block| {
            let round = if self.common[block as usize] { 0 } else { round as u64 };
            Segment(round << 32 | u64::from(block))
        })
    }

    /// A number that prompts of one conversation share, and others mostly do not; `None` for a prompt
    /// that has nothing of its own.
    pub(super) fn conversation(&self, number: usize) -> Option<u64> {
        let own = self.segments(number).find(|segment| !self.common[segment.0 as u32 as usize]);
        own.map(|segment| mix(segment.0))
    }
}

/// Finalizer of SplitMix64.
pub(super) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
