//! Copies of KV blocks between one layer's pool and a contiguous buffer, for transfers. Over
//! `blocks.cu`.

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::stream::Stream;

const THREADS: usize = 256;
/// Bytes of one access.
const UNIT: usize = 16;
/// Accesses that a thread has on the way at once, as in the kernel.
const IN_FLIGHT: usize = 4;

/// Which part of full pieces `[k|v][kv_heads][block_tokens][head_dim]` a pool has. A node that
/// has all of a model's heads has everything; one of several that share them (tensor parallelism)
/// keeps pieces of its heads alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceShare {
    /// Heads of a full piece.
    pub kv_heads: usize,
    /// The first head that the pool has.
    pub first_head: usize,
    /// How many heads the pool has.
    pub heads: usize,
    /// Bytes of one head's keys (or values) of a block: a multiple of 16.
    pub head_bytes: usize,
}

impl PieceShare {
    /// Bytes of a full piece, as it travels.
    #[must_use]
    pub fn piece_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_bytes
    }

    /// Bytes of the pool's piece.
    #[must_use]
    pub fn own_bytes(&self) -> usize {
        2 * self.heads * self.head_bytes
    }
}

/// Copies the pool's part of `blocks` to `buffer`, which holds a full piece for each, one after the
/// other; what the pool does not have stays as it is there.
///
/// # Errors
/// If the driver fails, which it also does for more than 32,767 blocks.
///
/// # Panics
/// If the slices are not of whole pieces, the heads do not exist, or a head is not of whole 16
/// bytes. The blocks are not checked: they must exist.
pub fn gather_blocks(
    stream: &Stream,
    buffer: Slice<'_, u8>,
    pool: Slice<'_, u8>,
    blocks: Slice<'_, u32>,
    share: PieceShare,
) -> Result<(), DeviceError> {
    copy(stream, "gather_blocks", (buffer, pool), (buffer, pool), blocks, share)
}

/// The other way round: copies the pool's part of full pieces in `buffer` to `blocks` of the pool.
///
/// # Errors
/// As [`gather_blocks`].
///
/// # Panics
/// As [`gather_blocks`].
pub fn scatter_blocks(
    stream: &Stream,
    pool: Slice<'_, u8>,
    buffer: Slice<'_, u8>,
    blocks: Slice<'_, u32>,
    share: PieceShare,
) -> Result<(), DeviceError> {
    copy(stream, "scatter_blocks", (pool, buffer), (buffer, pool), blocks, share)
}

fn copy(
    stream: &Stream,
    kernel: &'static str,
    (to, from): (Slice<'_, u8>, Slice<'_, u8>),
    (buffer, pool): (Slice<'_, u8>, Slice<'_, u8>),
    blocks: Slice<'_, u32>,
    share: PieceShare,
) -> Result<(), DeviceError> {
    assert!(share.first_head + share.heads <= share.kv_heads, "heads of a full piece");
    assert!(share.head_bytes.is_multiple_of(UNIT), "heads of whole accesses");
    assert_eq!(buffer.len(), blocks.len() * share.piece_bytes(), "a full piece for each block");
    assert!(pool.len().is_multiple_of(share.own_bytes()), "a pool of whole pieces");
    if blocks.is_empty() {
        return Ok(());
    }
    let units = |heads: usize| (heads * share.head_bytes / UNIT) as u32;
    let (run, half) = (units(share.heads), units(share.kv_heads));
    let across = (run as usize).div_ceil(THREADS * IN_FLIGHT);
    let grid = Grid::of([across, 2 * blocks.len(), 1], THREADS as u32);
    let offset = units(share.first_head);
    stream.launch(kernel, grid, &[&to, &from, &blocks, &run, &half, &offset])
}
