//! [`Placement`]: which request goes where, and when.
//!
//! A request is placed when it arrives: the cheapest of all (prefill, decode) pairs and of all
//! decode nodes by themselves ([`cost`]). If the node that is to compute its prompt has work for a
//! while, the request waits here for it ([`queue`]); when its turn comes it is placed once more,
//! with what is known then. What cannot meet its deadline is refused at once.
//!
//! Pure: the caller says what happened and when.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use baton_proto::hash::ModelRoot;
use baton_proto::ids::{NodeId, RequestId, Role, TransferId};
use baton_proto::message::{Hello, Report};
use baton_proto::share::SharedLoad;

use crate::aliases::Estimate;
use crate::cluster::MAX_MODELS;
use crate::index::{Index, Matches, NodeKey, NodeKeys, Tier};
use crate::peers::Own;
use crate::requests::Placed;

mod account;
mod best;
mod breaker;
mod cached;
mod choose;
pub mod cost;
mod dispatch;
mod expected;
pub mod fit;
mod job;
mod left_out;
mod links;
mod load;
mod looks;
mod node;
mod others;
mod pool;
mod popular;
mod queue;
#[cfg(test)]
mod refusal_tests;
mod shortlist;
mod tenants;
#[cfg(test)]
mod tests;

pub use choose::LocalPrefill;
pub use load::REPORT_LAG;
pub use looks::{Hits, WaitsFor};
pub use queue::Class;
pub use tenants::TenantId;

use cached::Cached;
use expected::Expected;
use job::{Job, Sent};
use node::Node;
use pool::Pool;
use queue::{Entry, Shares};
use shortlist::Shortlist;
use tenants::Tenants;

/// A node is given more work when it has less than this.
const FEED_AHEAD_MS: f64 = 100.0;
/// The same for nodes whose speed nobody knows, in prompts.
const FEED_AHEAD_PROMPTS: u32 = 4;
/// How long a request that finds no room on any decode node waits here; then it waits there.
const ROOM_WAIT_MS: f64 = 2000.0;
/// Pause before what could not go is tried again.
const RETRY_MS: f64 = 20.0;
/// Pause between looks for better places for those who wait, and how many are looked at.
const REBALANCE_MS: f64 = 20.0;
const REBALANCED: usize = 32;
/// When nothing was measured for so long, one request is let through to see.
const STALE_MS: f64 = 2000.0;
/// How often a request may be moved.
const MOST_MOVES: u8 = 16;

/// Whose a request is, and how urgent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// How urgent.
    pub class: Class,
    /// Whose.
    pub tenant: TenantId,
}

/// What an operator may choose.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether decode nodes may compute prompts.
    pub local_prefill: LocalPrefill,
    /// Whether cached prefixes may be fetched from other nodes.
    pub pulls: bool,
    /// A request that would wait longer than this for its first token is refused, if set.
    pub most_wait: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { local_prefill: LocalPrefill::default(), pulls: true, most_wait: None }
    }
}

/// The next thing to do with a request that waited.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large one is the frequent one")]
pub enum Turn {
    /// Send it there.
    Go(RequestId, Placed),
    /// The node it waited for is gone: place it again.
    Again(RequestId),
}

/// See the module's description.
#[derive(Debug)]
pub struct Placement {
    /// What nodes hold.
    pub index: Index,
    options: Options,
    origin: Instant,
    keys: NodeKeys,
    /// By key.
    nodes: Vec<Option<Node>>,
    pools: BTreeMap<ModelRoot, Pool>,
    expected: Expected,
    waiting: BTreeMap<RequestId, Job>,
    /// Nodes for which requests wait.
    awaited: BTreeSet<NodeKey>,
    /// Requests whose node is gone.
    displaced: VecDeque<RequestId>,
    sent: BTreeMap<TransferId, Sent>,
    shares: Shares,
    tenants: Tenants,
    /// When [`Self::next`] was last asked.
    asked_at: f64,
    rebalanced_at: f64,
    /// When a prompt was computed last.
    measured_at: f64,
    matches: Matches,
    cached: Cached,
    shortlist: Shortlist,
}

