//! What a step of a [`Scheduler`] changed.

use std::time::Duration;

use baton_proto::message::{Logprobs, Retry, TokenEvent};

use super::{Event, Plan, PlannedChunk, Scheduler};
use crate::events::Kind;
#[cfg(doc)]
use crate::executor::StepChunk;
use crate::pooling::{embedding, pool};
use crate::sampler::Sampled;

/// The results of a computed plan.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// For every chunk, the token that was sampled from its last row, if it
    /// [samples](PlannedChunk::samples).
    pub sampled: Vec<Option<Sampled>>,
    /// For every chunk, log-probabilities of the prompt that follow those which its sequence has.
    pub prompt_logprobs: Vec<Vec<(u32, Logprobs)>>,
    /// For every chunk, the sum over the hidden states that it [pools](StepChunk::pool_from);
    /// empty if it pools none or the host had no memory for them.
    pub pooled: Vec<Vec<f64>>,
    /// How long the step took.
    pub took: Duration,
}

impl Scheduler {
    /// The step of the oldest plan in flight was computed with this outcome, one entry per chunk.
    /// Those of sequences that are over are dropped.
    ///
    /// # Panics
    /// If `outcome` is not one of `plan`, or `plan` is not the oldest one in flight.
    pub fn complete(&mut self, plan: &Plan, outcome: Outcome) {
        self.land();
        let mut tokens = Vec::with_capacity(plan.chunks.len());
        let mut over = Vec::new();
        let results = outcome.sampled.into_iter().zip(outcome.prompt_logprobs).zip(outcome.pooled);
        assert_eq!(plan.chunks.len(), results.len(), "an outcome has an entry per chunk");
        let per_token = outcome.took.div_f64(plan.tokens().max(1) as f64);
        for (chunk, ((sampled, prompt_logprobs), pooled)) in plan.chunks.iter().zip(results) {
            // Sequences share a step; what the others computed is not this one's time.
            let share = per_token.mul_f64(chunk.tokens as f64);
            if self.is_over(chunk) {
                continue;
            }
            self.computed(chunk, prompt_logprobs, share);
            if chunk.wanted.is_hidden() {
                self.pooled(chunk, pooled);
            }
            if chunk.samples {
                let sampled = sampled.expect("a chunk that samples has a token");
                let token = self.sampled(chunk, sampled);
                let export = self.sequences[&chunk.number].kind == Kind::Export;
                if export || token.finish.is_some() {
                    over.push(chunk.number);
                } else {
                    self.lacks_mask(chunk.number);
                }
                tokens.push(token);
            }
        }
        if !tokens.is_empty() {
            self.events.push(Event::Tokens(tokens));
        }
        for number in over {
            self.end(number);
        }
    }

    fn computed(&mut self, chunk: &PlannedChunk, more: Vec<(u32, Logprobs)>, took: Duration) {
        let sequence = self.sequences.get_mut(&chunk.number).expect("planned sequences are here");
        assert_eq!(sequence.computed, chunk.start, "a plan is completed once");
        sequence.computed = chunk.end();
        if !chunk.decode {
            sequence.prefill += took;
        }
        if let Some(tokens) = &mut sequence.prompt_logprobs {
            tokens.extend(more);
            if tokens.len() + 1 == sequence.prompt_tokens {
                let tokens = sequence.prompt_logprobs.take().unwrap_or_default();
                self.events.push(Event::PromptLogprobs { id: chunk.id, tokens });
            }
        }
        self.cache_full_blocks(chunk.number);
    }

    /// Hidden states of an embedding came; with the last ones it ends.
    fn pooled(&mut self, chunk: &PlannedChunk, sum: Vec<f64>) {
        let sequence = self.sequences.get_mut(&chunk.number).expect("planned sequences are here");
        let Kind::Embed(pooling) = sequence.kind else { return };
        if sum.is_empty() {
            let reason = "there is no memory for hidden states".to_owned();
            return self.fail(chunk.number, reason, Retry::OtherNode);
        }
        pool(&mut sequence.pooled, sum.into_iter());
        let tokens = sequence.tokens.len();
        if chunk.end() < tokens {
            return;
        }
        let Some(values) = embedding(pooling, &sequence.pooled, tokens) else {
            let reason = "the embedding has elements that are not finite".to_owned();
            return self.fail(chunk.number, reason, Retry::Never);
        };
        let prefill = sequence.prefill;
        self.events.push(Event::Embedded { id: chunk.id, values, prefill });
        self.end(chunk.number);
    }

    fn sampled(&mut self, chunk: &PlannedChunk, sampled: Sampled) -> TokenEvent {
        let sequence = self.sequences.get_mut(&chunk.number).expect("planned sequences are here");
        let position = sequence.output().len();
        sequence.pending -= 1;
        sequence.push(sampled.token, self.limits.block_tokens);
        let first = !std::mem::replace(&mut sequence.sampled, true);
        TokenEvent {
            id: chunk.id,
            position: u32::try_from(position).expect("max_tokens is a u32"),
            token: sampled.token,
            logprobs: sampled.logprobs,
            finish: sequence.finish(self.limits.max_model_len),
            prefill: first.then_some(sequence.prefill),
        }
    }
}
