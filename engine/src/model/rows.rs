//! The rows of a step: the tokens of all chunks, one after the other.

use baton_kernels::cpu::KvRow;

use crate::forward::Chunk;

/// Where each row of a batch comes from and goes to.
#[derive(Default)]
pub(super) struct Rows {
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Vec<usize>,
    /// Index of each row's chunk.
    pub(super) chunks: Vec<usize>,
    /// Where each row's key and value go.
    pub(super) kv: Vec<KvRow>,
    /// Rows of which something is wanted.
    pub(super) wanted: Vec<usize>,
    /// Of each of these: it is the hidden state, and not logits.
    pub(super) hidden: Vec<bool>,
}

impl Rows {
    /// Lists the rows of `chunks`, for blocks of `block_tokens` tokens.
    pub(super) fn list(&mut self, chunks: &[Chunk<'_>], block_tokens: usize) {
        self.clear();
        for (index, chunk) in chunks.iter().enumerate() {
            assert!(!chunk.tokens.is_empty(), "a chunk has tokens");
            let first = self.tokens.len();
            self.tokens.extend_from_slice(chunk.tokens);
            for position in chunk.start..chunk.start + chunk.tokens.len() {
                self.positions.push(position);
                self.chunks.push(index);
                self.kv.push(KvRow {
                    block: chunk.blocks[position / block_tokens],
                    slot: (position % block_tokens) as u32,
                });
            }
            let wanted = chunk.wanted.rows(chunk.tokens.len());
            self.wanted.extend(wanted.map(|row| first + row));
            self.hidden.resize(self.wanted.len(), chunk.wanted.is_hidden());
        }
    }

    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Keeps the positions and chunks of the wanted rows only; gives the former index of each.
    pub(super) fn keep_wanted(&mut self) -> impl Iterator<Item = usize> {
        // Wanted rows ascend, so none is overwritten before it is read.
        for (to, from) in self.wanted.iter().enumerate() {
            self.positions[to] = self.positions[*from];
            self.chunks[to] = self.chunks[*from];
        }
        self.positions.truncate(self.wanted.len());
        self.chunks.truncate(self.wanted.len());
        self.wanted.iter().copied()
    }

    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.chunks.clear();
        self.kv.clear();
        self.wanted.clear();
        self.hidden.clear();
    }
}
