//! A decode node's running batch.
//!
//! Every step gives each sequence a token, and takes the next chunk of the prompt that is being
//! computed, if any. While nothing but that changes, steps are added up in closed form.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::{DecodeCost, PrefillCost};

/// Prompt tokens that a step computes.
pub(super) const CHUNK_TOKENS: u32 = 512;

#[derive(Debug)]
pub(super) struct Batch {
    decode_cost: DecodeCost,
    prefill_cost: PrefillCost,
    /// When the current step began, and how many were before it.
    now_ms: f64,
    step: u64,
    sequences: u64,
    kv_tokens: u64,
    /// By the step after which they end: request, and tokens of KV that it then holds.
    ends: BinaryHeap<Reverse<(u64, usize, u64)>>,
    prompts: VecDeque<Prompt>,
    prompt_tokens: u64,
    /// Wait for the current step to end.
    joining: Vec<Joining>,
}

/// What joins a batch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Joining {
    Sequence(Sequence),
    Prompt(Prompt),
}

/// A sequence to be decoded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    pub(super) request: usize,
    /// Of KV, now.
    pub(super) tokens: u32,
    /// To be decoded, at least 1.
    pub(super) remaining: u32,
}

/// A prompt to be computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompt {
    pub(super) request: usize,
    pub(super) done: u32,
    pub(super) total: u32,
    /// Tokens to be decoded after the first.
    pub(super) remaining: u32,
}

/// What the end of a step brought.
#[derive(Debug, Default)]
pub(super) struct Finished {
    /// A prompt, by request.
    pub(super) prompt: Option<usize>,
    /// Sequences, by request.
    pub(super) sequences: Vec<usize>,
}

impl Batch {
    pub(super) fn new(decode_cost: DecodeCost, prefill_cost: PrefillCost) -> Self {
        Self {
            decode_cost,
            prefill_cost,
            now_ms: 0.0,
            step: 0,
            sequences: 0,
            kv_tokens: 0,
            ends: BinaryHeap::new(),
            prompts: VecDeque::new(),
            prompt_tokens: 0,
            joining: Vec::new(),
        }
    }

    /// Takes something in, at the end of the current step.
    pub(super) fn join(&mut self, now_ms: f64, joining: Joining) {
        if let Joining::Prompt(prompt) = joining {
            self.prompt_tokens += u64::from(prompt.total - prompt.done);
        }
        if self.is_idle() {
            self.now_ms = now_ms;
            self.admit(joining);
        } else {
            self.skip_to(now_ms);
            self.joining.push(joining);
        }
    }

    /// When something next changes; `None` without work.
    pub(super) fn next_change_ms(&self) -> Option<f64> {
        if self.is_idle() {
            None
        } else if self.joining.is_empty() && self.prompts.is_empty() {
            let steps = self.steps_to_end();
            let ms = self.decode_cost.steps_ms(steps, self.sequences, self.kv_tokens);
            Some(self.now_ms + ms)
        } else {
            Some(self.now_ms + self.step_ms())
        }
    }

    /// Makes that change; it is that time.
    pub(super) fn change(&mut self, now_ms: f64) -> Finished {
        let alone = self.joining.is_empty() && self.prompts.is_empty();
        let steps = if alone { self.steps_to_end() } else { 1 };
        self.run(steps, now_ms);
        let mut finished = Finished { prompt: self.chunk(), sequences: Vec::new() };
        while let Some(&Reverse((end, request, tokens))) = self.ends.peek()
            && end <= self.step
        {
            self.ends.pop();
            self.sequences -= 1;
            self.kv_tokens -= tokens;
            finished.sequences.push(request);
        }
        for joining in std::mem::take(&mut self.joining) {
            self.admit(joining);
        }
        finished
    }

    pub(super) fn sequences(&self) -> u64 {
        self.sequences
    }

    pub(super) fn kv_tokens(&self) -> u64 {
        self.kv_tokens
    }

    /// Prompt tokens to compute.
    pub(super) fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens
    }

    /// Duration of the current step; 0 without work.
    fn step_ms(&self) -> f64 {
        if self.is_idle() {
            return 0.0;
        }
        let chunk_ms = self
            .prompts
            .front()
            .map_or(0.0, |prompt| self.prefill_cost.compute_ms(prompt.chunk_end(), prompt.done));
        self.decode_cost.ms(self.sequences, self.kv_tokens, chunk_ms)
    }

    /// Duration of a step without a chunk of a prompt; 0 without sequences.
    pub(super) fn decode_step_ms(&self) -> f64 {
        if self.sequences == 0 {
            return 0.0;
        }
        self.decode_cost.ms(self.sequences, self.kv_tokens, 0.0)
    }

    fn is_idle(&self) -> bool {
        self.sequences == 0 && self.prompts.is_empty()
    }

    fn steps_to_end(&self) -> u64 {
        self.ends.peek().map_or(1, |Reverse((end, ..))| end - self.step)
    }

    /// Brings the beginning of the current step up to date.
    fn skip_to(&mut self, now_ms: f64) {
        if self.joining.is_empty() && self.prompts.is_empty() {
            let (cost, sequences, kv) = (self.decode_cost, self.sequences, self.kv_tokens);
            // The change at the end of the last step is an event of its own.
            let steps = cost.steps_within(now_ms - self.now_ms, sequences, kv);
            let steps = steps.min(self.steps_to_end() - 1);
            self.run(steps, self.now_ms + cost.steps_ms(steps, sequences, kv));
        }
    }

    fn run(&mut self, steps: u64, now_ms: f64) {
        self.now_ms = now_ms;
        self.step += steps;
        self.kv_tokens += steps * self.sequences;
    }

    /// Counts the chunk of the step that ended; the prompt's request if it was the last one.
    fn chunk(&mut self) -> Option<usize> {
        let prompt = self.prompts.front_mut()?;
        let end = prompt.chunk_end();
        self.prompt_tokens -= u64::from(end - prompt.done);
        prompt.done = end;
        if end < prompt.total {
            return None;
        }
        let Prompt { request, total, remaining, .. } = *prompt;
        self.prompts.pop_front();
        if remaining > 0 {
            self.admit(Joining::Sequence(Sequence { request, tokens: total, remaining }));
        }
        Some(request)
    }

    fn admit(&mut self, joining: Joining) {
        match joining {
            Joining::Sequence(Sequence { request, tokens, remaining }) => {
                self.sequences += 1;
                self.kv_tokens += u64::from(tokens);
                let end = self.step + u64::from(remaining);
                self.ends.push(Reverse((end, request, u64::from(tokens + remaining))));
            }
            Joining::Prompt(prompt) => self.prompts.push_back(prompt),
        }
    }
}

impl Prompt {
    fn chunk_end(&self) -> u32 {
        self.total.min(self.done + CHUNK_TOKENS)
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
