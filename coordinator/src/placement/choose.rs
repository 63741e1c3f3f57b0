//! The cheapest placement of one request.

use serde::Deserialize;

use super::Placement;
use super::cost::{self, Candidate, Cost, Demand, Prefill, Source};
use super::expected::sample;
use super::job::Job;
use super::node::Node;
use super::pool::Pool;
use super::queue::{Entry, Place};
use crate::index::{Matches, NodeKey};
use crate::requests::Wanted;

/// How many of the best of each side are paired, as links differ.
const FINALISTS: usize = 4;

/// When decode nodes compute prompts themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LocalPrefill {
    /// When that is cheaper, or no prefill node is there.
    #[default]
    Auto,
    /// Only when no prefill node is there.
    Never,
}

/// Where to, and what that costs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    /// Who computes the prompt; `None`: the decode node.
    pub(super) prefill: Option<NodeKey>,
    pub(super) decode: NodeKey,
    /// From whom a cached prefix is fetched, and its tokens.
    pub(super) pull: Option<(NodeKey, usize)>,
    /// Tokens cached on the node that computes.
    pub(super) cached: usize,
    pub(super) work: Prefill,
    pub(super) cost: Cost,
    /// The cheapest of the other kind, if any.
    pub(super) other: Option<f64>,
}

impl Choice {
    /// The node that computes the prompt.
    pub(super) fn computing(&self) -> NodeKey {
        self.prefill.unwrap_or(self.decode)
    }
}

/// Leading blocks that each node has or will have. Kept between requests, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Cached {
    expected: Vec<u32>,
    touched: Vec<NodeKey>,
    popular: usize,
}

impl Cached {
    fn clear(&mut self, popular: usize) {
        self.touched.drain(..).for_each(|node| self.expected[node.0 as usize] = 0);
        self.popular = popular;
    }

    fn expect(&mut self, node: NodeKey, blocks: usize) {
        let at = node.0 as usize;
        if self.expected.len() <= at {
            self.expected.resize(at + 1, 0);
        }
        if self.expected[at] == 0 {
            self.touched.push(node);
        }
        self.expected[at] = blocks as u32;
    }

    fn of(&self, node: NodeKey, matches: &Matches) -> usize {
        let expected = self.expected.get(node.0 as usize).copied().unwrap_or(0) as usize;
        matches.of(node).blocks.max(expected).max(self.popular)
    }
}

/// One side of a pair: a node, how it would do its part, and what that costs.
#[derive(Clone, Copy, Debug)]
struct Side {
    key: NodeKey,
    cost: Cost,
    work: Prefill,
    cached: usize,
}

/// The best few of many.
struct Best {
    sides: [Option<Side>; FINALISTS],
}

impl Best {
    fn new() -> Self {
        Self { sides: [None; FINALISTS] }
    }

    fn offer(&mut self, side: Side) {
        let total = side.cost.total();
        let worse = |other: &Option<Side>| other.is_none_or(|other| total < other.cost.total());
        if let Some(at) = self.sides.iter().position(worse) {
            self.sides[at..].rotate_right(1);
            self.sides[at] = Some(side);
        }
    }

    fn first(&self) -> Option<Side> {
        self.sides[0]
    }

    fn all(&self) -> impl Iterator<Item = Side> {
        self.sides.iter().flatten().copied()
    }
}

impl Placement {
    /// The request in numbers.
    pub(super) fn job(&mut self, wanted: &Wanted<'_>) -> Job {
        let model = wanted.model;
        let pool = self.pools.entry(model.root).or_default();
        let popular = pool.popular.observe(wanted.chain);
        let output = pool.output.min(wanted.longest.saturating_sub(wanted.tokens).max(1) as f64);
        let demand = Demand {
            tokens: wanted.tokens,
            token_bytes: model.geometry.token_bytes() as f64,
            blocks: model.geometry.blocks_for(wanted.tokens + 1) as u64,
            output,
        };
        let arrived = self.ms(wanted.arrived);
        let wait = self.options.most_wait.map_or(f64::INFINITY, |wait| 1000.0 * wait.as_secs_f64());
        let deadline = wanted.deadline.map_or(f64::INFINITY, |at| self.ms(at));
        Job {
            id: wanted.id,
            root: model.root,
            demand,
            longest: wanted.longest,
            sampled: sample(wanted.chain, model.geometry.block_tokens as usize, popular),
            chain: wanted.chain.clone(),
            popular,
            avoid: wanted.avoid.to_vec(),
            class: wanted.standing.class,
            tenant: wanted.standing.tenant,
            arrived,
            deadline: deadline.min(arrived + wait),
            node: NodeKey(0),
            moves: 0,
            turn: None,
            retry_at: 0.0,
            blocked: None,
        }
    }

