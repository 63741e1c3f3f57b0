//! A model for tests of what surrounds a model: it computes in no time, and its every token is a
//! hash of the KV bytes that it reads, so that one wrong, stale or foreign block changes the
//! output.
#![expect(unsafe_code, reason = "reads and writes the KV cache as a model does")]

mod ahead;
pub mod delayed;

use std::ops::ControlFlow;

use baton_kernels::cpu::KvStore;
use baton_proto::embedding::Pooling;
use baton_proto::geometry::{KvDtype, KvGeometry};

use crate::forward::{Chunk, Forward};

pub use ahead::Ahead;

const LAYERS: u32 = 3;
const HIDDEN_SIZE: usize = 5;
const HEAD_DIM: u32 = 2;
/// Bytes of one token's key (or value) in one layer.
const ROW: usize = 4 * HEAD_DIM as usize;

/// Called with the chunks of each step before it is computed.
pub type OnStep = Box<dyn FnMut(&[Chunk<'_>]) + Send>;

/// See the module.
pub struct FakeModel {
    vocab_size: usize,
    max_model_len: usize,
    on_step: OnStep,
}

impl FakeModel {
    /// A fake with this many token ids and this longest sequence.
    #[must_use]
    pub fn new(vocab_size: usize, max_model_len: usize) -> Self {
        Self { vocab_size, max_model_len, on_step: Box::new(|_| {}) }
    }

    /// The same, which lets `on_step` see every step first, and hold it up.
    #[must_use]
    pub fn on_step(self, on_step: OnStep) -> Self {
        Self { on_step, ..self }
    }

    /// The greedy continuation of `tokens` by `count` tokens, computed without any cache.
    #[must_use]
    pub fn expect(&self, tokens: &[u32], count: usize) -> Vec<u32> {
        let mut all = tokens.to_vec();
        for _ in 0..count {
            let last = states(&all).pop().unwrap_or_default();
            let logits = |token: &u32| logit(last, *token as usize);
            let best = (0..self.vocab_size as u32).rev();
            let best = best.max_by(|a, b| logits(a).total_cmp(&logits(b)));
            all.extend(best);
        }
        all.split_off(tokens.len())
    }

    /// The embedding of `tokens`, computed without any cache.
    #[must_use]
    pub fn expect_embedding(&self, tokens: &[u32], pooling: Pooling) -> Vec<f32> {
        let states = states(tokens);
        let pooled = match pooling {
            Pooling::Last => &states[states.len() - 1..],
            Pooling::Mean => &states[..],
        };
        let element = |i| {
            let sum: f64 = pooled.iter().map(|state| f64::from(logit(*state, i))).sum();
            (sum / pooled.len() as f64) as f32
        };
        (0..HIDDEN_SIZE).map(element).collect()
    }
}

impl Forward for FakeModel {
    fn revision(&self) -> [u8; 32] {
        [0xfa; 32]
    }

    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        let (layers, head_dim, dtype) = (LAYERS, HEAD_DIM, KvDtype::F32);
        KvGeometry { layers, kv_heads: 1, head_dim, dtype, block_tokens }
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn hidden_size(&self) -> usize {
        HIDDEN_SIZE
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    unsafe fn forward(
        &mut self,
        chunks: &[Chunk<'_>],
        kv: &KvStore,
        after_layer: &mut dyn FnMut(usize) -> ControlFlow<()>,
        each: &mut dyn FnMut(usize, &mut [f32]),
    ) -> ControlFlow<()> {
        (self.on_step)(chunks);
        let row = |chunk: &Chunk<'_>, i: usize| embed(chunk.tokens[i], chunk.start + i);
        let mut hidden: Vec<Vec<u64>> =
            chunks.iter().map(|c| (0..c.tokens.len()).map(|i| row(c, i)).collect()).collect();
        for layer in 0..LAYERS as usize {
            for (chunk, hidden) in chunks.iter().zip(&mut hidden) {
                attend(kv, layer, chunk, hidden);
            }
            after_layer(layer)?;
        }
        let mut rows = 0;
        for (chunk, hidden) in chunks.iter().zip(&hidden) {
            let width = if chunk.wanted.is_hidden() { HIDDEN_SIZE } else { self.vocab_size };
            for &hidden in &hidden[chunk.wanted.rows(hidden.len())] {
                let mut values: Vec<f32> = (0..width).map(|i| logit(hidden, i)).collect();
                each(rows, &mut values);
                rows += 1;
            }
        }
        ControlFlow::Continue(())
    }
}

/// The state of every token after the last layer, computed without any cache.
fn states(tokens: &[u32]) -> Vec<u64> {
    let mut folded = [0; LAYERS as usize];
    let row = |(position, &token): (usize, &u32)| {
        let mut last = embed(token, position);
        for state in &mut folded {
            *state = mix(*state, key_value(last));
            last = mix(last, *state);
        }
        last
    };
    tokens.iter().enumerate().map(row).collect()
}

/// Writes the rows' keys and values, then folds all that lies in the cache up to each row.
fn attend(kv: &KvStore, layer: usize, chunk: &Chunk<'_>, hidden: &mut [u64]) {
    let block_tokens = kv.layout().block_tokens;
    let place = |position: usize| {
        let slot = position % block_tokens;
        (chunk.blocks[position / block_tokens], slot * ROW, (block_tokens + slot) * ROW)
    };
    let mut state = 0;
    for position in 0..chunk.start + hidden.len() {
        let (block, key, value) = place(position);
        if let Some(row) = position.checked_sub(chunk.start) {
            let bytes = key_value(hidden[row]).to_le_bytes();
            // SAFETY: the scheduler lets one sequence at a time write a block.
            let piece = unsafe { kv.piece_mut(layer, block) };
            piece[key..][..ROW].copy_from_slice(&bytes[..]);
            piece[value..][..ROW].copy_from_slice(&bytes.map(|byte| !byte));
        }
        // SAFETY: nobody writes this block but this thread.
        let piece = unsafe { kv.piece(layer, block) };
        let key = u64::from_le_bytes(piece[key..][..ROW].try_into().expect("a key has 8 bytes"));
        let value: &[u8] = &piece[value..][..ROW];
        // An intact pair is folded as its key; anything else as something else.
        let intact = value.iter().zip(key.to_le_bytes()).all(|(v, k)| *v == !k);
        state = mix(state, if intact { key } else { mix(key, 1) });
        if let Some(row) = position.checked_sub(chunk.start) {
            hidden[row] = mix(hidden[row], state);
        }
    }
}

fn embed(token: u32, position: usize) -> u64 {
    mix(u64::from(token), position as u64)
}

fn key_value(hidden: u64) -> u64 {
    mix(hidden, 0x5eed)
}

fn logit(hidden: u64, token: usize) -> f32 {
    (mix(hidden, token as u64) >> 40) as f32 / (1 << 21) as f32 - 4.0
}

/// Not symmetric and not linear in its arguments (the finalizer of MurmurHash3).
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    z = (z ^ (z >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    z ^ (z >> 33)
}
