//! What the engine's thread asks of a device: [`Executor`], which computes steps one after the
//! other and may be given the next step before the results of the last one were read.

#![expect(
    unsafe_code,
    reason = "a step writes to the shared KV cache, whose owners the caller knows"
)]

use std::ops::ControlFlow;

use baton_grammar::TokenMask;
use baton_proto::geometry::KvGeometry;
use baton_proto::sampling::SamplingParams;

use crate::memory::KvMemory;
use crate::scheduler::Outcome;

/// A device cannot go on: what was computed on it is lost.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the device failed: {0}")]
pub struct DeviceFailure(pub String);

/// Called when a layer of the step that is told of is complete: the KV of every chunk is in that
/// layer's pieces. If it breaks, nobody wants the step's results.
pub type AfterLayer<'a> = dyn FnMut(usize) -> ControlFlow<()> + 'a;

/// One model on one set of devices, seen from the engine's thread.
pub trait Executor: Send {
    /// Identifies configuration, weights and arithmetic: equal on all nodes whose KV is
    /// exchangeable.
    fn revision(&self) -> [u8; 32];

    /// Shape of the KV cache for blocks of `block_tokens` tokens.
    fn geometry(&self, block_tokens: u32) -> KvGeometry;

    /// Size of the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Elements of a hidden state.
    fn hidden_size(&self) -> usize;

    /// Most tokens of a sequence, prompt and output together.
    fn max_model_len(&self) -> usize;

    /// Steps that may be launched and not finished: 1, or 2 if inputs may be
    /// [pending](Input::Pending).
    fn depth(&self) -> usize;

    /// Reserves the KV cache; called once, before the first launch.
    ///
    /// # Panics
    /// If there is no memory for it.
    fn allocate(&mut self, block_tokens: u32, blocks: usize) -> KvMemory;

    /// Begins to compute a step, after all those launched before. `after_layer` hears of this step,
    /// of each layer at most once and in order; of layers that are complete before the return.
    ///
    /// # Safety
    /// Until the step is finished, nothing but steps may write to the blocks of its chunks, nor
    /// read the tokens that the chunks write, but for what `after_layer` says is complete. Chunks
    /// belong to different sequences; none writes a token that another one sees.
    ///
    /// # Panics
    /// If a chunk breaks its contract (see [`StepChunk`]), or [`depth`](Self::depth) steps are
    /// launched already.
    unsafe fn launch(
        &mut self,
        step: &Step<'_>,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<(), DeviceFailure>;

    /// Waits for the oldest launched step. `after_layer` hears of those of its layers that it was
    /// not told of in [`launch`](Self::launch), if the step is [watched](Step::watched). None if
    /// the step was given up because `after_layer` broke; a device need not.
    ///
    /// # Panics
    /// If no step is launched.
    fn finish(
        &mut self,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<Option<Outcome>, DeviceFailure>;
}

/// What is computed together.
#[derive(Clone, Debug, Default)]
pub struct Step<'a> {
    /// Of different sequences; not empty.
    pub chunks: Vec<StepChunk<'a>>,
    /// Somebody waits for single layers.
    pub watched: bool,
}

/// Consecutive tokens of one sequence: a piece of a prompt, or one token of a running sequence.
#[derive(Clone, Copy, Debug)]
pub struct StepChunk<'a> {
    /// The tokens.
    pub input: Input<'a>,
    /// Position of the first one in its sequence. The KV of all positions before it is in the
    /// cache, or will be when the steps launched before have ended.
    pub start: usize,
    /// The sequence's blocks in order; they cover at least all positions up to the last token's.
    pub blocks: &'a [u32],
    /// Log-probabilities of the prompt that are wanted.
    pub prompt_logprobs: Option<PromptLogprobs<'a>>,
    /// A token is sampled from the last row.
    pub sample: Option<Sample<'a>>,
    /// The hidden states, after the last norm, of the rows from this one on are summed. Nothing
    /// else is wanted then.
    pub pool_from: Option<usize>,
}

/// The tokens of a chunk.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Known ones, each below the vocabulary size; not empty.
    Tokens(&'a [u32]),
    /// The one that this chunk of the step launched before samples.
    Pending(usize),
}

/// Log-probabilities of tokens that are known already.
#[derive(Clone, Copy, Debug)]
pub struct PromptLogprobs<'a> {
    /// The first row of the chunk that is wanted.
    pub first_row: usize,
    /// The token that follows each row from there on; not more than there are rows.
    pub tokens: &'a [u32],
    /// How many of the likeliest tokens are wanted beside each.
    pub top: usize,
}

/// How a token is chosen; see [`Sampler`](crate::sampler::Sampler).
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The parameters.
    pub params: &'a SamplingParams,
    /// The prompt.
    pub prompt: &'a [u32],
    /// The output so far, as far as it is known.
    pub output: &'a [u32],
    /// Output tokens that are not known yet: 1 if the chunk's input is pending, else 0.
    pub pending: usize,
    /// The tokens that a grammar allows; `min_tokens` has been seen to.
    pub allowed: Option<&'a TokenMask>,
}

impl Input<'_> {
    /// How many tokens.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Pending(_) => 1,
        }
    }
}
