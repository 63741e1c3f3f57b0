//! The paged KV cache.
#![expect(unsafe_code, reason = "memory that several owners of blocks share")]

use super::heads::Heads;
use super::memory::Memory;
use super::pool::{ThreadPool, grain};
use crate::Dtype;

/// Greatest head dimension.
pub const MAX_HEAD_DIM: usize = 256;

/// Bytes past the last piece that may be read, as attention reads whole vectors.
const SLACK: usize = 128;

/// Shape of a KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvLayout {
    /// Transformer layers.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Elements of one head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Tokens of one block.
    pub block_tokens: usize,
    /// Element type.
    pub dtype: Dtype,
}

impl KvLayout {
    /// Bytes of one piece: one layer of one block.
    #[must_use]
    pub fn piece_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_bytes()
    }

    /// Bytes of one head's keys (or values) of one piece.
    pub(crate) fn head_bytes(&self) -> usize {
        self.block_tokens * self.row_bytes()
    }

    /// Bytes of one head's key (or value) of one token.
    pub(crate) fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.bytes()
    }
}

/// Memory of a KV cache: a *piece* for each layer of each block, laid out
/// `[k|v][kv_heads][block_tokens][head_dim]`, little endian; all pieces of a layer lie together.
///
/// It is shared: a step of the model, transfers in and transfers out use it at the same time, each
/// its own blocks. Who owns which block is decided elsewhere, so access is unsafe.
pub struct KvStore {
    layout: KvLayout,
    blocks: usize,
    memory: Memory,
}

impl KvStore {
    /// Reserves zeroed memory, which is committed as it is first touched.
    ///
    /// # Panics
    /// If the head dimension is beyond [`MAX_HEAD_DIM`], or the address space exhausted.
    #[must_use]
    pub fn new(layout: KvLayout, blocks: usize) -> Self {
        assert!(layout.head_dim <= MAX_HEAD_DIM, "heads of at most {MAX_HEAD_DIM} elements");
        let memory = Memory::zeroed(layout.layers * blocks * layout.piece_bytes() + SLACK);
        Self { layout, blocks, memory }
    }

    /// Shape of the cache.
    #[must_use]
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// The bytes of a piece.
    ///
    /// # Safety
    /// Nothing may write to this block while the slice lives.
    ///
    /// # Panics
    /// If there is no such piece.
    #[must_use]
    pub unsafe fn piece(&self, layer: usize, block: u32) -> &[u8] {
        // SAFETY: the piece is inside the memory; aliasing is the caller's promise.
        unsafe {
            std::slice::from_raw_parts(self.piece_ptr(layer, block), self.layout.piece_bytes())
        }
    }

    /// The bytes of a piece, to write to.
    ///
    /// # Safety
    /// Nothing else may read from or write to this block while the slice lives.
    ///
    /// # Panics
    /// If there is no such piece.
    #[must_use]
    #[expect(clippy::mut_from_ref, reason = "blocks have owners of their own, as said above")]
    pub unsafe fn piece_mut(&self, layer: usize, block: u32) -> &mut [u8] {
        let bytes = self.layout.piece_bytes();
        // SAFETY: the piece is inside the memory; aliasing is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.piece_ptr(layer, block), bytes) }
    }

    /// Where a piece begins.
    #[inline]
    pub(crate) fn piece_ptr(&self, layer: usize, block: u32) -> *mut u8 {
        let block = block as usize;
        assert!(layer < self.layout.layers && block < self.blocks, "no piece {layer}/{block}");
        // SAFETY: layer and block exist.
        unsafe {
            self.memory.as_ptr().add((layer * self.blocks + block) * self.layout.piece_bytes())
        }
    }
}

/// Where the key and the value of a row of a batch go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvRow {
    /// The block.
    pub block: u32,
    /// The token in the block.
    pub slot: u32,
}

/// Writes keys and values of one layer to the cache: heads `k` and `v` of row `i` of `matrix` to
/// `rows[i]`, rounded to the cache's type (to the nearest, ties to even).
///
/// # Safety
/// Nothing else may read or write these tokens of the cache meanwhile, and `rows` must differ from
/// each other.
///
/// # Panics
/// If the heads are not those of the cache, the matrix is not of as many rows, or there is no such
/// block or slot.
pub unsafe fn write_kv(
    pool: &ThreadPool,
    store: &KvStore,
    layer: usize,
    rows: &[KvRow],
    matrix: &[f32],
    (k, v): (Heads, Heads),
) {
    let layout = store.layout;
    for heads in [k, v] {
        assert_eq!(heads.rows(matrix.len()), rows.len(), "a place for each row");
        assert_eq!(
            (heads.count, heads.dim),
            (layout.kv_heads, layout.head_dim),
            "the cache's heads"
        );
    }
    let size = grain(2 * k.width());
    pool.for_each(rows.len().div_ceil(size), &|task| {
        let first = task * size;
        for (i, KvRow { block, slot }) in rows[first..].iter().take(size).enumerate() {
            let (slot, row) = (*slot as usize, first + i);
            assert!(slot < layout.block_tokens, "no slot {slot}");
            let keys = k.of(matrix, row).chunks_exact(k.dim);
            let values = v.of(matrix, row).chunks_exact(v.dim);
            for (head, numbers) in keys.chain(values).enumerate() {
                let at = head * layout.head_bytes() + slot * layout.row_bytes();
                // SAFETY: inside the piece, as head and slot exist, and only this task's.
                let bytes = unsafe {
                    let start = store.piece_ptr(layer, *block).add(at);
                    std::slice::from_raw_parts_mut(start, layout.row_bytes())
                };
                layout.dtype.narrow(numbers, bytes);
            }
        }
    });
}
