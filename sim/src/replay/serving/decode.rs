//! On decode nodes.

use super::Serving;
use crate::replay::batch::{Joining, Prompt, Sequence};
use crate::replay::events::Event;
use crate::replay::{Changes, Node};

impl Serving<'_> {
    /// Counts what a node will have to hold.
    pub(super) fn promise(&mut self, at: usize, request: usize) {
        let blocks = self.cluster.full_blocks(request);
        let (input, output) = self.lengths(request);
        let node = &mut self.cluster.decode[at];
        node.promised_tokens += u64::from(input + output);
        node.planned.insert(blocks, &mut Changes::default());
    }

    /// Asks a decode node for room, first in, first out.
    pub(super) fn want_room(&mut self, now_ms: f64, at: usize, request: usize) {
        let node = &mut self.cluster.decode[at];
        node.waiting.push_back(request);
        if !self.cluster.jobs[request].record.remote {
            node.waiting_tokens += u64::from(self.cluster.trace.requests[request].input_tokens);
        }
        self.grant(now_ms, at);
    }

    /// Sets room aside for as many as there is room for.
    fn grant(&mut self, now_ms: f64, at: usize) {
        while let Some(&request) = self.cluster.decode[at].waiting.front() {
            let blocks = self.cluster.full_blocks(request);
            let needed = self.cluster.needed_blocks(request);
            let cache = &mut self.cluster.decode[at].cache;
            let held = cache.matched(blocks);
            cache.pin(&blocks[..held]);
            let mut changes = Changes::default();
            if !cache.reserve(needed - held, &mut changes) {
                cache.unpin(&blocks[..held]);
                return;
            }
            self.cluster.decode[at].waiting.pop_front();
            self.cluster.jobs[request].held_blocks = held;
            self.tell_changes(now_ms, Node::Decode(at), changes);
            match self.cluster.jobs[request].dispatch.and_then(|dispatch| dispatch.prefill) {
                Some(prefill) => self.hand_over(now_ms, prefill, at, request),
                None if self.pull_local(now_ms, at, request) => {}
                None => self.begin_local(now_ms, at, request, held),
            }
        }
    }

    /// Computes a prompt of which so many leading blocks are here.
    pub(super) fn begin_local(&mut self, now_ms: f64, at: usize, request: usize, held: usize) {
        let (total, output) = self.lengths(request);
        let done = self.cluster.cached_tokens(request, held);
        let job = &mut self.cluster.jobs[request];
        job.prefill_started_ms = now_ms;
        (job.record.cached_blocks, job.record.cached_tokens) = (held as u32, done);
        self.cluster.decode[at].waiting_tokens -= u64::from(total);
        self.join(
            now_ms,
            at,
            Joining::Prompt(Prompt { request, done, total, remaining: output - 1 }),
        );
    }

    /// Begins to decode, when both the prompt is computed and its KV is here.
    pub(super) fn begin_decode(&mut self, now_ms: f64, at: usize, request: usize) {
        let job = &self.cluster.jobs[request];
        if job.prefilled && job.landed {
            let (input, output) = self.lengths(request);
            if output == 1 {
                self.leave(now_ms, at, request);
            } else {
                let sequence = Sequence { request, tokens: input, remaining: output - 1 };
                self.join(now_ms, at, Joining::Sequence(sequence));
            }
        }
    }

    pub(in crate::replay) fn batch_change(&mut self, now_ms: f64, at: usize, generation: u64) {
        if self.cluster.decode[at].generation != generation {
            return;
        }
        let finished = self.cluster.decode[at].batch.change(now_ms);
        if let Some(request) = finished.prompt {
            self.first_token(now_ms, Node::Decode(at), request);
            self.landed(now_ms, at, request);
            if self.lengths(request).1 == 1 {
                self.leave(now_ms, at, request);
            }
        }
        for request in finished.sequences {
            self.leave(now_ms, at, request);
        }
        self.plan_batch(at);
    }

    /// The prompt's KV is whole on its decode node, and may be shared from now on.
    pub(super) fn landed(&mut self, now_ms: f64, at: usize, request: usize) {
        self.cluster.jobs[request].landed = true;
        let held = self.cluster.jobs[request].held_blocks;
        let blocks = self.cluster.full_blocks(request);
        let mut changes = Changes::default();
        self.cluster.decode[at].cache.share(blocks, held, &mut changes);
        self.tell_changes(now_ms, Node::Decode(at), changes);
    }

    fn leave(&mut self, now_ms: f64, at: usize, request: usize) {
        let blocks = self.cluster.full_blocks(request);
        let private = self.cluster.needed_blocks(request) - blocks.len();
        let (input, output) = self.lengths(request);
        let node = &mut self.cluster.decode[at];
        node.cache.unpin(blocks);
        node.cache.release(private);
        node.promised_tokens -= u64::from(input + output);
        self.ended(now_ms, Node::Decode(at), request);
        self.grant(now_ms, at);
    }

    fn join(&mut self, now_ms: f64, at: usize, joining: Joining) {
        self.cluster.decode[at].batch.join(now_ms, joining);
        self.plan_batch(at);
    }

    fn plan_batch(&mut self, at: usize) {
        let node = &mut self.cluster.decode[at];
        node.generation += 1;
        if let Some(ms) = node.batch.next_change_ms() {
            self.events.plan(ms, Event::Batch(at, node.generation));
        }
    }

    /// Tokens of a request's prompt and answer.
    pub(super) fn lengths(&self, request: usize) -> (u32, u32) {
        let request = &self.cluster.trace.requests[request];
        (request.input_tokens, request.output_tokens)
    }
}
