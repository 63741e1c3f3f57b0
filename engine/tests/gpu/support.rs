//! A model on a GPU with room for some sequences.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_engine::gpu::{GpuLoadError, GpuModel, GpuOptions, ParallelModel, WeightDtype};
use baton_engine::model::LoadFormat;
use baton_engine::scheduler::Outcome;
use baton_engine::{
    DeviceFailure, Executor, Input, KvMemory, PromptLogprobs, Sample, Step, StepChunk,
};
use baton_kernels::cuda::{Device, Libraries, Nccl, testing};
use baton_proto::geometry::KvDtype;
use baton_proto::sampling::SamplingParams;

/// The device of these tests. None, with the reason printed, if there is none, or no library to
/// multiply by.
pub(crate) fn device() -> Option<&'static Arc<Device>> {
    testing::products_device().map(|test| &test.device)
}

/// So many devices. None, with the reason printed, if they are not as many, or lack a library.
pub(crate) fn devices(count: usize) -> Option<Vec<Arc<Device>>> {
    let paths = &testing::test_device()?.paths;
    let nccl = if count > 1 { Nccl::find(paths).map(drop) } else { Ok(()) };
    let found = Libraries::find(paths).and_then(|libraries| nccl.map(|()| libraries));
    let libraries = found.map_err(|missing| println!("skipped: {missing}")).ok()?;
    if Device::count(&libraries).unwrap() < count {
        println!("skipped: needs {count} devices");
        return None;
    }
    Some((0..count).map(|ordinal| Device::open(&libraries, ordinal).unwrap()).collect())
}

pub(crate) fn load_model(
    devices: &[Arc<Device>],
    options: GpuOptions<'_>,
) -> Result<Box<dyn Executor>, GpuLoadError> {
    if let [device] = devices {
        return Ok(Box::new(GpuModel::load(device, options)?));
    }
    let nccl = Nccl::find(&testing::test_device().unwrap().paths).expect("as with the devices");
    Ok(Box::new(ParallelModel::load(devices, &nccl, options)?))
}

/// Types of a model on a device, if not those of its checkpoint.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Types {
    pub(crate) weights: WeightDtype,
    pub(crate) kv: Option<KvDtype>,
}

/// What is to be generated.
pub(crate) struct Asked<'a> {
    prompt: &'a [u32],
    params: SamplingParams,
}

impl<'a> Asked<'a> {
    pub(crate) fn greedy(prompt: &'a [u32]) -> Self {
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        Self { prompt, params }
    }

    /// Greedy, with biases that need room and change nothing.
    pub(crate) fn biased(prompt: &'a [u32], count: u32) -> Self {
        let logit_bias = (0..count).map(|token| (token, 0.0)).collect();
        let params = SamplingParams { temperature: 0.0, logit_bias, ..SamplingParams::default() };
        Self { prompt, params }
    }

    /// With penalties, for which the device needs to know what it sampled before.
    pub(crate) fn sampled(prompt: &'a [u32]) -> Self {
        let params = SamplingParams {
            seed: prompt.len() as u64,
            top_k: 50,
            repetition_penalty: 1.7,
            frequency_penalty: 0.9,
            logprobs: Some(2),
            logit_bias: vec![(3, -5.0), (4, 1.0), (4, 1.0)],
            min_tokens: 4,
            stop_token_ids: vec![5, 6],
            ..SamplingParams::default()
        };
        Self { prompt, params }
    }
}

/// Blocks of a sequence.
const BLOCKS: usize = 8;

pub(crate) struct Gpu {
    model: Box<dyn Executor>,
    sequences: usize,
    _memory: KvMemory,
}

impl Gpu {
    pub(crate) fn load(
        device: &Arc<Device>,
        dir: &Path,
        block_tokens: usize,
        sequences: usize,
    ) -> Self {
        let loaded = Self::try_load(device, dir, block_tokens, sequences);
        loaded.unwrap_or_else(|e| panic!("{e}"))
    }

    pub(crate) fn try_load(
        device: &Arc<Device>,
        dir: &Path,
        block_tokens: usize,
        sequences: usize,
    ) -> Result<Self, GpuLoadError> {
        Self::load_to(std::slice::from_ref(device), dir, block_tokens, sequences)
    }

    /// To several devices that compute together, if they are more than one.
    pub(crate) fn load_to(
        devices: &[Arc<Device>],
        dir: &Path,
        block_tokens: usize,
        sequences: usize,
    ) -> Result<Self, GpuLoadError> {
        Self::load_within(devices, dir, (block_tokens, sequences), Duration::ZERO)
    }

    pub(crate) fn load_as(
        devices: &[Arc<Device>],
        dir: &Path,
        block_tokens: usize,
        sequences: usize,
        types: Types,
    ) -> Result<Self, GpuLoadError> {
        Self::load_with(devices, dir, (block_tokens, sequences), types, Duration::ZERO)
    }

    /// With so much time to prepare.
    pub(crate) fn load_within(
        devices: &[Arc<Device>],
        dir: &Path,
        sizes: (usize, usize),
        warm_up: Duration,
    ) -> Result<Self, GpuLoadError> {
        Self::load_with(devices, dir, sizes, Types::default(), warm_up)
    }

