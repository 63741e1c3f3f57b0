//! Attention over the paged KV cache, over `prefill_attention.cu` and `decode_attention.cu`.
//!
//! A step's rows are given as [`QueryRows`], runs of rows of one sequence. Long runs go to
//! [`prefill_attention`], which multiplies tiles of 128 rows; single rows and short runs go to
//! [`decode_attention`], which reads keys and values once for as many tokens as fit 16 rows; so do
//! long runs where there is no other kernel, on other devices than Hopper ([`split_runs`] decides).
//! Both compute, for each row and head, `softmax(q kᵀ scale) v` over the keys up to the row's own
//! position, sums in f32, weights rounded to bf16 (f16 over e4m3 caches).
//!
//! Only the one for short runs reads e4m3 caches. For long ones
//! [`widen_blocks`](super::widen_blocks) makes bf16 of the blocks that a sequence has: of 8,192 keys
//! and 8 heads of 128 elements that moves 50 MB, while their last 2,048 rows of 32 heads take
//! 240 GFLOP.

mod decode;
mod decode_plan;
mod prefill;

pub use decode::{DecodeScratch, decode_attention, decode_workers};
pub use decode_plan::DecodePlan;
use prefill::tiles_of;
pub use prefill::{prefill_attention, prefill_tiles};

use half::bf16;

use super::device::Device;
use super::error::DeviceError;
use super::images::Target;
use super::kv::{HeadShape, PagedKv};
use super::memory::Slice;

/// Consecutive rows of a batch that are consecutive tokens of one sequence. Their keys and values,
/// and those of all tokens before them, have been written to the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueryRows {
    /// The first one's row of the batch.
    pub row: usize,
    /// How many.
    pub rows: usize,
    /// The first one's position in its sequence.
    pub position: usize,
    /// The sequence: a row of the block tables.
    pub sequence: usize,
}

/// What attention reads, the same for all rows.
#[derive(Clone, Copy)]
pub struct AttentionInput<'a> {
    /// `[rows, shape.row()]`; only queries are read.
    pub qkv: Slice<'a, bf16>,
    /// How many heads, and of what size: 64 or 128.
    pub shape: HeadShape,
    /// The layer's cache.
    pub kv: PagedKv<'a>,
    /// Factor of scores, mostly `head_dim^-0.5`.
    pub scale: f32,
    /// Keys that a row sees, its own included; 0: all.
    pub window: usize,
}

/// Most query rows for which reading the keys once for every 16 beats a tile that may be almost empty
/// and computes its keys one after another. An estimate, to be replaced by a measurement.
const SHORT_ROWS: usize = 64;
/// Tiles that occupy less than this part of a device's multiprocessors are slower than reading their
/// keys once for every 16 rows on all of them: a tile takes 16 cycles a key, by the matrix rate; its
/// 8 times 512 bytes take 102 from L2 at 40 bytes a cycle, shared by all. An estimate, too.
const FEW_TILES: usize = 6;

/// Parts the runs of a step into those for [`decode_attention`] and those for
/// [`prefill_attention`]: long ones, if the device has the kernel, and they are enough to occupy it.
/// [`decode_attention`] computes runs of any length, though many long ones several times slower.
#[must_use]
pub fn split_runs(
    device: &Device,
    shape: &HeadShape,
    runs: &[QueryRows],
) -> (Vec<QueryRows>, Vec<QueryRows>) {
    let exists = device.target() == Target::Hopper;
    split(runs, shape, if exists { device.multiprocessors() } else { usize::MAX })
}

fn split(
    runs: &[QueryRows],
    shape: &HeadShape,
    multiprocessors: usize,
) -> (Vec<QueryRows>, Vec<QueryRows>) {
    let is_short = |run: &QueryRows| run.rows * shape.group() <= SHORT_ROWS;
    let (short, long): (Vec<_>, Vec<_>) = runs.iter().copied().partition(is_short);
    let tiles: usize = long.iter().map(|run| tiles_of(run.rows, shape) * shape.kv_heads).sum();
    if tiles < multiprocessors.div_ceil(FEW_TILES) {
        (runs.to_vec(), Vec::new())
    } else {
        (short, long)
    }
}

impl AttentionInput<'_> {
    /// Rows of the batch.
    ///
    /// # Panics
    /// If a buffer does not have the shape that is described.
    fn check(&self, out: &Slice<'_, bf16>) -> usize {
        let (shape, kv) = (&self.shape, &self.kv);
        assert!(self.qkv.len().is_multiple_of(shape.row()), "whole rows of queries");
        let rows = self.qkv.len() / shape.row();
        assert!(out.len() == rows * shape.heads * shape.head_dim, "a row of results for each row");
        assert!(matches!(kv.block_tokens, 16 | 32 | 64), "blocks of {} tokens", kv.block_tokens);
        let tables = kv.block_tables.len();
        assert!(kv.max_blocks > 0 && tables.is_multiple_of(kv.max_blocks), "whole block tables");
        let piece = 2 * shape.kv_heads * kv.block_tokens * shape.head_dim * kv.elements.bytes();
        assert!(kv.pieces.len().is_multiple_of(piece), "whole pieces of {piece} bytes");
        let aligned = [self.qkv.address(), out.address(), kv.pieces.address()];
        assert!(aligned.iter().all(|address| address.is_multiple_of(16)), "16-byte alignment");
        rows
    }

    /// Factor of scores as exponents of two.
    fn scale_log2(&self) -> f32 {
        self.scale * std::f32::consts::LOG2_E
    }

    fn unsupported(&self, what: &str) -> DeviceError {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        DeviceError::Unsupported(format!(
            "{what} attention has no kernel for {heads} heads of {head_dim} elements, {kv_heads} \
             KV heads and a cache of {:?}",
            self.kv.elements
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: HeadShape = HeadShape { heads: 32, kv_heads: 8, head_dim: 128 };

    /// How many runs are for each of the two, on so many multiprocessors.
    fn counts(rows: &[usize], shape: &HeadShape, multiprocessors: usize) -> (usize, usize) {
        let run = |&rows| QueryRows { row: 0, rows, position: 0, sequence: 0 };
        let runs: Vec<_> = rows.iter().map(run).collect();
        let (short, long) = split(&runs, shape, multiprocessors);
        (short.len(), long.len())
    }

    #[test]
    fn long_runs_are_for_tiles_if_they_fill_the_device() {
        // 16 tokens are short at any number; 32 fill one tile for each of 8 heads.
        assert_eq!(counts(&[16; 100], &SHAPE, 132), (100, 0));
        assert_eq!(counts(&[1, 32], &SHAPE, 132), (2, 0));
        assert_eq!(counts(&[1, 32, 32, 32], &SHAPE, 132), (1, 3));
        assert_eq!(counts(&[1, 96], &SHAPE, 132), (1, 1));
        assert_eq!(counts(&[1, 64], &SHAPE, 132), (2, 0));
        // Where there are few multiprocessors, a tile fills them.
        assert_eq!(counts(&[1, 17], &SHAPE, 3), (1, 1));
        // A shard of one head needs longer chunks.
        let shard = HeadShape { heads: 4, kv_heads: 1, head_dim: 128 };
        assert_eq!(counts(&[672], &shard, 132), (1, 0));
        assert_eq!(counts(&[673], &shard, 132), (0, 1));
        // No kernel.
        assert_eq!(counts(&[8192; 4], &SHAPE, usize::MAX), (4, 0));
    }
}
