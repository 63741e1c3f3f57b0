//! What requests want of placement: nodes, and that account is kept of what nodes do for them.

use std::time::{Duration, Instant};

use baton_proto::hash::ModelRoot;
use baton_proto::ids::{NodeId, RequestId, Role, TransferId};

use super::cost::MAKES_OTHERS_LATE_MS;
use super::fit::Fit;
use super::{Placement, fit};
use crate::index::NodeKey;
use crate::requests::{Answer, Placer, Wanted};

impl Placer for Placement {
    fn place(&mut self, wanted: &Wanted<'_>, now: Instant) -> Answer {
        let now = self.ms(now);
        let job = self.job(wanted);
        let choice = match self.choose(&job, now) {
            Ok(choice) => choice,
            Err(left_out) => return Answer::NoNodes(self.no_decision(&job, &left_out, now)),
        };
        let first_token = now + choice.cost.first_token();
        // Who can wait does, in the end; who cannot must not push out those who were there before.
        let makes_others_late =
            job.deadline.is_finite() && choice.cost.harm >= MAKES_OTHERS_LATE_MS;
        let known =
            self.pools.get(&job.root).is_some_and(|pool| pool.typical.iter().any(Fit::is_known));
        let refusable = wanted.arrives && known && !self.should_measure(now);
        if refusable && (first_token > job.deadline || makes_others_late) {
            let late = (first_token - job.deadline).max(1000.0);
            let retry_after = Duration::from_secs_f64(late / 1000.0);
            return Answer::TooLate { retry_after, decision: self.decision(&job, &choice, now) };
        }
        let by_prefill_node =
            self.node(choice.computing()).is_some_and(|node| node.role == Role::Prefill);
        if by_prefill_node && let Some(pool) = self.pools.get_mut(&job.root) {
            pool.offer(choice.work.ms, now);
        }
        self.tenants.arrive(job.tenant);
        if self.may_go(&job, &choice, now) {
            return Answer::Go(self.dispatch(job, &choice, now));
        }
        let decision = self.decision(&job, &choice, now);
        self.hold(job, &choice);
        Answer::Held(decision)
    }

    fn withdraw(&mut self, request: RequestId) {
        self.dismiss(request);
        self.displaced.retain(|displaced| *displaced != request);
    }

    fn started(&mut self, node: &NodeId, id: TransferId, cached: usize) {
        if let Some(node) = self.keys.of(node).and_then(|key| self.node_mut(key))
            && let Some(work) = node.load.started(id, cached)
        {
            node.hits.prompt_tokens += work.tokens as u64;
            node.hits.cached_tokens += work.cached as u64;
        }
    }

    fn prefilled(&mut self, id: &NodeId, at: TransferId, took: Duration, now: Instant) {
        let now = self.ms(now);
        let Some(node) = self.keys.of(id).and_then(|key| self.nodes[key.0 as usize].as_mut())
        else {
            return;
        };
        let Some(work) = node.load.prefilled(at, now) else { return };
        self.measured_at = now;
        // A decode node has not done all of its part yet.
        match node.role {
            Role::Prefill => node.breaker.succeeded(now),
            Role::Decode => node.breaker.did_part(now),
        }
        let (quantities, ms) =
            (fit::prefill(work.tokens, work.cached), 1000.0 * took.as_secs_f64());
        node.prefill.observe(quantities, ms);
        if let Some(pool) = self.pools.get_mut(&node.root) {
            pool.typical[node.role as usize].observe(quantities, ms);
        }
        if let Some(sent) = self.sent.get(&at) {
            self.tenants.serve(sent.tenant, ms - sent.prefill_ms);
        }
    }

    fn handed_over(&mut self, id: TransferId, exposed: Duration, bytes: u64, now: Instant) {
        let now = self.ms(now);
        let Some(sent) = self.sent.get(&id) else { return };
        let (Some(from), to) = (sent.prefill, sent.decode) else { return };
        if let Some(pool) = self.pools.get_mut(&sent.root) {
            let ms = 1000.0 * exposed.as_secs_f64();
            pool.handover.observe((from, to), bytes as f64, ms, sent.others, now);
        }
        if let Some(node) = self.node_mut(to) {
            node.breaker.did_part(now);
        }
    }

    fn pulled(&mut self, id: TransferId, tokens: usize, took: Duration, now: Instant) {
        let now = self.ms(now);
        let Some(sent) = self.sent.get_mut(&id) else { return };
        let Some(from) = sent.source.take() else { return };
        let (root, to) = (sent.root, sent.prefill.unwrap_or(sent.decode));
        let token_bytes = sent.token_bytes;
        let others = self.node_mut(from).map_or(0, |node| {
            node.serving = node.serving.saturating_sub(1);
            node.serving
        });
        if tokens == 0 {
            return;
        }
        if let Some(pool) = self.pools.get_mut(&root) {
            let ms = 1000.0 * took.as_secs_f64();
            pool.pulls.observe((from, to), tokens as f64 * token_bytes, ms, others, now);
        }
    }

    fn ended(&mut self, id: &NodeId, at: TransferId, now: Instant) {
        let now = self.ms(now);
        let key = self.keys.of(id);
        if let Some(node) = key.and_then(|key| self.node_mut(key)) {
            node.load.ended(at, now);
            node.breaker.released();
        }
        let Some(sent) = self.sent.get_mut(&at) else { return };
        sent.legs = sent.legs.saturating_sub(1);
        let last = sent.legs == 0;
        let was_sender = sent.prefill.is_some() && (last || sent.prefill == key);
        let decode = sent.decode;
        if was_sender {
            sent.prefill = None;
        }
        let source = if last { sent.source.take() } else { None };
        if last {
            self.sent.remove(&at);
        }
        if let Some(node) = self.node_mut(decode).filter(|_| was_sender) {
            node.incoming = node.incoming.saturating_sub(1);
        }
        if let Some(node) = source.and_then(|key| self.node_mut(key)) {
            node.serving = node.serving.saturating_sub(1);
        }
    }

    fn failed(&mut self, node: &NodeId, now: Instant) {
        let now = self.ms(now);
        if let Some(node) = self.keys.of(node).and_then(|key| self.node_mut(key)) {
            node.breaker.failed(now);
        }
    }

    fn answered(&mut self, by: &NodeId, root: ModelRoot, tokens: usize, now: Instant) {
        let now = self.ms(now);
        if let Some(node) = self.keys.of(by).and_then(|key| self.node_mut(key)) {
            node.breaker.succeeded(now);
        }
        if tokens > 0
            && let Some(pool) = self.pools.get_mut(&root)
        {
            pool.answered(tokens);
        }
    }
}

impl Placement {
    /// A node is gone, and with it the transfers of attempts that it had a part in. Its key may
    /// soon be another node's, so none of them may name it any more.
    pub(super) fn forget_transfers(&mut self, gone: NodeKey) {
        let Self { sent, nodes, .. } = self;
        for sent in sent.values_mut() {
            let over = sent.prefill == Some(gone) || sent.decode == gone;
            let source = if over { sent.source } else { sent.source.filter(|key| *key == gone) };
            if let Some(key) = source {
                sent.source = None;
                if let Some(node) = nodes[key.0 as usize].as_mut() {
                    node.serving = node.serving.saturating_sub(1);
                }
            }
            if over
                && sent.prefill.take().is_some()
                && let Some(node) = nodes[sent.decode.0 as usize].as_mut()
            {
                node.incoming = node.incoming.saturating_sub(1);
            }
        }
    }
}