    fn load_with(
        devices: &[Arc<Device>],
        dir: &Path,
        (block_tokens, sequences): (usize, usize),
        types: Types,
        warm_up: Duration,
    ) -> Result<Self, GpuLoadError> {
        let mut done = (0, 0);
        let options = GpuOptions {
            dir,
            format: LoadFormat::Safetensors,
            threads: 2,
            max_model_len: None,
            weight_dtype: types.weights,
            kv_dtype: types.kv,
            block_tokens,
            max_batch_tokens: 128,
            max_sequences: sequences,
            warm_up,
            on_progress: &mut |progress| done = (progress.done_bytes, progress.total_bytes),
        };
        let mut model = load_model(devices, options)?;
        assert!(done.0 == done.1 && done.0 > 0, "all weights were read");
        let _memory = model.allocate(block_tokens as u32, BLOCKS * sequences);
        Ok(Self { model, sequences, _memory })
    }

    pub(crate) fn model(&self) -> &dyn Executor {
        &*self.model
    }

    /// Sequence `i` has blocks `i, i + sequences, ...`, so that no sequence's blocks adjoin.
    pub(crate) fn blocks(&self, sequence: usize) -> Vec<u32> {
        (0..BLOCKS).map(|i| (i * self.sequences + sequence) as u32).collect()
    }

    pub(crate) fn launch(&mut self, step: &Step<'_>) {
        // SAFETY: nobody else has the cache, and every chunk is of its own sequence.
        #[allow(unsafe_code)]
        unsafe { self.model.launch(step, &mut |_| panic!("nothing is complete at once")) }.unwrap();
    }

    pub(crate) fn finish(&mut self) -> Outcome {
        self.try_finish().unwrap()
    }

    pub(crate) fn try_finish(&mut self) -> Result<Outcome, DeviceFailure> {
        let mut ignore = |_| ControlFlow::Continue(());
        Ok(self.model.finish(&mut ignore)?.expect("a GPU gives no step up"))
    }

    /// `count` tokens of each sequence, all prompts in the first step. `ahead`: each step is queued
    /// before the results of the last one are read; `watched`: no step is a graph.
    pub(crate) fn generate(
        &mut self,
        asked: &[Asked<'_>],
        count: usize,
        ahead: bool,
        watched: bool,
    ) -> Vec<Vec<u32>> {
        let mut outputs: Vec<Vec<u32>> = vec![Vec::new(); asked.len()];
        for step in 0..count {
            self.launch_next(asked, &outputs, step, watched);
            if !ahead || step > 0 {
                self.note(&mut outputs);
            }
        }
        if ahead {
            self.note(&mut outputs);
        }
        outputs
    }

    fn launch_next(
        &mut self,
        asked: &[Asked<'_>],
        outputs: &[Vec<u32>],
        step: usize,
        watched: bool,
    ) {
        let tables: Vec<_> = (0..asked.len()).map(|i| self.blocks(i)).collect();
        let chunks = asked.iter().zip(outputs).enumerate();
        let chunks = chunks.map(|(i, (Asked { prompt, params }, output))| {
            let pending = step - output.len();
            let input = match step {
                0 => Input::Tokens(prompt),
                _ if pending == 0 => Input::Tokens(&output[step - 1..]),
                _ => Input::Pending(i),
            };
            StepChunk {
                input,
                start: if step == 0 { 0 } else { prompt.len() + step - 1 },
                blocks: &tables[i],
                prompt_logprobs: None,
                sample: Some(Sample { params, prompt, output, pending, allowed: None }),
                pool_from: None,
            }
        });
        let chunks = chunks.collect();
        self.launch(&Step { chunks, watched });
    }

    fn note(&mut self, outputs: &mut [Vec<u32>]) {
        let sampled = self.finish().sampled.into_iter().flatten();
        outputs.iter_mut().zip(sampled).for_each(|(output, sampled)| output.push(sampled.token));
    }

    /// By position from 1 on: the log-probability of the token there, computed in chunks.
    pub(crate) fn prompt_logprobs(&mut self, tokens: &[u32], chunk: usize) -> Vec<f32> {
        let blocks = self.blocks(0);
        let mut found = Vec::new();
        for start in (0..tokens.len()).step_by(chunk) {
            let end = tokens.len().min(start + chunk);
            let next = &tokens[start + 1..tokens.len().min(end + 1)];
            let chunk = StepChunk {
                input: Input::Tokens(&tokens[start..end]),
                start,
                blocks: &blocks,
                prompt_logprobs: Some(PromptLogprobs { first_row: 0, tokens: next, top: 1 }),
                sample: None::<Sample<'_>>,
                pool_from: None,
            };
            self.launch(&Step { chunks: vec![chunk], watched: false });
            let outcome = self.finish();
            let logprobs = outcome.prompt_logprobs.into_iter().flatten();
            found.extend(logprobs.zip(next).map(|((token, found), next)| {
                assert_eq!(token, *next);
                found.logprob
            }));
        }
        found
    }
}
