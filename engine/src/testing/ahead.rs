//! A device that lets the engine run ahead, and computes as late as it may.

use std::collections::VecDeque;

use baton_grammar::TokenMask;
use baton_proto::geometry::KvGeometry;
use baton_proto::sampling::SamplingParams;

use crate::executor::{
    AfterLayer, DeviceFailure, Executor, Input, PromptLogprobs, Sample, Step, StepChunk,
};
use crate::forward::Forward;
use crate::host::HostExecutor;
use crate::memory::KvMemory;
use crate::scheduler::Outcome;

/// Computes a step when its results are asked for, so that whatever was given away too early has
/// been overwritten by then.
pub struct Ahead<F> {
    inner: HostExecutor<F>,
    launched: VecDeque<Launched>,
    /// What each chunk of the last computed step sampled.
    sampled: Vec<Option<u32>>,
}

/// A step as it was launched.
struct Launched {
    chunks: Vec<Owned>,
    watched: bool,
}

/// A [`StepChunk`] of its own.
struct Owned {
    tokens: Vec<u32>,
    pending: Option<usize>,
    start: usize,
    blocks: Vec<u32>,
    prompt_logprobs: Option<(usize, Vec<u32>, usize)>,
    sample: Option<(SamplingParams, Vec<u32>, Vec<u32>)>,
    allowed: Option<TokenMask>,
    pool_from: Option<usize>,
}

impl<F: Forward> Ahead<F> {
    /// Serves `model`.
    #[must_use]
    pub fn new(model: F) -> Self {
        let (inner, launched) = (HostExecutor::new(model), VecDeque::new());
        Self { inner, launched, sampled: Vec::new() }
    }
}

impl<F: Forward> Executor for Ahead<F> {
    fn revision(&self) -> [u8; 32] {
        self.inner.revision()
    }

    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        self.inner.geometry(block_tokens)
    }

    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn hidden_size(&self) -> usize {
        self.inner.hidden_size()
    }

    fn max_model_len(&self) -> usize {
        self.inner.max_model_len()
    }

    fn depth(&self) -> usize {
        2
    }

    fn allocate(&mut self, block_tokens: u32, blocks: usize) -> KvMemory {
        self.inner.allocate(block_tokens, blocks)
    }

    unsafe fn launch(
        &mut self,
        step: &Step<'_>,
        _: &mut AfterLayer<'_>,
    ) -> Result<(), DeviceFailure> {
        assert!(self.launched.len() < self.depth(), "too many steps are launched");
        let chunks = step.chunks.iter().map(Owned::of).collect();
        self.launched.push_back(Launched { chunks, watched: step.watched });
        Ok(())
    }

    fn finish(
        &mut self,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<Option<Outcome>, DeviceFailure> {
        let mut launched = self.launched.pop_front().expect("only launched steps are finished");
        for chunk in &mut launched.chunks {
            let Some(before) = chunk.pending else { continue };
            // Nothing, if the step before was given up: then nobody wants this chunk either.
            let token = self.sampled[before].unwrap_or(0);
            chunk.tokens = vec![token];
            if let Some((.., output)) = &mut chunk.sample {
                output.push(token);
            }
        }
        let chunks: Vec<_> = launched.chunks.iter().map(Owned::borrow).collect();
        let step = Step { chunks, watched: launched.watched };
        // SAFETY: what was promised when the step was launched holds until now.
        unsafe { self.inner.launch(&step, after_layer) }?;
        let outcome = self.inner.finish(after_layer)?;
        self.sampled = match &outcome {
            Some(outcome) => outcome.sampled.iter().map(|s| s.as_ref().map(|s| s.token)).collect(),
            None => vec![None; step.chunks.len()],
        };
        Ok(outcome)
    }
}

impl Owned {
    fn of(chunk: &StepChunk<'_>) -> Self {
        let (tokens, pending) = match chunk.input {
            Input::Tokens(tokens) => (tokens.to_vec(), None),
            Input::Pending(before) => (Vec::new(), Some(before)),
        };
        let sample = |Sample { params, prompt, output, pending: unknown, .. }: Sample<'_>| {
            assert_eq!(unknown, usize::from(pending.is_some()), "only the input is unknown");
            (params.clone(), prompt.to_vec(), output.to_vec())
        };
        let prompt_logprobs =
            |wanted: PromptLogprobs<'_>| (wanted.first_row, wanted.tokens.to_vec(), wanted.top);
        Self {
            tokens,
            pending,
            start: chunk.start,
            blocks: chunk.blocks.to_vec(),
            prompt_logprobs: chunk.prompt_logprobs.map(prompt_logprobs),
            sample: chunk.sample.map(sample),
            allowed: chunk.sample.and_then(|sample| sample.allowed.cloned()),
            pool_from: chunk.pool_from,
        }
    }

    fn borrow(&self) -> StepChunk<'_> {
        let prompt_logprobs = self.prompt_logprobs.as_ref();
        let sample = self.sample.as_ref();
        StepChunk {
            input: Input::Tokens(&self.tokens),
            start: self.start,
            blocks: &self.blocks,
            prompt_logprobs: prompt_logprobs.map(|(first_row, tokens, top)| PromptLogprobs {
                first_row: *first_row,
                tokens,
                top: *top,
            }),
            sample: sample.map(|(params, prompt, output)| Sample {
                params,
                prompt,
                output,
                pending: 0,
                allowed: self.allowed.as_ref(),
            }),
            pool_from: self.pool_from,
        }
    }
}
