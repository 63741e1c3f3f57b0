//! What a step asks of the device's sampler, and what it answers.

use std::ops::Range;

use baton_kernels::cuda::{MAX_TOP, NO_LOGPROBS, SAMPLED, SamplingRow};
use baton_proto::message::Logprobs;
use baton_proto::sampling::SamplingParams;

use super::packing::Packing;
use super::rows::Rows;
use crate::executor::{Input, Sample, Step};
use crate::sampler::Sampled;

/// Words of a [`SamplingRow`].
const ROW_WORDS: usize = size_of::<SamplingRow>() / 4;

/// Where the parameters of a step lie.
pub(super) struct Places {
    /// [`SamplingRow`] of each row that samples.
    pub(super) params: Range<usize>,
    /// Tokens of prompt and output of each.
    pub(super) lengths: Range<usize>,
    /// End-of-sequence and stop tokens of all.
    pub(super) ends: Range<usize>,
    /// Tokens with a bias, of all.
    pub(super) biased: Range<usize>,
    /// Their biases.
    pub(super) biases: Range<usize>,
    /// Sources of the tokens of sequences with penalties.
    pub(super) histories: Range<usize>,
    /// Masks of all rows that sample, or empty if no row has one.
    pub(super) allowed: Range<usize>,
    /// No row wants anything but its likeliest token.
    pub(super) greedy: bool,
}

/// Packs the parameters of the rows that sample. `sampled`: see [`Rows::sources`].
pub(super) fn pack(
    packing: &mut Packing,
    rows: &Rows,
    step: &Step<'_>,
    sampled: &[Option<u32>],
) -> Places {
    let mut lists = Lists::default();
    let (mut params, mut lengths) = (Vec::new(), Vec::new());
    let mut greedy = true;
    for &index in &rows.sampling {
        let chunk = &step.chunks[index];
        let sample = chunk.sample.expect("it samples");
        let pending = match chunk.input {
            Input::Tokens(_) => None,
            Input::Pending(before) => sampled[before],
        };
        greedy &= sample.params.temperature == 0.0;
        lengths.push((sample.prompt.len() + sample.output.len() + sample.pending) as u32);
        params.extend(words(&lists.row(sample, pending)));
    }
    Places {
        params: packing.array(params),
        lengths: packing.array(lengths),
        ends: packing.array(lists.ends),
        biased: packing.array(lists.biased),
        biases: packing.array(lists.biases.into_iter().map(f32::to_bits)),
        histories: packing.array(lists.histories),
        allowed: packing.array(masks(rows, step)),
        greedy,
    }
}

/// A mask for each row that samples, zeros where there is none; nothing if there is none at all.
fn masks<'a>(rows: &'a Rows, step: &'a Step<'_>) -> impl Iterator<Item = u32> + 'a {
    let mask = |index: &usize| step.chunks[*index].sample.and_then(|sample| sample.allowed);
    let words = rows.sampling.iter().find_map(mask).map_or(0, |mask| mask.words().len());
    rows.sampling.iter().flat_map(move |index| {
        let mask = mask(index).map_or(&[][..], |mask| mask.words());
        mask.iter().copied().chain(std::iter::repeat_n(0, words - mask.len()))
    })
}

/// Lists that rows have parts of.
#[derive(Default)]
struct Lists {
    ends: Vec<u32>,
    biased: Vec<u32>,
    biases: Vec<f32>,
    histories: Vec<u32>,
}

impl Lists {
    fn row(&mut self, sample: Sample<'_>, pending: Option<u32>) -> SamplingRow {
        let p = sample.params;
        let (ends_start, biases_start) = (self.ends.len(), self.biased.len());
        self.ends.extend(p.eos_token_ids.iter().chain(&p.stop_token_ids));
        self.add_biases(p);
        let history = self.histories.len() as u32;
        if penalizes(p) {
            self.histories.extend(sample.prompt.iter().chain(sample.output));
            self.histories.extend(pending.map(|row| SAMPLED | row));
        }
        SamplingRow {
            seed: p.seed,
            temperature: p.temperature,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            top_k: p.top_k,
            // A mask has seen to it.
            min_tokens: if sample.allowed.is_some() { 0 } else { p.min_tokens },
            history,
            prompt_tokens: sample.prompt.len() as u32,
            ends_start: ends_start as u32,
            ends_count: (self.ends.len() - ends_start) as u32,
            biases_start: biases_start as u32,
            biases_count: (self.biased.len() - biases_start) as u32,
            logprobs: p.logprobs.unwrap_or(NO_LOGPROBS),
            constrained: u32::from(sample.allowed.is_some()),
        }
    }

    /// The device takes a token once for a row.
    fn add_biases(&mut self, params: &SamplingParams) {
        let mut entries = params.logit_bias.clone();
        entries.sort_by_key(|(token, _)| *token);
        for same in entries.chunk_by(|(one, _), (other, _)| one == other) {
            self.biased.push(same[0].0);
            self.biases.push(same.iter().map(|(_, bias)| bias).sum());
        }
    }
}

fn penalizes(p: &SamplingParams) -> bool {
    p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0
}

/// A row as the device reads it.
fn words(row: &SamplingRow) -> [u32; ROW_WORDS] {
    let seed = [row.seed as u32, (row.seed >> 32) as u32];
    let floats = [
        row.temperature,
        row.top_p,
        row.min_p,
        row.repetition_penalty,
        row.presence_penalty,
        row.frequency_penalty,
    ];
    let integers = [
        row.top_k,
        row.min_tokens,
        row.history,
        row.prompt_tokens,
        row.ends_start,
        row.ends_count,
        row.biases_start,
        row.biases_count,
        row.logprobs,
        row.constrained,
    ];
    let mut words = [0; ROW_WORDS];
    let all = seed.into_iter().chain(floats.map(f32::to_bits)).chain(integers);
    words.iter_mut().zip(all).for_each(|(to, word)| *to = word);
    words
}

/// What the device sampled, of each row: `[rows]` tokens and log-probabilities, and `[rows,
/// MAX_TOP]` alternatives.
pub(super) struct Answers<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) logprobs: &'a [u32],
    pub(super) top_tokens: &'a [u32],
    pub(super) top_logprobs: &'a [u32],
}

impl Answers<'_> {
    /// The token of a row, with `top` alternatives if log-probabilities are wanted.
    pub(super) fn sampled(&self, row: usize, top: Option<u32>) -> Sampled {
        let alternatives = |count: u32| {
            let range = row * MAX_TOP..row * MAX_TOP + count as usize;
            let logprobs =
                self.top_logprobs[range.clone()].iter().map(|bits| f32::from_bits(*bits));
            self.top_tokens[range].iter().copied().zip(logprobs).collect()
        };
        let logprobs = top.map(|count| Logprobs {
            logprob: f32::from_bits(self.logprobs[row]),
            top: alternatives(count),
        });
        Sampled { token: self.tokens[row], logprobs }
    }
}
