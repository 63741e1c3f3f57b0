//! A device whose KV cache holds the tokens themselves: a block that belongs to another sequence,
//! is not written yet, or is overwritten too late, changes what is sampled.

use std::collections::VecDeque;
use std::ops::Range;

use super::{BLOCK_TOKENS, Plan, PlannedChunk, Scheduler, Wanted, next_token};

/// What nobody has written as a token.
pub(super) const GARBAGE: u32 = 99;

pub(super) struct Device {
    memory: Vec<u32>,
    /// Steps are computed when their results are asked for, else when they are launched.
    lazy: bool,
    /// Launched steps whose results were not asked for, oldest first.
    pub(super) flying: VecDeque<Step>,
    /// What the step before the next one to be computed sampled.
    sampled: Vec<Option<u32>>,
}

pub(super) struct Step {
    plan: Plan,
    /// Of each chunk: the tokens that are known, and its blocks.
    inputs: Vec<(Vec<u32>, Vec<u32>)>,
    results: Option<Results>,
}

/// By chunk: what it sampled, and the sum of what it pools.
type Results = (Vec<Option<u32>>, Vec<Vec<f64>>);

/// The hidden state of a token is what follows it and a one; this is the sum over some.
pub(super) fn pool(rows: Range<usize>, tokens: &[u32]) -> Vec<f64> {
    let count = rows.len() as f64;
    vec![rows.map(|row| f64::from(next_token(&tokens[..=row]))).sum(), count]
}

impl Device {
    pub(super) fn new(blocks: usize, lazy: bool) -> Self {
        let memory = vec![GARBAGE; blocks * BLOCK_TOKENS];
        Self { memory, lazy, flying: VecDeque::new(), sampled: Vec::new() }
    }

    pub(super) fn launch(&mut self, scheduler: &Scheduler, plan: &Plan) {
        let input = |chunk: &PlannedChunk| {
            let sequence = scheduler.sequence(chunk);
            let known = match chunk.pending {
                Some(_) => Vec::new(),
                None => sequence.tokens[chunk.start..chunk.end()].to_vec(),
            };
            (known, sequence.blocks.clone())
        };
        let inputs = plan.chunks.iter().map(input).collect();
        let mut step = Step { plan: plan.clone(), inputs, results: None };
        if !self.lazy {
            self.compute(&mut step);
        }
        self.flying.push_back(step);
    }

    /// The oldest step and its results.
    pub(super) fn finish(&mut self) -> (Plan, Results) {
        let mut step = self.flying.pop_front().unwrap();
        if step.results.is_none() {
            self.compute(&mut step);
        }
        (step.plan, step.results.unwrap())
    }

    fn compute(&mut self, step: &mut Step) {
        let (mut sampled, mut pooled) = (Vec::new(), Vec::new());
        for (chunk, (tokens, blocks)) in step.plan.chunks.iter().zip(&step.inputs) {
            let pending = chunk.pending.map(|before| self.sampled[before].unwrap());
            for (i, token) in tokens.iter().copied().chain(pending).enumerate() {
                *self.slot(blocks, chunk.start + i) = token;
            }
            let seen: Vec<u32> = (0..chunk.end()).map(|at| *self.slot(blocks, at)).collect();
            sampled.push(chunk.samples.then(|| next_token(&seen)));
            pooled.push(match chunk.wanted {
                Wanted::Hidden(first) => pool(chunk.start + first..seen.len(), &seen),
                _ => Vec::new(),
            });
        }
        self.sampled.clone_from(&sampled);
        step.results = Some((sampled, pooled));
    }

    /// Where the token at a position of a sequence lies.
    pub(super) fn slot(&mut self, blocks: &[u32], position: usize) -> &mut u32 {
        let block = blocks[position / BLOCK_TOKENS] as usize;
        &mut self.memory[block * BLOCK_TOKENS + position % BLOCK_TOKENS]
    }
}
