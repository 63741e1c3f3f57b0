//! Shape of a KV cache. Two nodes exchange blocks only if theirs are equal.

/// Element type of a KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KvDtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// e4m3: a sign, 4 bits of exponent, 3 of mantissa; up to 448 in size
    /// (<https://arxiv.org/abs/2209.05433>). It holds the values themselves, without a scale.
    Fp8,
}

impl KvDtype {
    /// Bytes of one element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// `f32`, `bf16`, `f16` or `fp8`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8 => "fp8",
        }
    }

    /// The inverse of [`Self::as_str`].
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16, Self::Fp8].into_iter().find(|d| d.as_str() == text)
    }
}

/// Shape of a KV cache: a *block* holds `block_tokens` tokens of every layer; a *piece* is one
/// layer of one block, laid out `[k|v][kv_heads][block_tokens][head_dim]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct KvGeometry {
    /// Transformer layers.
    pub layers: u32,
    /// Key/value heads of a layer.
    pub kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: KvDtype,
    /// Tokens of one block.
    pub block_tokens: u32,
}

impl KvGeometry {
    /// Bytes of one piece: one layer of one block.
    #[must_use]
    pub fn piece_bytes(&self) -> usize {
        2 * self.kv_heads as usize
            * self.block_tokens as usize
            * self.head_dim as usize
            * self.dtype.bytes()
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.layers as usize * self.piece_bytes()
    }

    /// Bytes of one token over all layers.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / self.block_tokens as usize
    }

    /// Blocks that `tokens` tokens occupy, the last one perhaps in part.
    #[must_use]
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens as usize)
    }
}
