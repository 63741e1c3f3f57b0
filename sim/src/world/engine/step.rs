//! Steps of a modelled device: what they read and write, layer by layer, and how long they take.

use std::ops::Range;
use std::time::{Duration, Instant};

use baton_engine::sampler::Sampled;
use baton_engine::scheduler::{Outcome, Plan, PlannedChunk};
use baton_engine::{Kind, Wanted};
use baton_proto::ids::TransferId;
use baton_proto::message::Logprobs;

use super::{Device, Engine, News};
use crate::world::memory::{HIDDEN_SIZE, embed, hidden, next_token};

/// A step on the device.
pub(super) struct Step {
    plan: Plan,
    /// Of each chunk.
    rows: Vec<Vec<u64>>,
    exported: Vec<(TransferId, Range<usize>)>,
    began: Instant,
    took: Duration,
    layers_done: usize,
}

impl Engine {
    /// When the step's next layer is complete.
    pub(crate) fn next_layer(&self) -> Option<Instant> {
        let step = self.step.as_ref()?;
        let share = (step.layers_done + 1) as f64 / f64::from(self.info.geometry.layers);
        Some(step.began + step.took.mul_f64(share))
    }

    /// The step's next layer is complete; true if that ends the step.
    pub(crate) fn layer_done(&mut self, news: &mut Vec<News>) -> bool {
        let step = self.step.as_mut().expect("a layer belongs to a step");
        let layer = step.layers_done;
        for (chunk, rows) in step.plan.chunks.iter().zip(&mut step.rows) {
            let blocks = &self.scheduler.sequence(chunk).blocks;
            self.memory.attend(layer, blocks, chunk.start, rows);
        }
        for (id, blocks) in &step.exported {
            let lease = self.leases.get_mut(id).expect("exports are leased until they end");
            lease.readable[layer] = blocks.end;
            news.push(News::KvReady { id: *id, layer, blocks: blocks.clone() });
        }
        step.layers_done += 1;
        let mut jobs = step.plan.chunks.iter().map(|chunk| chunk.id);
        let cancelled = &self.inputs.cancelled;
        if !cancelled.is_empty() && jobs.all(|id| cancelled.contains(&id)) {
            self.scheduler.abandon(&step.plan);
            self.step = None;
            return true;
        }
        if step.layers_done < self.info.geometry.layers as usize {
            return false;
        }
        self.complete(news);
        true
    }

    pub(super) fn begin(&mut self, plan: Plan, now: Instant) {
        let took = Duration::from_secs_f64(self.step_ms(&plan) * self.slowness / 1e3);
        let rows = plan.chunks.iter().map(|chunk| {
            let tokens = &self.scheduler.sequence(chunk).tokens[chunk.start..chunk.end()];
            let row = |(token, position): (&u32, usize)| embed(*token, position);
            tokens.iter().zip(chunk.start..).map(row).collect()
        });
        let (rows, exported) = (rows.collect(), self.exported(&plan));
        self.steps += 1;
        self.step = Some(Step { plan, rows, exported, began: now, took, layers_done: 0 });
    }

    fn step_ms(&self, plan: &Plan) -> f64 {
        let Device { prefill, decode } = self.device;
        let (mut prefill_ms, mut sequences, mut held) = (0.0, 0, 0);
        for chunk in &plan.chunks {
            if chunk.decode {
                sequences += 1;
                held += chunk.end() as u64;
            } else {
                let once = if chunk.samples { prefill.start_ms } else { 0.0 };
                prefill_ms += once + prefill.compute_ms(chunk.end() as u32, chunk.start as u32);
            }
        }
        if sequences == 0 { prefill_ms } else { decode.ms(sequences, held, prefill_ms) }
    }

    fn exported(&self, plan: &Plan) -> Vec<(TransferId, Range<usize>)> {
        let size = self.info.geometry.block_tokens as usize;
        let exports = plan.chunks.iter().filter_map(|chunk| {
            let export = self.scheduler.sequence(chunk).kind == Kind::Export;
            let end = if chunk.samples { chunk.end().div_ceil(size) } else { chunk.end() / size };
            export.then_some((chunk.id, chunk.start / size..end))
        });
        exports.filter(|(_, blocks)| !blocks.is_empty()).collect()
    }

    fn complete(&mut self, news: &mut Vec<News>) {
        let step = self.step.take().expect("a complete step was under way");
        let vocab = self.info.vocab_size as u32;
        let sampled = step.plan.chunks.iter().zip(&step.rows).map(|(chunk, rows)| {
            let last = *rows.last().expect("chunks are not empty");
            chunk.samples.then(|| Sampled { token: next_token(last, vocab), logprobs: None })
        });
        let outcome = Outcome {
            sampled: sampled.collect(),
            prompt_logprobs: self.prompt_logprobs(&step),
            pooled: step.plan.chunks.iter().zip(&step.rows).map(pooled).collect(),
            took: step.took,
        };
        let decode = step.plan.chunks.iter().filter(|chunk| chunk.decode).count();
        self.pace.observe(step.plan.prefill_tokens(), decode, step.took);
        self.scheduler.complete(&step.plan, outcome);
        self.tell(&[], false, news);
    }

    /// The model's log-probability of any token is the low half of the row before it.
    fn prompt_logprobs(&self, step: &Step) -> Vec<Vec<(u32, Logprobs)>> {
        let of_chunk = |(chunk, rows): (&PlannedChunk, &Vec<u64>)| {
            let sequence = self.scheduler.sequence(chunk);
            let Some(before) = &sequence.prompt_logprobs else { return Vec::new() };
            if chunk.wanted != Wanted::All {
                return Vec::new();
            }
            let first = (before.len() + 1).max(chunk.start + 1);
            let last = sequence.prompt_tokens.min(chunk.end() + 1);
            let at = |position: usize| {
                let row = rows[position - 1 - chunk.start];
                let logprob = -((row & 0xffff) as f32);
                (sequence.tokens[position], Logprobs { logprob, top: Vec::new() })
            };
            (first..last).map(at).collect()
        };
        step.plan.chunks.iter().zip(&step.rows).map(of_chunk).collect()
    }
}

/// The sum over a chunk's hidden states.
fn pooled((chunk, rows): (&PlannedChunk, &Vec<u64>)) -> Vec<f64> {
    if !chunk.wanted.is_hidden() {
        return Vec::new();
    }
    let mut sum = vec![0.0; HIDDEN_SIZE];
    for row in &rows[chunk.wanted.rows(rows.len())] {
        sum.iter_mut().zip(hidden(*row)).for_each(|(sum, value)| *sum += f64::from(value));
    }
    sum
}
