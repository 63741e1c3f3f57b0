//! Batches in device memory.

use baton_kernels::cuda::{Buffer, DeviceSampler, Element, MAX_TOP, NO_LOGPROBS, Stream};
use baton_kernels::cuda::{SamplingInputs, SamplingOutputs, SamplingRow};

use crate::rows::Row;
use crate::sampled::Sampled;

pub(crate) const HISTORY_STRIDE: usize = 64;
/// What no token is.
pub(crate) const UNTOUCHED: u32 = 0xdead_beef;

/// What a batch is to the device.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) logits: Vec<f32>,
    pub(crate) params: Vec<SamplingRow>,
    pub(crate) lengths: Vec<u32>,
    pub(crate) histories: Vec<u32>,
    pub(crate) ends: Vec<u32>,
    pub(crate) biases: (Vec<u32>, Vec<f32>),
    pub(crate) allowed: Vec<u32>,
}

impl Batch {
    pub(crate) fn of(rows: &[Row], vocab: usize) -> Self {
        let mut batch = Self::default();
        // Histories are in another order than rows.
        let histories = rows.iter().rev();
        for Row { prompt, output, .. } in histories {
            let tokens = prompt.iter().chain(output).copied().chain(std::iter::repeat(UNTOUCHED));
            batch.histories.extend(tokens.take(HISTORY_STRIDE));
        }
        for (i, row) in rows.iter().enumerate() {
            batch.push(row, (rows.len() - 1 - i) as u32, vocab);
        }
        batch
    }

    fn push(&mut self, row: &Row, history: u32, vocab: usize) {
        let Row { params, prompt, output, .. } = row;
        self.logits.extend_from_slice(&row.logits);
        // What pads rows must not be sampled.
        self.logits.resize(self.logits.len().next_multiple_of(4), f32::INFINITY);
        assert!(self.logits.len().is_multiple_of(DeviceSampler::stride(vocab)));
        self.lengths.push((prompt.len() + output.len()) as u32);
        let (ends_start, biases_start) = (self.ends.len() as u32, self.biases.0.len() as u32);
        self.ends.extend(params.eos_token_ids.iter().chain(&params.stop_token_ids));
        self.biases.0.extend(params.logit_bias.iter().map(|bias| bias.0));
        self.biases.1.extend(params.logit_bias.iter().map(|bias| bias.1));
        let allowed = row.allowed.clone().unwrap_or_else(|| vec![false; vocab]);
        self.allowed.extend(allowed.chunks(32).map(|word| {
            word.iter().enumerate().fold(0, |bits, (i, allowed)| bits | u32::from(*allowed) << i)
        }));
        self.params.push(SamplingRow {
            seed: params.seed,
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            top_k: params.top_k,
            min_tokens: params.min_tokens,
            history,
            prompt_tokens: prompt.len() as u32,
            ends_start,
            ends_count: self.ends.len() as u32 - ends_start,
            biases_start,
            biases_count: params.logit_bias.len() as u32,
            logprobs: params.logprobs.unwrap_or(NO_LOGPROBS),
            constrained: u32::from(row.allowed.is_some()),
        });
    }

    pub(crate) fn run(
        &self,
        stream: &Stream,
        sampler: &mut DeviceSampler,
        all_greedy: bool,
    ) -> Sampled {
        let there = There::new(stream, self);
        sampler.sample(stream, &there.inputs(), &there.outputs(), all_greedy).unwrap();
        there.sampled(stream)
    }
}

/// A batch in device memory, and what is sampled from it.
pub(crate) struct There {
    pub(crate) logits: Buffer<f32>,
    pub(crate) params: Buffer<SamplingRow>,
    pub(crate) lengths: Buffer<u32>,
    pub(crate) histories: Buffer<u32>,
    pub(crate) ends: Buffer<u32>,
    pub(crate) biases: (Buffer<u32>, Buffer<f32>),
    pub(crate) allowed: Buffer<u32>,
    pub(crate) tokens: Buffer<u32>,
    pub(crate) logprobs: Buffer<f32>,
    pub(crate) top_tokens: Buffer<u32>,
    pub(crate) top_logprobs: Buffer<f32>,
}

impl There {
    pub(crate) fn new(stream: &Stream, batch: &Batch) -> Self {
        let rows = batch.params.len();
        Self {
            logits: upload(stream, &batch.logits),
            params: upload(stream, &batch.params),
            lengths: upload(stream, &batch.lengths),
            histories: upload(stream, &batch.histories),
            ends: upload(stream, &batch.ends),
            biases: (upload(stream, &batch.biases.0), upload(stream, &batch.biases.1)),
            allowed: upload(stream, &batch.allowed),
            tokens: upload(stream, &vec![UNTOUCHED; rows]),
            logprobs: upload(stream, &vec![f32::NAN; rows]),
            top_tokens: upload(stream, &vec![UNTOUCHED; rows * MAX_TOP]),
            top_logprobs: upload(stream, &vec![f32::NAN; rows * MAX_TOP]),
        }
    }

    pub(crate) fn inputs(&self) -> SamplingInputs<'_> {
        SamplingInputs {
            logits: self.logits.all(),
            params: self.params.all(),
            lengths: self.lengths.all(),
            histories: self.histories.all(),
            history_stride: HISTORY_STRIDE,
            ends: self.ends.all(),
            biases: (self.biases.0.all(), self.biases.1.all()),
            allowed: self.allowed.all(),
        }
    }

    pub(crate) fn outputs(&self) -> SamplingOutputs<'_> {
        SamplingOutputs {
            tokens: self.tokens.all(),
            logprobs: self.logprobs.all(),
            top_tokens: self.top_tokens.all(),
            top_logprobs: self.top_logprobs.all(),
        }
    }

    pub(crate) fn sampled(&self, stream: &Stream) -> Sampled {
        Sampled {
            tokens: stream.read(self.tokens.all()).unwrap(),
            logprobs: stream.read(self.logprobs.all()).unwrap(),
            top_tokens: stream.read(self.top_tokens.all()).unwrap(),
            top_logprobs: stream.read(self.top_logprobs.all()).unwrap(),
        }
    }
}

pub(crate) fn upload<T: Element>(stream: &Stream, contents: &[T]) -> Buffer<T> {
    stream.buffer(contents).unwrap()
}
