//! [`HostExecutor`]: a model that computes on the calling thread, with its logits and its KV cache
//! in this process's memory.

#![expect(unsafe_code, reason = "passes on what is promised about the KV cache")]

use std::sync::Arc;
use std::time::Instant;

use baton_kernels::Dtype;
use baton_kernels::cpu::{KvLayout, KvStore};
use baton_proto::geometry::{KvDtype, KvGeometry};

use crate::executor::{AfterLayer, DeviceFailure, Executor, Input, Step, StepChunk};
use crate::forward::{Chunk, Forward, Wanted};
use crate::memory::KvMemory;
use crate::pooling::pool;
use crate::sampler::{Sampler, logprobs};
use crate::scheduler::Outcome;

/// Computes a step when it is launched; nothing runs ahead.
pub struct HostExecutor<F> {
    model: F,
    sampler: Sampler,
    store: Option<Arc<KvStore>>,
    /// The step that was launched: its results, or none if it was given up.
    launched: Option<Option<Outcome>>,
}

impl<F: Forward> HostExecutor<F> {
    /// Serves `model`.
    #[must_use]
    pub fn new(model: F) -> Self {
        let sampler = Sampler::new(model.vocab_size());
        Self { model, sampler, store: None, launched: None }
    }

    /// # Safety
    /// As for [`Executor::launch`].
    unsafe fn compute(
        &mut self,
        step: &Step<'_>,
        after_layer: &mut AfterLayer<'_>,
    ) -> Option<Outcome> {
        let began = Instant::now();
        let store = self.store.as_ref().expect("the cache is allocated before the first launch");
        let chunks: Vec<Chunk<'_>> = step.chunks.iter().map(chunk).collect();
        let rows = wanted_rows(&chunks);
        let mut outcome = Outcome {
            sampled: vec![None; chunks.len()],
            prompt_logprobs: vec![Vec::new(); chunks.len()],
            pooled: vec![Vec::new(); chunks.len()],
            ..Outcome::default()
        };
        let sampler = &mut self.sampler;
        let mut read = |row: usize, values: &mut [f32]| {
            let (index, row) = rows[row];
            if step.chunks[index].pool_from.is_some() {
                return pool(&mut outcome.pooled[index], values.iter().map(|x| f64::from(*x)));
            }
            read_logits(sampler, &step.chunks[index], (index, row), values, &mut outcome);
        };
        // SAFETY: the caller's promise.
        let done = unsafe { self.model.forward(&chunks, store, after_layer, &mut read) };
        outcome.took = began.elapsed();
        done.is_continue().then_some(outcome)
    }
}

impl<F: Forward> Executor for HostExecutor<F> {
    fn revision(&self) -> [u8; 32] {
        self.model.revision()
    }

    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        self.model.geometry(block_tokens)
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn hidden_size(&self) -> usize {
        self.model.hidden_size()
    }

    fn max_model_len(&self) -> usize {
        self.model.max_model_len()
    }

    fn depth(&self) -> usize {
        1
    }

    fn allocate(&mut self, block_tokens: u32, blocks: usize) -> KvMemory {
        let layout = kv_layout(&self.model.geometry(block_tokens));
        let store = self.store.insert(Arc::new(KvStore::new(layout, blocks)));
        KvMemory::Host(store.clone())
    }

    unsafe fn launch(
        &mut self,
        step: &Step<'_>,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<(), DeviceFailure> {
        assert!(self.launched.is_none(), "a step is finished before the next one is launched");
        // SAFETY: the caller's promise.
        self.launched = Some(unsafe { self.compute(step, after_layer) });
        Ok(())
    }

    fn finish(&mut self, _: &mut AfterLayer<'_>) -> Result<Option<Outcome>, DeviceFailure> {
        Ok(self.launched.take().expect("only launched steps are finished"))
    }
}

fn kv_layout(geometry: &KvGeometry) -> KvLayout {
    let dtype = match geometry.dtype {
        KvDtype::F32 => Dtype::F32,
        KvDtype::Bf16 => Dtype::Bf16,
        KvDtype::F16 => Dtype::F16,
        KvDtype::Fp8 => unreachable!("no model of the CPU is loaded with it"),
    };
    KvLayout {
        layers: geometry.layers as usize,
        kv_heads: geometry.kv_heads as usize,
        head_dim: geometry.head_dim as usize,
        block_tokens: geometry.block_tokens as usize,
        dtype,
    }
}

fn chunk<'a>(chunk: &StepChunk<'a>) -> Chunk<'a> {
    let Input::Tokens(tokens) = chunk.input else {
        panic!("nothing is pending where nothing runs ahead");
    };
    let wanted = match (chunk.pool_from, chunk.prompt_logprobs, chunk.sample) {
        (Some(first), ..) => Wanted::Hidden(first),
        (None, Some(_), _) => Wanted::All,
        (None, None, Some(_)) => Wanted::Last,
        (None, None, None) => Wanted::None,
    };
    Chunk { tokens, start: chunk.start, blocks: chunk.blocks, wanted }
}

/// Of every wanted row, which chunk it is of and which row of that.
fn wanted_rows(chunks: &[Chunk<'_>]) -> Vec<(usize, usize)> {
    let rows = |chunk: &Chunk<'_>| chunk.wanted.rows(chunk.tokens.len());
    let chunks = chunks.iter().enumerate();
    chunks.flat_map(|(i, chunk)| rows(chunk).map(move |row| (i, row))).collect()
}

fn read_logits(
    sampler: &mut Sampler,
    chunk: &StepChunk<'_>,
    (index, row): (usize, usize),
    values: &[f32],
    outcome: &mut Outcome,
) {
    if let Some(prompt) = chunk.prompt_logprobs
        && let Some(token) = row.checked_sub(prompt.first_row).and_then(|i| prompt.tokens.get(i))
    {
        let found = logprobs(values, *token, prompt.top);
        outcome.prompt_logprobs[index].push((*token, found));
    }
    if let Some(sample) = chunk.sample
        && row + 1 == chunk.input.rows()
    {
        outcome.sampled[index] = Some(sampler.sample(values, &sample));
    }
}
