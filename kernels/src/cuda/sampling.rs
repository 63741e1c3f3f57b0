//! From logits to tokens on the device, with the semantics and the random numbers of the CPU
//! sampler (`engine/src/sampler.rs`): the same logits and parameters give the same token.
//!
//! Everything that a step needs is in device memory, so it can be captured in a graph. Over
//! `sampling_scan.cu` and `sampling_draw.cu`.

use super::error::DeviceError;
use super::kernel::{Grid, parameters};
use super::memory::{Buffer, Element, Slice};
use super::shape::check_lengths;
use super::stream::Stream;

/// Logits of one block, as in the kernels.
const TILE: usize = 4096;
/// Order keys that a tile notes.
const GROUPS: usize = 64;
/// Tokens that a row's list has room for.
const LISTED: usize = 4096;
const THREADS: u32 = 256;

/// Most alternatives with log-probabilities.
pub const MAX_TOP: usize = 20;
/// [`SamplingRow::logprobs`] of a row that wants none.
pub const NO_LOGPROBS: u32 = u32::MAX;
/// The largest vocabulary.
pub const MAX_VOCAB: usize = 1 << 18;

/// What a row asks for, as it lies in device memory. Values are not checked there: they are in the
/// ranges that `baton_proto`'s sampling parameters allow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingRow {
    /// With the position in the output it fixes the random number.
    pub seed: u64,
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the likeliest tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest one.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the history; 1 does nothing.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the output.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// No token of `ends` before this many output tokens.
    pub min_tokens: u32,
    /// The row of [`SamplingInputs::histories`], which is read only if there are penalties.
    pub history: u32,
    /// How many tokens of the history are the prompt.
    pub prompt_tokens: u32,
    /// Where the row's part of [`SamplingInputs::ends`] begins.
    pub ends_start: u32,
    /// How many they are.
    pub ends_count: u32,
    /// Where the row's part of [`SamplingInputs::biases`] begins.
    pub biases_start: u32,
    /// How many they are.
    pub biases_count: u32,
    /// Alternatives with log-probabilities, at most [`MAX_TOP`], or [`NO_LOGPROBS`].
    pub logprobs: u32,
    /// 1 if the row's bits of [`SamplingInputs::allowed`] apply, else 0.
    pub constrained: u32,
}

impl Default for SamplingRow {
    /// Draws from all tokens by their probabilities.
    fn default() -> Self {
        Self {
            seed: 0,
            temperature: 1.0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            top_k: 0,
            min_tokens: 0,
            history: 0,
            prompt_tokens: 0,
            ends_start: 0,
            ends_count: 0,
            biases_start: 0,
            biases_count: 0,
            logprobs: NO_LOGPROBS,
            constrained: 0,
        }
    }
}

// SAFETY: numbers, and no padding.
unsafe impl Element for SamplingRow {}

/// What a step of sampling reads.
#[derive(Clone, Copy)]
pub struct SamplingInputs<'a> {
    /// `[rows, stride]`, where the stride is [`DeviceSampler::stride`].
    pub logits: Slice<'a, f32>,
    /// `[rows]`
    pub params: Slice<'a, SamplingRow>,
    /// `[rows]`: tokens of prompt and output; 0 for a row that pads the batch and gets no token.
    pub lengths: Slice<'a, u32>,
    /// Prompt and output of sequences: `[any, history_stride]`; empty if no row has penalties.
    pub histories: Slice<'a, u32>,
    /// Tokens that a history has room for.
    pub history_stride: usize,
    /// End-of-sequence and stop tokens of all rows.
    pub ends: Slice<'a, u32>,
    /// Tokens and what is added to their logits, of all rows; a token once for a row at most.
    pub biases: (Slice<'a, u32>, Slice<'a, f32>),
    /// A bit for each token, the lowest first: whether a grammar allows it. `[rows, vocab / 32
    /// rounded up]`, or empty if no row is constrained.
    pub allowed: Slice<'a, u32>,
}

/// What a step of sampling writes.
#[derive(Clone, Copy)]
pub struct SamplingOutputs<'a> {
    /// `[rows]`
    pub tokens: Slice<'a, u32>,
    /// `[rows]`: log-probabilities of the tokens by the model's own logits, where wanted.
    pub logprobs: Slice<'a, f32>,
    /// `[rows, MAX_TOP]`: the likeliest tokens, in that order, as many as wanted. Ids from the
    /// vocabulary's size on stand for none.
    pub top_tokens: Slice<'a, u32>,
    /// `[rows, MAX_TOP]`: their log-probabilities.
    pub top_logprobs: Slice<'a, f32>,
}

/// The kernels' `Sampling`, with the addresses in its order.
#[repr(C)]
#[derive(Clone, Copy)]
struct Sampling {
    addresses: [u64; 18],
    vocab: u32,
    stride: u32,
    history_stride: u32,
    tiles: u32,
}
parameters!(Sampling);