impl Placement {
    /// Without nodes and requests.
    #[must_use]
    pub fn new(index: Index, options: Options, origin: Instant) -> Self {
        Self {
            index,
            options,
            origin,
            keys: NodeKeys::default(),
            nodes: Vec::new(),
            pools: BTreeMap::new(),
            expected: Expected::default(),
            waiting: BTreeMap::new(),
            awaited: BTreeSet::new(),
            displaced: VecDeque::new(),
            sent: BTreeMap::new(),
            shares: Shares::default(),
            tenants: Tenants::default(),
            asked_at: 0.0,
            rebalanced_at: 0.0,
            measured_at: 0.0,
            matches: Matches::default(),
            cached: Cached::default(),
            shortlist: Shortlist::default(),
        }
    }

    /// A node joined. An earlier life of it must have left.
    pub fn join(&mut self, id: &NodeId, hello: &Hello, now: Instant) {
        let key = self.keys.join(id);
        let node = Node::new(id, hello, self.ms(now));
        if self.pools.len() >= MAX_MODELS {
            // What was learnt of models whose nodes are away is for when they come back.
            self.pools.retain(|_, pool| pool.len() > 0);
        }
        self.pools.entry(node.root).or_default();
        if self.nodes.len() <= key.0 as usize {
            self.nodes.resize(key.0 as usize + 1, None);
        }
        let root = node.root;
        self.nodes[key.0 as usize] = Some(node);
        self.index.join(key, Tier::Device);
        self.sort(root);
    }

    /// A node left: nothing is expected of it, and nothing waits for it.
    pub fn leave(&mut self, id: &NodeId) {
        let Some(key) = self.keys.leave(id) else {
            return;
        };
        self.displace(key);
        self.index.leave(key);
        self.expected.leave(key);
        self.forget_transfers(key);
        if let Some(node) = self.nodes[key.0 as usize].take() {
            if let Some(pool) = self.pools.get_mut(&node.root) {
                pool.forget(key);
            }
            self.sort(node.root);
        }
    }

    /// A node reports its load. `alone`: no other coordinator gives it work; then what a report
    /// shows beyond our own account is only old.
    pub fn report(&mut self, id: &NodeId, report: &Report, alone: bool, now: Instant) {
        let now = self.ms(now);
        let Some(key) = self.keys.of(id) else { return };
        let Some(node) = self.nodes[key.0 as usize].as_mut() else { return };
        let before = (node.role, node.draining);
        node.report(report, alone, now);
        if (node.role, node.draining) != before {
            let root = node.root;
            self.displace(key);
            self.sort(root);
        }
    }

    /// What other coordinators have promised to a node and its reports do not show yet.
    pub fn share(&mut self, id: &NodeId, load: SharedLoad) {
        if let Some(node) = self.keys.of(id).and_then(|key| self.node_mut(key)) {
            node.shared = load;
        }
    }

    /// The same of all nodes.
    pub fn share_all(&mut self, load: impl Fn(&NodeId) -> SharedLoad) {
        self.nodes.iter_mut().flatten().for_each(|node| node.shared = load(&node.id));
    }