    /// The cheapest placement of a request; `None` without a decode node. Ties go to the node with
    /// the smaller key.
    pub(super) fn choose(&mut self, job: &Job, now: f64) -> Option<Choice> {
        self.look_up(job);
        let some = self.cheapest(job, now);
        if some.is_some() || !self.shortlist.look_at_all() {
            return some;
        }
        self.cheapest(job, now)
    }

    /// The cheapest placement on nodes of the shortlist.
    fn cheapest(&self, job: &Job, now: f64) -> Option<Choice> {
        let pool = self.pools.get(&job.root)?;
        let source = if self.options.pulls { self.source(job, pool, now) } else { None };
        let (mut senders, mut receivers, mut locals) = (Best::new(), Best::new(), Best::new());
        let scarcity = pool.scarcity(now);
        for key in self.shortlist.of(&pool.prefill) {
            if let Some((mut candidate, node)) = self.candidate(key, job, pool, now) {
                let (work, _) = self.queued(job, node, key, &mut candidate, source, pool, now);
                let cost = cost::computing(&candidate, &work, scarcity);
                senders.offer(Side { key, cost, work, cached: candidate.cached });
            }
        }
        let any_fits = self.shortlist.of(&pool.decode).any(|key| {
            self.candidate(key, job, pool, now).is_some_and(|(c, _)| c.room >= job.demand.blocks)
        });
        for key in self.shortlist.of(&pool.decode) {
            let Some((mut candidate, node)) = self.candidate(key, job, pool, now) else { continue };
            if any_fits && candidate.room < job.demand.blocks {
                continue;
            }
            let cached = candidate.cached;
            // The link is counted with the pair.
            let cost = cost::receiving(&job.demand, &candidate, 0.0);
            let none = Prefill::default();
            receivers.offer(Side { key, cost, work: none, cached });
            let (mut work, _) = self.queued(job, node, key, &mut candidate, source, pool, now);
            let cost = cost::local(&job.demand, &candidate, &mut work);
            locals.offer(Side { key, cost, work, cached });
        }
        let local = locals.first()?;
        let remote = self.cheapest_pair(&job.demand, pool, &senders, &receivers, now);
        let never = self.options.local_prefill == LocalPrefill::Never;
        let choice = |side: Side, prefill, decode, cost, other| Choice {
            prefill,
            decode,
            pull: source.filter(|_| side.work.pulls).map(|(key, source)| (key, source.tokens)),
            cached: side.cached,
            work: side.work,
            cost,
            other,
        };
        Some(match remote {
            Some((p, d, cost)) if never || cost.total() < local.cost.total() => {
                choice(p, Some(p.key), d.key, cost, Some(local.cost.total()))
            }
            other => {
                let other = other.map(|(.., cost)| cost.total());
                choice(local, None, local.key, local.cost, other)
            }
        })
    }

    /// Finds out what the nodes have of the request's blocks.
    fn look_up(&mut self, job: &Job) {
        self.index.longest_beyond(&job.chain, job.popular, &mut self.matches);
        self.cached.clear(job.popular);
        let (cached, nodes) = (&mut self.cached, &self.nodes);
        let size = nodes.iter().flatten().find(|node| node.root == job.root);
        let size = size.map_or(1, |node| node.block_tokens);
        let skipped = job.popular;
        self.expected
            .longest(&job.chain, size, skipped, |node, blocks| cached.expect(node, blocks));
        let held = self.matches.iter().map(|(key, _)| key);
        let expected = self.cached.touched.iter().copied();
        let expected = expected.filter(|&key| self.matches.of(key).blocks == 0);
        let all = held.chain(expected).map(|key| (key, self.cached.of(key, &self.matches)));
        self.shortlist.begin(all, job.popular);
    }