/// 8-byte words of the kernels' `RowState` and `TileState`.
const ROW_STATE_WORDS: usize = 3;
const TILE_STATE_WORDS: usize = 4;

/// Samples tokens of batches; owns the memory that this takes: about as much as the logits.
pub struct DeviceSampler {
    rows: usize,
    vocab: usize,
    adjusted: Buffer<f32>,
    row_states: Buffer<u64>,
    tile_states: Buffer<u64>,
    group_keys: Buffer<u32>,
    tile_tops: Buffer<u64>,
    lists: Buffer<u32>,
}

impl DeviceSampler {
    /// A sampler for batches of up to `rows` rows of `vocab` logits, used in one stream at a time.
    ///
    /// # Errors
    /// If there is not enough memory.
    ///
    /// # Panics
    /// If the vocabulary is larger than [`MAX_VOCAB`].
    pub fn new(stream: &Stream, rows: usize, vocab: usize) -> Result<Self, DeviceError> {
        assert!(vocab <= MAX_VOCAB, "{vocab} tokens, and {MAX_VOCAB} at most");
        let tiles = rows * vocab.div_ceil(TILE);
        let sampler = Self {
            rows,
            vocab,
            adjusted: Buffer::new(stream.device(), rows * Self::stride(vocab))?,
            row_states: Buffer::new(stream.device(), rows * ROW_STATE_WORDS)?,
            tile_states: Buffer::new(stream.device(), tiles * TILE_STATE_WORDS)?,
            group_keys: Buffer::new(stream.device(), tiles * GROUPS)?,
            tile_tops: Buffer::new(stream.device(), tiles * MAX_TOP)?,
            lists: Buffer::new(stream.device(), rows * LISTED)?,
        };
        // Counters, which every launch leaves at zero.
        stream.zero(sampler.row_states.all())?;
        Ok(sampler)
    }

    /// Floats from one row of logits to the next: the vocabulary in whole accesses of 16 bytes.
    #[must_use]
    pub fn stride(vocab: usize) -> usize {
        vocab.next_multiple_of(4)
    }

    /// Chooses a token for each row. With `all_greedy` the kernel that draws is left out, and
    /// rows of a temperature above 0 get no token.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If there are more rows than there is memory for, or the slices do not fit each other. What
    /// lies in device memory is not checked: the ranges and histories of [`SamplingRow`] must exist.
    pub fn sample(
        &mut self,
        stream: &Stream,
        inputs: &SamplingInputs<'_>,
        outputs: &SamplingOutputs<'_>,
        all_greedy: bool,
    ) -> Result<(), DeviceError> {
        let rows = inputs.params.len();
        self.check(inputs, outputs, rows);
        if rows == 0 {
            return Ok(());
        }
        let grid = Grid::of([self.vocab.div_ceil(TILE), rows, 1], THREADS);
        let arguments = self.arguments(inputs, outputs);
        stream.launch("sample_scan", grid, &[&arguments])?;
        if all_greedy {
            return Ok(());
        }
        stream.launch("sample_draw", grid, &[&arguments])
    }

    fn check(&self, inputs: &SamplingInputs<'_>, outputs: &SamplingOutputs<'_>, rows: usize) {
        assert!(rows <= self.rows, "{rows} rows, and memory for {}", self.rows);
        check_lengths(rows * Self::stride(self.vocab), &[inputs.logits.len()]);
        check_lengths(rows, &[inputs.lengths.len(), outputs.tokens.len(), outputs.logprobs.len()]);
        check_lengths(rows * MAX_TOP, &[outputs.top_tokens.len(), outputs.top_logprobs.len()]);
        check_lengths(inputs.biases.0.len(), &[inputs.biases.1.len()]);
        if !inputs.allowed.is_empty() {
            check_lengths(rows * self.vocab.div_ceil(32), &[inputs.allowed.len()]);
        }
    }

    fn arguments(&self, inputs: &SamplingInputs<'_>, outputs: &SamplingOutputs<'_>) -> Sampling {
        Sampling {
            addresses: [
                inputs.logits.address(),
                self.adjusted.all().address(),
                inputs.params.address(),
                inputs.lengths.address(),
                inputs.histories.address(),
                inputs.ends.address(),
                inputs.biases.0.address(),
                inputs.biases.1.address(),
                inputs.allowed.address(),
                outputs.tokens.address(),
                outputs.logprobs.address(),
                outputs.top_tokens.address(),
                outputs.top_logprobs.address(),
                self.row_states.all().address(),
                self.tile_states.all().address(),
                self.group_keys.all().address(),
                self.tile_tops.all().address(),
                self.lists.all().address(),
            ],
            vocab: self.vocab as u32,
            stride: Self::stride(self.vocab) as u32,
            history_stride: inputs.history_stride as u32,
            tiles: self.vocab.div_ceil(TILE) as u32,
        }
    }
}
