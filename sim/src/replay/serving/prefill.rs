//! On prefill nodes.

use super::Serving;
use crate::replay::events::Event;
use crate::replay::prefill::Running;
use crate::replay::{Changes, News, Node};

impl Serving<'_> {
    pub(super) fn enqueue(&mut self, now_ms: f64, at: usize, request: usize) {
        self.pull(now_ms, at, request);
        let blocks = self.cluster.full_blocks(request);
        let planned = &mut self.cluster.prefill[at].planned;
        let matched = planned.matched(blocks);
        planned.insert(blocks, &mut Changes::default());
        let tokens = self.cluster.trace.requests[request].input_tokens;
        let cached = self.cluster.cached_tokens(request, matched);
        let ms = self.cluster.service_ms(at, tokens, cached);
        let job = &mut self.cluster.jobs[request];
        (job.planned_tokens, job.planned_ms) = (u64::from(tokens - cached), ms);
        let node = &mut self.cluster.prefill[at];
        node.queued_tokens += u64::from(tokens - cached);
        node.queued_ms += ms;
        node.queue.push_back(request);
        self.begin_prefill(now_ms, at);
    }

    /// Begins with the next prompt, if the node is free and what is pulled for it is there.
    pub(super) fn begin_prefill(&mut self, now_ms: f64, at: usize) {
        let node = &self.cluster.prefill[at];
        let Some(&request) = node.queue.front() else { return };
        if node.running.is_some() || self.cluster.jobs[request].pulling {
            return;
        }
        let blocks = self.cluster.full_blocks(request);
        let tokens = self.cluster.trace.requests[request].input_tokens;
        let node = &mut self.cluster.prefill[at];
        let matched = node.cache.matched(blocks);
        node.cache.touch(&blocks[..matched]);
        let cached = self.cluster.cached_tokens(request, matched);
        let service_ms = self.cluster.service_ms(at, tokens, cached) * self.noise[request];
        let job = &mut self.cluster.jobs[request];
        job.prefill_started_ms = now_ms;
        (job.record.cached_blocks, job.record.cached_tokens) = (matched as u32, cached);
        let (planned_tokens, planned_ms) = (job.planned_tokens, job.planned_ms);
        let decode = job.dispatch.and_then(|dispatch| dispatch.decode);
        let node = &mut self.cluster.prefill[at];
        node.queue.pop_front();
        node.queued_tokens -= planned_tokens;
        node.queued_ms -= planned_ms;
        let ends_ms = now_ms + planned_ms;
        node.running = Some(Running { request, tokens: planned_tokens, ends_ms });
        self.events.plan(now_ms + service_ms, Event::PrefillEnd(at));
        if let Some(decode) = decode {
            self.want_room(now_ms, decode, request);
        }
    }

    pub(in crate::replay) fn prefill_end(&mut self, now_ms: f64, at: usize) {
        let running = self.cluster.prefill[at].running.take();
        let request = running.expect("what ends was begun").request;
        let mut changes = Changes::default();
        let blocks = self.cluster.full_blocks(request);
        self.cluster.prefill[at].cache.insert(blocks, &mut changes);
        self.tell_changes(now_ms, Node::Prefill(at), changes);
        let decode = self.cluster.jobs[request].dispatch.and_then(|dispatch| dispatch.decode);
        self.first_token(now_ms, Node::Prefill(at), request);
        match decode {
            None => self.ended(now_ms, Node::Prefill(at), request),
            Some(decode) => self.begin_decode(now_ms, decode, request),
        }
        self.begin_prefill(now_ms, at);
    }

    pub(super) fn first_token(&mut self, now_ms: f64, node: Node, request: usize) {
        let job = &mut self.cluster.jobs[request];
        job.prefilled = true;
        job.record.first_token_ms = Some(now_ms);
        let service_ms = now_ms - job.prefill_started_ms;
        let cached_tokens = job.record.cached_tokens;
        self.told.push((node, News::PrefillDone { request, cached_tokens, service_ms }));
    }
}