    /// Promises that a report of a node to another coordinator may not show yet.
    pub fn recent(&self, now: Instant) -> impl Iterator<Item = Own<'_>> {
        let now_ms = self.ms(now);
        self.nodes.iter().flatten().flat_map(move |node| {
            node.load.recent(now_ms).map(move |(sent, load)| {
                let age = Duration::from_secs_f64((now_ms - sent).max(0.0) / 1000.0);
                let sent = now.checked_sub(age).unwrap_or(now);
                Own { node: &node.id, epoch: node.epoch, sent, load }
            })
        })
    }

    /// The number of a joined node in the [index](Self::index).
    #[must_use]
    pub fn key(&self, id: &NodeId) -> Option<NodeKey> {
        self.keys.of(id)
    }

    /// Requests that wait here.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// What a prompt of so many tokens, none of them cached, would take: the least over the model's
    /// prefill nodes, or over its decode nodes if it has none. `None` without nodes.
    #[must_use]
    pub fn estimate(&self, root: ModelRoot, tokens: usize, now: Instant) -> Option<Estimate> {
        let (now, pool) = (self.ms(now), self.pools.get(&root)?);
        let nodes = if pool.prefill.is_empty() { &pool.decode } else { &pool.prefill };
        let estimate = |&key: &NodeKey| {
            let node = self.node(key)?;
            let candidate = node.candidate(0, &pool.typical[node.role as usize], now);
            let quantities = fit::prefill(tokens, 0);
            let prefill_ms: f64 = (0..3).map(|at| candidate.prefill[at] * quantities[at]).sum();
            Some(Estimate { queue_ms: candidate.queue_ms + node.queue.ms(), prefill_ms })
        };
        let first_token = |estimate: &Estimate| estimate.queue_ms + estimate.prefill_ms;
        let estimates = nodes.iter().filter_map(estimate);
        estimates.min_by(|a, b| first_token(a).total_cmp(&first_token(b)))
    }

    /// Whether nothing waits, and nothing is promised to any node.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let idle = self.nodes.iter().flatten().all(|node| node.load.is_empty());
        idle && self.waiting.is_empty() && self.sent.is_empty()
    }

    /// When [`Self::next`] may have something to say without an event.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let awaited = self.awaited.iter().filter_map(|&key| self.node(key));
        let opens =
            awaited.map(|node| (node.queue_ms(self.asked_at) - FEED_AHEAD_MS).max(RETRY_MS));
        let soonest = self.asked_at + opens.min_by(f64::total_cmp)?;
        Some(self.instant(soonest))
    }

    fn instant(&self, ms: f64) -> Instant {
        self.origin + Duration::from_secs_f64(ms / 1000.0)
    }

    fn ms(&self, now: Instant) -> f64 {
        now.saturating_duration_since(self.origin).as_secs_f64() * 1000.0
    }

    fn node(&self, key: NodeKey) -> Option<&Node> {
        self.nodes.get(key.0 as usize)?.as_ref()
    }

    fn node_mut(&mut self, key: NodeKey) -> Option<&mut Node> {
        self.nodes.get_mut(key.0 as usize)?.as_mut()
    }

    /// Sorts the nodes of a model that take work by their role.
    fn sort(&mut self, root: ModelRoot) {
        let Some(pool) = self.pools.get_mut(&root) else { return };
        pool.prefill.clear();
        pool.decode.clear();
        pool.draining.clear();
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(node) = node.as_ref().filter(|n| n.root == root) else { continue };
            let nodes = match node.role {
                _ if node.draining => &mut pool.draining,
                Role::Prefill => &mut pool.prefill,
                Role::Decode => &mut pool.decode,
            };
            nodes.push(NodeKey(at as u32));
        }
    }

    /// Nothing runs, and nothing was measured for so long that predictions may be wrong. Who refuses
    /// by them now might refuse for ever: only a request that is served can tell.
    fn should_measure(&self, now: f64) -> bool {
        self.sent.is_empty() && self.waiting.is_empty() && now - self.measured_at > STALE_MS
    }

    /// Requests that wait for a node are to be placed again.
    fn displace(&mut self, key: NodeKey) {
        let Some(node) = self.node_mut(key) else { return };
        let requests: Vec<RequestId> =
            node.queue.entries().iter().map(|entry| entry.request).collect();
        for request in requests {
            self.dismiss(request);
            self.displaced.push_back(request);
        }
    }

    /// Takes a request out of those that wait. Its tenant is still one that waits.
    fn take(&mut self, request: RequestId) -> Option<(Job, Entry)> {
        let job = self.waiting.remove(&request)?;
        let node = self.nodes[job.node.0 as usize].as_mut();
        let node = node.expect("who waits for a node is displaced when it leaves");
        let entry = node.queue.remove(request).expect("who waits is in the queue of its node");
        if node.queue.is_empty() {
            self.awaited.remove(&job.node);
        }
        self.expected.remove(&job.coming, job.node);
        Some((job, entry))
    }

    /// The same, for good.
    fn dismiss(&mut self, request: RequestId) {
        if let Some((job, _)) = self.take(request) {
            self.tenants.leave(job.tenant);
        }
    }
}