    /// Whoever really holds most of the request's blocks, in device memory.
    fn source(&self, job: &Job, pool: &Pool, now: f64) -> Option<(NodeKey, Source)> {
        let holders = self.matches.iter().filter_map(|(key, held)| {
            // What every node has or will have is fetched from nobody.
            if held.device_blocks <= job.popular {
                return None;
            }
            let node = self.node(key).filter(|node| node.root == job.root)?;
            Some((held.device_blocks, node.serving, key))
        });
        let (blocks, serving, key) = holders
            .max_by_key(|&(blocks, serving, key)| (blocks, std::cmp::Reverse((serving, key))))?;
        let node = self.node(key)?;
        let ms_per_byte = pool.pulls.ms_per_byte(key, key, now) * (1.0 + f64::from(serving));
        let token_ms = ms_per_byte * job.demand.token_bytes;
        let most = job.demand.tokens.saturating_sub(1);
        let tokens = (blocks * node.block_tokens).min(most);
        (blocks > 0).then_some((key, Source { tokens, token_ms }))
    }

    /// A node in numbers, if it may take the request.
    fn candidate(
        &self,
        key: NodeKey,
        job: &Job,
        pool: &Pool,
        now: f64,
    ) -> Option<(Candidate, &Node)> {
        let node = self.node(key)?;
        let avoided =
            || job.avoid.iter().any(|avoid| avoid.epoch == node.epoch && avoid.node == node.id);
        // A node with less room would end the output earlier than the others.
        if node.max_model_len < job.longest || !node.breaker.admits(now) || avoided() {
            return None;
        }
        let blocks = self.cached.of(key, &self.matches);
        let cached = (blocks * node.block_tokens).min(job.demand.tokens.saturating_sub(1));
        Some((node.candidate(cached, &pool.typical[node.role as usize], now), node))
    }

    /// How a node would compute the prompt, with the place in its queue added to the candidate.
    #[expect(clippy::too_many_arguments, reason = "all that decides what a node would do")]
    fn queued(
        &self,
        job: &Job,
        node: &Node,
        key: NodeKey,
        candidate: &mut Candidate,
        source: Option<(NodeKey, Source)>,
        pool: &Pool,
        now: f64,
    ) -> (Prefill, Place) {
        let source = source.filter(|(from, _)| *from != key).map(|(from, source)| Source {
            token_ms: pool.pulls.ms_per_byte(from, key, now)
                * (1.0 + f64::from(self.node(from).map_or(0, |node| node.serving)))
                * job.demand.token_bytes,
            ..source
        });
        let work = cost::prefill(&job.demand, candidate, source);
        if node.queue.is_empty() || job.turn == Some(key) {
            return (work, Place::default());
        }
        let entry = job.entry(work.ms);
        let place = node.queue.place(&entry, now + candidate.queue_ms);
        candidate.queue_ms += place.ahead_ms;
        candidate.behind = place.behind;
        if place.slack_ms < work.ms {
            // Somebody behind it would be late.
            candidate.behind += 1;
            candidate.late = true;
        }
        (work, place)
    }

    fn cheapest_pair(
        &self,
        demand: &Demand,
        pool: &Pool,
        senders: &Best,
        receivers: &Best,
        now: f64,
    ) -> Option<(Side, Side, Cost)> {
        let mut best: Option<(Side, Side, Cost)> = None;
        for p in senders.all() {
            for d in receivers.all() {
                let incoming = self.node(d.key).map_or(0, |node| node.incoming);
                let missing = demand.tokens.saturating_sub(d.cached) as f64 * demand.token_bytes;
                let link =
                    pool.handover.ms_per_byte(p.key, d.key, now) * (1.0 + f64::from(incoming));
                let mut cost = p.cost.and(&d.cost);
                cost.transfer += missing * link;
                if best.is_none_or(|(.., other)| cost.total() < other.total()) {
                    best = Some((p, d, cost));
                }
            }
        }
        best
    }
}

impl Job {
    /// Its entry in the queue of a node that would take `ms` to compute it.
    pub(super) fn entry(&self, ms: f64) -> Entry {
        Entry {
            request: self.id.request,
            class: self.class,
            tenant: self.tenant,
            arrived: self.arrived,
            due: Entry::due(self.arrived, ms, self.deadline),
            deadline: self.deadline,
            ms,
            retry_at: self.retry_at,
        }
    }
}
