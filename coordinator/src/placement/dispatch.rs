//! Requests go to nodes when their turn comes.

use std::time::Instant;

use baton_proto::ids::TransferId;

use super::choose::Choice;
use super::job::{Job, Sent};
use super::load::Work;
use super::node::Node;
use super::queue::Entry;
use super::{
    FEED_AHEAD_MS, FEED_AHEAD_PROMPTS, MOST_MOVES, Placement, REBALANCE_MS, REBALANCED, RETRY_MS,
    ROOM_WAIT_MS, Turn,
};
use crate::index::NodeKey;
use crate::requests::Placed;

impl Placement {
    /// The next request whose turn has come. To be asked after every event until there is none.
    pub fn next(&mut self, now: Instant) -> Option<Turn> {
        if let Some(request) = self.displaced.pop_front() {
            return Some(Turn::Again(request));
        }
        let now = self.ms(now);
        self.asked_at = now;
        if self.waiting.is_empty() {
            return None;
        }
        if now >= self.rebalanced_at + REBALANCE_MS {
            self.rebalanced_at = now;
            self.rebalance(now);
            if let Some(request) = self.displaced.pop_front() {
                return Some(Turn::Again(request));
            }
        }
        let awaited: Vec<NodeKey> = self.awaited.iter().copied().collect();
        awaited.into_iter().find_map(|key| self.next_of(key, now))
    }

    /// Who goes to this node, or to another one after all.
    fn next_of(&mut self, key: NodeKey, now: f64) -> Option<Turn> {
        while self.is_open(key, now) {
            let node = self.node(key)?;
            let next = node.queue.next(&self.shares, &self.tenants, now)?.request;
            let (mut job, _) = self.take(next)?;
            job.turn = Some(key);
            let Ok(choice) = self.choose(&job, now) else {
                self.tenants.leave(job.tenant);
                return Some(Turn::Again(next));
            };
            let stays = choice.computing() == key || job.moves >= MOST_MOVES;
            if self.has_room(&job, &choice, now) {
                if stays || self.may_go(&job, &choice, now) {
                    return Some(Turn::Go(next, self.dispatch(job, &choice, now)));
                }
                job.moves += 1;
            } else {
                job.blocked.get_or_insert(now);
                // The more wait, the less often each is tried.
                job.retry_at =
                    now + RETRY_MS * (1.0 + self.waiting.len() as f64 / REBALANCED as f64);
            }
            self.hold(job, &choice);
        }
        None
    }

    /// Whether the node will soon have nothing to do.
    fn is_open(&self, key: NodeKey, now: f64) -> bool {
        let Some(node) = self.node(key) else { return false };
        let unknown = node.prefill.observations() == 0;
        node.queue_ms(now) <= FEED_AHEAD_MS || (unknown && node.load.prompts() < FEED_AHEAD_PROMPTS)
    }

    /// Whether the decode node has blocks for it, or has let it wait for long enough.
    fn has_room(&self, job: &Job, choice: &Choice, now: f64) -> bool {
        let Some(node) = self.node(choice.decode) else { return true };
        let waited = job.blocked.is_some_and(|since| now - since >= ROOM_WAIT_MS);
        waited || node.room() >= job.demand.blocks || node.load.sequences() == 0
    }

    /// Whether a request may go at once, without overtaking anybody.
    pub(super) fn may_go(&self, job: &Job, choice: &Choice, now: f64) -> bool {
        let key = choice.computing();
        let nobody = self.node(key).is_some_and(|node| node.queue.is_empty());
        nobody && self.is_open(key, now) && self.has_room(job, choice, now)
    }

    /// Lets a request wait for the node that is to compute it.
    pub(super) fn hold(&mut self, mut job: Job, choice: &Choice) {
        let key = choice.computing();
        let entry = job.entry(choice.work.ms);
        self.expected.add(&job.coming, key);
        (job.node, job.turn) = (key, None);
        if let Some(node) = self.node_mut(key) {
            node.queue.insert(entry);
            self.awaited.insert(key);
            self.waiting.insert(entry.request, job);
        }
    }

