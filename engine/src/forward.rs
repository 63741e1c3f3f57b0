//! A forward pass on the calling thread: [`Forward`], implemented by
//! [`Model`](crate::model::Model) and by the fakes of tests, and served through
//! [`HostExecutor`](crate::HostExecutor).

#![expect(
    unsafe_code,
    reason = "a step writes to the shared KV cache, whose owners the caller knows"
)]

use std::ops::{ControlFlow, Range};

use baton_kernels::cpu::KvStore;
use baton_proto::geometry::KvGeometry;

/// What is wanted of which rows of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Nothing: a chunk that is not the last of its prompt.
    None,
    /// The logits of the last row: what the next token is sampled from.
    Last,
    /// The logits of every row: log-probabilities of the prompt.
    All,
    /// The hidden states, after the last norm, of the rows from this one on: an embedding.
    Hidden(usize),
}

impl Wanted {
    /// The rows, of a chunk that has so many.
    #[must_use]
    pub fn rows(self, count: usize) -> Range<usize> {
        match self {
            Self::None => 0..0,
            Self::Last => count - 1..count,
            Self::All => 0..count,
            Self::Hidden(first) => first..count,
        }
    }

    /// Whether it is hidden states, and not logits.
    #[must_use]
    pub fn is_hidden(self) -> bool {
        matches!(self, Self::Hidden(_))
    }
}

/// Consecutive tokens of one sequence, computed in one step: a piece of a prompt, or one token
/// of a running sequence.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Token ids, each below the vocabulary size; not empty.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]` in its sequence. The KV of all positions before it is in the cache.
    pub start: usize,
    /// The sequence's blocks in order; they cover at least `start + tokens.len()` positions.
    pub blocks: &'a [u32],
    /// What is wanted of its rows.
    pub wanted: Wanted,
}

/// A model in this process's memory.
pub trait Forward: Send {
    /// Identifies configuration and weights: equal on all nodes that serve the same checkpoint.
    fn revision(&self) -> [u8; 32];

    /// Shape of the KV cache for blocks of `block_tokens` tokens.
    fn geometry(&self, block_tokens: u32) -> KvGeometry;

    /// Size of the vocabulary: the length of a row of logits.
    fn vocab_size(&self) -> usize;

    /// Elements of a hidden state.
    fn hidden_size(&self) -> usize;

    /// Most tokens of a sequence, prompt and output together.
    fn max_model_len(&self) -> usize;

    /// Computes `chunks`, writing their keys and values to `kv`.
    ///
    /// `after_layer(layer)` is called once per layer, in order, as soon as the KV of every chunk
    /// is in that layer's pieces. Then `each(row, values)` is called for every wanted row, wanted
    /// rows counted over the chunks in order: with its logits (`vocab_size` of them) or its hidden
    /// state (`hidden_size`), which may be overwritten.
    ///
    /// If `after_layer` breaks, nobody wants the results: the rest is not computed, and `Break` is
    /// returned.
    ///
    /// # Safety
    /// Until it returns, nothing else may write to the blocks of `chunks`, nor read the tokens that
    /// the chunks write, but for what `after_layer` says is complete. Chunks belong to different
    /// sequences; none writes a token that another one sees.
    ///
    /// # Panics
    /// If a chunk breaks its contract (see [`Chunk`]), or `kv` is not of this model's shape.
    unsafe fn forward(
        &mut self,
        chunks: &[Chunk<'_>],
        kv: &KvStore,
        after_layer: &mut dyn FnMut(usize) -> ControlFlow<()>,
        each: &mut dyn FnMut(usize, &mut [f32]),
    ) -> ControlFlow<()>;
}
