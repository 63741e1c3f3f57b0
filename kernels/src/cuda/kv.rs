//! Heads, and how the KV cache of a layer lies in device memory.

use super::memory::Slice;

/// How many heads there are, and of what size. A row of `qkv` is
/// `[heads | kv_heads | kv_heads]` heads: queries, keys, values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Elements of a row of `qkv`.
    #[must_use]
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Query heads of each KV head.
    ///
    /// # Panics
    /// If there are not as many of each.
    #[must_use]
    pub fn group(&self) -> usize {
        let Self { heads, kv_heads, .. } = *self;
        assert!(heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads of {kv_heads} groups");
        heads / kv_heads
    }
}

/// How the KV cache keeps elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvElements {
    /// As bf16.
    Bf16,
    /// As e4m3 of the value divided by the layer's scale; what is beyond its range saturates.
    E4m3 {
        /// Scale of keys.
        k_scale: f32,
        /// Scale of values.
        v_scale: f32,
    },
}

impl KvElements {
    /// Bytes of one element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::E4m3 { .. } => 1,
        }
    }
}

/// One layer's part of the paged KV cache and where sequences have their blocks in it.
#[derive(Clone, Copy)]
pub struct PagedKv<'a> {
    /// Pieces `[blocks][k|v][kv_heads][block_tokens][head_dim]`, as bytes.
    pub pieces: Slice<'a, u8>,
    /// How elements are kept.
    pub elements: KvElements,
    /// Tokens of a block: 16, 32 or 64.
    pub block_tokens: usize,
    /// Blocks of each sequence, in order: `[sequences, max_blocks]`.
    pub block_tables: Slice<'a, u32>,
    /// Width of the block tables.
    pub max_blocks: usize,
}