    /// Places some of those who wait anew: the first to be due, in the order of their turns, as each
    /// is placed behind those who are due before it.
    fn rebalance(&mut self, now: f64) {
        for entry in self.first_due() {
            let Some((job, _)) = self.take(entry.request) else { continue };
            match self.choose(&job, now) {
                Ok(choice) => self.hold(job, &choice),
                Err(_) => {
                    self.tenants.leave(job.tenant);
                    self.displaced.push_back(entry.request);
                }
            }
        }
    }

    /// The first to be due of those who wait, whatever for, in order. Of a queue, as many are looked at
    /// as are among them, and one more.
    pub(super) fn first_due(&self) -> Vec<Entry> {
        let mut first: Vec<Entry> = Vec::with_capacity(REBALANCED + 1);
        for node in self.awaited.iter().filter_map(|&key| self.node(key)) {
            for entry in node.queue.entries() {
                let at = first.partition_point(|other| other.order(entry).is_lt());
                if at == REBALANCED {
                    break;
                }
                first.insert(at, *entry);
                first.truncate(REBALANCED);
            }
        }
        first
    }

    /// Keeps account of what is sent to nodes now, and waits no more.
    pub(super) fn dispatch(&mut self, job: Job, choice: &Choice, now: f64) -> Placed {
        let (tokens, blocks) = (job.demand.tokens, job.demand.blocks);
        let cached = choice.pull.map_or(choice.cached, |(_, pulled)| pulled);
        let computing = Work { tokens, cached, prefill_ms: choice.work.ms, blocks };
        let receiving = Work { tokens, cached: 0, prefill_ms: 0.0, blocks };
        self.expected.send(job.coming.clone(), [Some(choice.decode), choice.prefill], now);
        let mut others = 0;
        if let Some(key) = choice.prefill {
            self.promise(key, job.id, computing, now);
            others = self.node_mut(choice.decode).map_or(0, |node| {
                node.incoming += 1;
                node.incoming - 1
            });
        }
        let work = if choice.prefill.is_some() { receiving } else { computing };
        self.promise(choice.decode, job.id, work, now);
        if let Some(node) = choice.pull.and_then(|(key, _)| self.node_mut(key)) {
            node.serving += 1;
        }
        if choice.prefill.is_none()
            && let Some(node) = self.node_mut(choice.decode)
        {
            node.taken = (node.taken_ms(now) + choice.work.taken_ms, now);
        }
        self.shares.serve(job.class, choice.work.ms);
        self.tenants.leave(job.tenant);
        self.tenants.serve(job.tenant, choice.work.ms);
        let sent = Sent {
            root: job.root,
            tenant: job.tenant,
            prefill_ms: choice.work.ms,
            prefill: choice.prefill,
            decode: choice.decode,
            source: choice.pull.map(|(key, _)| key),
            others,
            token_bytes: job.demand.token_bytes,
            legs: 1 + u8::from(choice.prefill.is_some()),
        };
        self.sent.insert(job.id, sent);
        self.placed(&job, choice, now)
    }

    fn promise(&mut self, key: NodeKey, id: TransferId, work: Work, now: f64) {
        if let Some(node) = self.node_mut(key) {
            node.load.promise(id, work, now);
            node.breaker.sent();
        }
    }

    /// The choice in the words of nodes.
    fn placed(&self, job: &Job, choice: &Choice, now: f64) -> Placed {
        let named = |key| self.node(key).expect("a node that was chosen is joined");
        let prefill = choice.prefill.map(named);
        Placed {
            prefill: prefill.map(Node::peer),
            decode: named(choice.decode).peer(),
            pull: choice.pull.map(|(key, tokens)| (named(key).peer(), tokens)),
            decision: self.decision(job, choice, now),
        }
    }
}
