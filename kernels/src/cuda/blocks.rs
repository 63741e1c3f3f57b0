//! Copies of KV blocks between one layer's pool and a contiguous buffer, for transfers. Over
//! `blocks.cu`.

use super::error::DeviceError;
use super::kernel::{Grid, parameters};
use super::memory::Slice;
use super::stream::Stream;

const THREADS: usize = 256;
/// Bytes of one access.
const UNIT: usize = 16;
/// Accesses that a thread has on the way at once, as in the kernel.
const IN_FLIGHT: usize = 4;

/// Which heads of full pieces `[k|v][kv_heads][block_tokens][head_dim]` a memory has: those of one
/// device of several that share a model's heads (tensor parallelism), say. It has pieces of its heads
/// alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceShare {
    /// Heads of a full piece.
    pub kv_heads: usize,
    /// The first head that the memory has.
    pub first_head: usize,
    /// How many heads the memory has.
    pub heads: usize,
    /// Bytes of one head's keys (or values) of a block: a multiple of 16.
    pub head_bytes: usize,
}

impl PieceShare {
    /// All heads.
    #[must_use]
    pub fn whole(&self) -> Self {
        Self { first_head: 0, heads: self.kv_heads, ..*self }
    }

    /// The heads that both have, if there are any.
    #[must_use]
    pub fn common(&self, other: &Self) -> Option<Self> {
        let first_head = self.first_head.max(other.first_head);
        let end = (self.first_head + self.heads).min(other.first_head + other.heads);
        (first_head < end).then(|| Self { first_head, heads: end - first_head, ..*self })
    }

    /// Bytes of a full piece, as it travels.
    #[must_use]
    pub fn piece_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_bytes
    }

    /// Bytes of the memory's piece.
    #[must_use]
    pub fn own_bytes(&self) -> usize {
        2 * self.heads * self.head_bytes
    }
}

/// Memory with pieces, and the heads that they have.
#[derive(Clone, Copy)]
pub struct Pieces<'a> {
    /// The pieces, one after the other.
    pub memory: Slice<'a, u8>,
    /// Their heads.
    pub share: PieceShare,
}

/// Copies the heads that both have of `blocks` of the pool to `buffer`, which has a piece for each, one
/// after the other; its other heads stay as they are.
///
/// # Errors
/// If the driver fails, which it also does for more than 32,767 blocks.
///
/// # Panics
/// If the slices are not of whole pieces, the two have no heads in common or pieces of another shape,
/// or a head is not of whole 16 bytes. The blocks are not checked: they must exist.
pub fn gather_blocks(
    stream: &Stream,
    buffer: Pieces<'_>,
    pool: Pieces<'_>,
    blocks: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    copy(stream, "gather_blocks", [&buffer.memory, &pool.memory], (buffer, pool), blocks)
}

/// The other way round: copies the heads that both have from `buffer` to `blocks` of the pool.
///
/// # Errors
/// As [`gather_blocks`].
///
/// # Panics
/// As [`gather_blocks`].
pub fn scatter_blocks(
    stream: &Stream,
    pool: Pieces<'_>,
    buffer: Pieces<'_>,
    blocks: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    copy(stream, "scatter_blocks", [&pool.memory, &buffer.memory], (buffer, pool), blocks)
}

/// As in the kernels: accesses of half a piece, and where those begin that are copied.
#[repr(C)]
#[derive(Clone, Copy)]
struct Halves {
    units: u32,
    offset: u32,
}

parameters!(Halves);

impl Halves {
    /// Of pieces of which `copied` is copied.
    fn of(share: &PieceShare, copied: &PieceShare) -> Self {
        let units = |heads| units(heads, share);
        Self { units: units(share.heads), offset: units(copied.first_head - share.first_head) }
    }
}

fn units(heads: usize, share: &PieceShare) -> u32 {
    (heads * share.head_bytes / UNIT) as u32
}

fn copy(
    stream: &Stream,
    kernel: &'static str,
    [to, from]: [&Slice<'_, u8>; 2],
    (buffer, pool): (Pieces<'_>, Pieces<'_>),
    blocks: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    let (ours, theirs) = (&pool.share, &buffer.share);
    for share in [ours, theirs] {
        assert!(share.first_head + share.heads <= share.kv_heads, "heads of a full piece");
    }
    assert_eq!((ours.kv_heads, ours.head_bytes), (theirs.kv_heads, theirs.head_bytes), "one shape");
    assert!(ours.head_bytes.is_multiple_of(UNIT), "heads of whole accesses");
    assert_eq!(buffer.memory.len(), blocks.len() * theirs.own_bytes(), "a piece for each block");
    assert!(pool.memory.len().is_multiple_of(ours.own_bytes()), "a pool of whole pieces");
    let copied = ours.common(theirs).expect("heads that both have");
    if blocks.is_empty() {
        return Ok(());
    }
    let run = units(copied.heads, &copied);
    let across = (run as usize).div_ceil(THREADS * IN_FLIGHT);
    let grid = Grid::of([across, 2 * blocks.len(), 1], THREADS as u32);
    let (of_buffer, of_pool) = (Halves::of(theirs, &copied), Halves::of(ours, &copied));
    stream.launch(kernel, grid, &[to, from, &blocks, &run, &of_buffer, &of_pool])
}
