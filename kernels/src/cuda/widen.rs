//! Blocks of an e4m3 cache as bf16, over `widen.cu`.

use half::bf16;

use super::error::DeviceError;
use super::kernel::Grid;
use super::kv::{HeadShape, KvElements, PagedKv};
use super::memory::Slice;
use super::stream::Stream;

const THREADS: usize = 256;
/// Elements of one access.
const UNIT: usize = 16;
/// Accesses that a thread has on the way at once, as in the kernel.
const IN_FLIGHT: usize = 4;

/// Writes `blocks` of an e4m3 cache to `wide`, one after the other, as a bf16 cache of as many
/// blocks would hold them: times their scale, rounded to bf16 (with a scale of 1 they are exact).
/// Kernels that read bf16 take them for the blocks 0, 1, 2, ….
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If the cache is of bf16, or the slices are not of whole pieces. The blocks are not checked: they
/// must exist.
pub fn widen_blocks(
    stream: &Stream,
    wide: Slice<'_, bf16>,
    kv: &PagedKv<'_>,
    shape: &HeadShape,
    blocks: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    let KvElements::E4m3 { k_scale, v_scale } = kv.elements else {
        panic!("a cache of bf16 is as wide as it gets");
    };
    let half = shape.kv_heads * kv.block_tokens * shape.head_dim;
    assert!(half.is_multiple_of(UNIT) && kv.pieces.len().is_multiple_of(2 * half), "whole pieces");
    assert_eq!(wide.len(), blocks.len() * 2 * half, "a piece for each block");
    if blocks.is_empty() {
        return Ok(());
    }
    let units = half / UNIT;
    let grid = [2 * blocks.len(), units.div_ceil(THREADS * IN_FLIGHT), 1];
    let grid = Grid::of(grid, THREADS as u32);
    let units = units as u32;
    stream.launch("widen_blocks", grid, &[&wide, &kv.pieces, &blocks, &units, &k_scale, &v_scale])
}
