//! [`Sampler`]: from logits to a token.
//!
//! The token is a pure function of the logits, the parameters, prompt and output so far, and the
//! position: the same request gives the same tokens on any node and in any batch. Steps, in this
//! order (that of Hugging Face transformers and vLLM):
//!
//! 1. what a grammar does not allow becomes impossible
//! 2. logit bias is added
//! 3. `min_tokens`: end-of-sequence and stop tokens become impossible; with a grammar its mask has
//!    seen to that
//! 4. repetition penalty for tokens of prompt and output, divided or multiplied once
//! 5. frequency and presence penalty for tokens of the output
//! 6. temperature 0: the largest logit, the lowest id among equal ones; else logits are divided
//! 7. top-k, then top-p of what top-k kept, then min-p; at least one token stays
//! 8. a draw with the random number of (seed, position)
//!
//! Log-probabilities are the log-softmax of the model's own logits, before all of this (as vLLM's
//! default), so they do not depend on how tokens are chosen.
//!
//! Only additions, multiplications and divisions decide the token, never a platform's `exp`.

use baton_grammar::TokenMask;
use baton_proto::message::Logprobs;
use baton_proto::sampling::SamplingParams;

mod filter;
mod numeric;
#[cfg(test)]
mod tests;

use crate::executor::Sample;
use filter::Filter;
use numeric::{exp, uniform};

/// Below this, a temperature is 0: logits divided by less would lose their digits.
const MIN_TEMPERATURE: f32 = 1e-5;

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// If asked for.
    pub logprobs: Option<Logprobs>,
}

/// Chooses tokens. Keeps nothing between calls but memory to use again.
#[derive(Debug)]
pub struct Sampler {
    /// Occurrences by token; all zero between calls.
    counts: Vec<u32>,
    /// Logits after bias, masks and penalties.
    adjusted: Vec<f32>,
    /// By token, proportional to its probability; 0 once it is filtered out.
    weights: Vec<f32>,
    filter: Filter,
}

impl Sampler {
    /// A sampler for `vocab_size` tokens.
    #[must_use]
    pub fn new(vocab_size: usize) -> Self {
        Self {
            counts: vec![0; vocab_size],
            adjusted: Vec::with_capacity(vocab_size),
            weights: Vec::with_capacity(vocab_size),
            filter: Filter::default(),
        }
    }

    /// Chooses the next token of a sequence all of whose tokens are known. Token ids outside the
    /// vocabulary are ignored.
    pub fn sample(&mut self, logits: &[f32], sample: &Sample<'_>) -> Sampled {
        let Sample { params, output, .. } = *sample;
        let token = if adjusts(sample) {
            let mut adjusted = std::mem::take(&mut self.adjusted);
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            self.adjust(&mut adjusted, sample);
            let token = self.choose(&adjusted, params, output.len());
            self.adjusted = adjusted;
            token
        } else {
            self.choose(logits, params, output.len())
        };
        let logprobs = params.logprobs.map(|top| logprobs(logits, token, top as usize));
        Sampled { token, logprobs }
    }

    fn adjust(&mut self, logits: &mut [f32], sample: &Sample<'_>) {
        let Sample { params, prompt, output, allowed, .. } = *sample;
        if let Some(allowed) = allowed {
            forbid(logits, allowed);
        }
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if masks(sample) {
            for &token in params.eos_token_ids.iter().chain(&params.stop_token_ids) {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if params.repetition_penalty != 1.0 {
            self.penalize_repetition(logits, params.repetition_penalty, prompt, output);
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            self.penalize_output(logits, params, output);
        }
    }

    fn penalize_repetition(
        &mut self,
        logits: &mut [f32],
        penalty: f32,
        prompt: &[u32],
        output: &[u32],
    ) {
        let seen = || prompt.iter().chain(output).map(|&token| token as usize);
        for token in seen() {
            let Some(count) = self.counts.get_mut(token) else { continue };
            *count += 1;
            if *count == 1 {
                let logit = &mut logits[token];
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        self.forget(seen());
    }

    fn penalize_output(&mut self, logits: &mut [f32], params: &SamplingParams, output: &[u32]) {
        let seen = || output.iter().map(|&token| token as usize);
        for count in seen() {
            if let Some(count) = self.counts.get_mut(count) {
                *count += 1;
            }
        }
        for token in seen() {
            let count = self.counts.get_mut(token).map_or(0, std::mem::take);
            if count > 0 {
                logits[token] -= params.frequency_penalty * count as f32;
                logits[token] -= params.presence_penalty;
            }
        }
    }

    fn forget(&mut self, tokens: impl Iterator<Item = usize>) {
        for token in tokens {
            if let Some(count) = self.counts.get_mut(token) {
                *count = 0;
            }
        }
    }

    fn choose(&mut self, logits: &[f32], params: &SamplingParams, position: usize) -> u32 {
        let likeliest = argmax(logits);
        if params.temperature < MIN_TEMPERATURE {
            return likeliest;
        }
        let (max, inverse) = (logits[likeliest as usize], 1.0 / params.temperature);
        self.weights.clear();
        self.weights.extend(logits.iter().map(|logit| exp((logit - max) * inverse)));
        self.filter.apply(logits, &mut self.weights, params);
        let random = uniform(params.seed, position as u64);
        draw(&self.weights, random).unwrap_or(likeliest)
    }
}

/// Makes impossible what a mask does not allow.
fn forbid(logits: &mut [f32], allowed: &TokenMask) {
    for (logits, word) in logits.chunks_mut(32).zip(allowed.words()) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Whether end-of-sequence and stop tokens are impossible.
fn masks(sample: &Sample<'_>) -> bool {
    sample.allowed.is_none() && sample.output.len() < sample.params.min_tokens as usize
}

/// Whether the logits are changed before temperature.
fn adjusts(sample: &Sample<'_>) -> bool {
    let params = sample.params;
    let penalties = [params.presence_penalty, params.frequency_penalty];
    sample.allowed.is_some()
        || !params.logit_bias.is_empty()
        || masks(sample)
        || params.repetition_penalty != 1.0
        || penalties != [0.0, 0.0]
}

/// The largest logit's token, the lowest one among equals.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best.0 as u32
}

/// The token at `random` (in [0, 1)) of the summed weights; `None` if all are zero.
fn draw(weights: &[f32], random: f64) -> Option<u32> {
    let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    let target = random * total;
    let (mut sum, mut last) = (0.0, None);
    for (token, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        sum += f64::from(weight);
        last = Some(token as u32);
        if sum > target {
            break;
        }
    }
    last
}

/// Log-probabilities by the model's own logits: of `token`, and of the `top` likeliest tokens,
/// equal ones in order of their ids.
#[must_use]
pub fn logprobs(logits: &[f32], token: u32, top: usize) -> Logprobs {
    let max = logits[argmax(logits) as usize];
    let sum: f64 = logits.iter().map(|logit| f64::from(exp(logit - max))).sum();
    let normalizer = f64::from(max) + sum.ln();
    let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
    for (token, &logit) in logits.iter().enumerate() {
        if best.len() < top || best.last().is_some_and(|&(_, least)| logit > least) {
            let place = best.partition_point(|&(_, other)| other >= logit);
            best.insert(place, (token as u32, logit));
            best.truncate(top);
        }
    }
    let top = best.into_iter().map(|(token, logit)| (token, logprob(logit))).collect();
    Logprobs { logprob: logprob(logits[token as usize]), top }
}
