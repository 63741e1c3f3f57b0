//! The cheapest placement of one request.

use serde::Deserialize;

use super::Placement;
use super::best::{Best, Side};
use super::cost::{self, Candidate, Cost, Demand, Prefill, Source};
use super::expected::Coming;
use super::job::Job;
use super::left_out::LeftOut;
use super::links::Speeds;
use super::node::Node;
use super::others::Others;
use super::pool::Pool;
use super::queue::Entry;
use crate::decision::Why;
use crate::index::NodeKey;
use crate::requests::Wanted;

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
    /// Who computes the prompt; `None`: the other node.
    pub(super) prefill: Option<NodeKey>,
    pub(super) decode: NodeKey,
    /// Who has most of the prompt, and its tokens.
    pub(super) source: Option<(NodeKey, usize)>,
    /// From whom a cached prefix is fetched, and its tokens.
    pub(super) pull: Option<(NodeKey, usize)>,
    /// Tokens cached on the node that computes.
    pub(super) cached: usize,
    pub(super) work: Prefill,
    pub(super) cost: Cost,
    /// What it was compared with.
    pub(super) others: Others,
}

impl Choice {
    /// The node that computes the prompt.
    pub(super) fn computing(&self) -> NodeKey {
        self.prefill.unwrap_or(self.decode)
    }
}

/// A request, and what all nodes are compared by.
struct Asked<'a> {
    job: &'a Job,
    pool: &'a Pool,
    /// Who has most of the prompt, and its tokens.
    source: Option<(NodeKey, usize)>,
    pulls: Speeds<'a>,
    handover: Speeds<'a>,
    now: f64,
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
            embeds: wanted.embeds,
            coming: Coming { chain: wanted.chain.clone(), popular },
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

    /// The cheapest placement of a request. Without a decode node, or for an embedding without any,
    /// who could not take it. Ties go to the node with the smaller key.
    pub(super) fn choose(&mut self, job: &Job, now: f64) -> Result<Choice, LeftOut> {
        self.look_up(job);
        let some = self.cheapest(job, now);
        if some.is_ok() || !self.shortlist.look_at_all() {
            return some;
        }
        self.cheapest(job, now)
    }

    /// The cheapest placement on nodes of the shortlist.
    fn cheapest(&self, job: &Job, now: f64) -> Result<Choice, LeftOut> {
        let mut left_out = LeftOut::default();
        let Some(pool) = self.pools.get(&job.root) else { return Err(left_out) };
        let pulls = self.options.pulls && !job.embeds;
        let source = if pulls { self.source(job) } else { None };
        let (pulls, handover) = (pool.pulls.at(now), pool.handover.at(now));
        let asked = Asked { job, pool, source, pulls, handover, now };
        if job.embeds {
            return self.cheapest_alone(&asked);
        }
        let (receivers, locals) = self.decoding(&asked, &mut left_out);
        let Some(local) = locals.first() else { return Err(left_out) };
        let senders = self.computing(&asked, &mut left_out);
        let mut others = Others::new(&senders, &receivers, left_out);
        locals.all().for_each(|side| others.add_local(&side));
        let remote = self.cheapest_pair(&asked, &senders, &receivers, &mut others);
        let never = self.options.local_prefill == LocalPrefill::Never;
        let choice = |side: Side, prefill, decode, cost| Choice {
            prefill,
            decode,
            source,
            pull: source.filter(|_| side.work.pulls),
            cached: side.cached,
            work: side.work,
            cost,
            others,
        };
        Ok(match remote {
            Some((p, d, cost)) if never || cost.total() < local.cost.total() => {
                choice(p, Some(p.key), d.key, cost)
            }
            _ => choice(local, None, local.key, local.cost),
        })
    }

    /// The cheapest node for a prompt whose KV goes nowhere: a prefill node, if one can take it.
    fn cheapest_alone(&self, asked: &Asked<'_>) -> Result<Choice, LeftOut> {
        let mut left_out = LeftOut::default();
        let senders = self.computing(asked, &mut left_out);
        let locals = match senders.first() {
            Some(_) => Best::default(),
            None => self.decoding(asked, &mut left_out).1,
        };
        let mut others = Others::new(&senders, &locals, left_out);
        senders.all().chain(locals.all()).for_each(|side| others.add_local(&side));
        let best = senders.first().or(locals.first()).ok_or(left_out)?;
        let Side { key: decode, cost, work, cached } = best;
        let (prefill, source, pull) = (None, None, None);
        Ok(Choice { prefill, decode, source, pull, cached, work, cost, others })
    }

    /// The best prefill nodes.
    fn computing(&self, asked: &Asked<'_>, left_out: &mut LeftOut) -> Best {
        let mut best = Best::default();
        let scarcity = asked.pool.scarcity(asked.now);
        for (key, node) in self.looked_at(&asked.pool.prefill) {
            let mut candidate = match self.candidate(key, node, asked) {
                Ok(candidate) => candidate,
                Err(why) => {
                    left_out.add(key, why);
                    continue;
                }
            };
            let work = self.queued(asked, node, key, &mut candidate);
            let cost = cost::computing(&candidate, &work, scarcity);
            best.offer(Side { key, cost, work, cached: candidate.cached });
        }
        best
    }

    /// The best decode nodes, to receive the prompt's KV and to compute the prompt themselves; those
    /// with room for it, if there are any.
    fn decoding(&self, asked: &Asked<'_>, left_out: &mut LeftOut) -> (Best, Best) {
        let [mut roomy, mut full] = <[(Best, Best); 2]>::default();
        let mut without_room = LeftOut::default();
        let demand = &asked.job.demand;
        for (key, node) in self.looked_at(&asked.pool.decode) {
            let mut candidate = match self.candidate(key, node, asked) {
                Ok(candidate) => candidate,
                Err(why) => {
                    left_out.add(key, why);
                    continue;
                }
            };
            let fits = candidate.room >= demand.blocks;
            if !fits {
                without_room.add(key, Why::Full);
            }
            let (receivers, locals) = if fits { &mut roomy } else { &mut full };
            let cached = candidate.cached;
            // The link is counted with the pair.
            let cost = cost::receiving(demand, &candidate, 0.0);
            receivers.offer(Side { key, cost, work: Prefill::default(), cached });
            let mut work = self.queued(asked, node, key, &mut candidate);
            let cost = cost::local(demand, &candidate, &mut work);
            locals.offer(Side { key, cost, work, cached });
        }
        if roomy.0.first().is_none() {
            return full;
        }
        left_out.add_all(&without_room);
        roomy
    }

    /// Those of `nodes` that are on the shortlist.
    fn looked_at<'a>(
        &'a self,
        nodes: &'a [NodeKey],
    ) -> impl Iterator<Item = (NodeKey, &'a Node)> + 'a {
        self.shortlist.of(nodes).filter_map(|key| Some((key, self.node(key)?)))
    }

    /// Finds out what the nodes have of the request's blocks.
    fn look_up(&mut self, job: &Job) {
        let Coming { chain, popular } = &job.coming;
        self.index.longest_beyond(chain, *popular, &mut self.matches);
        self.cached.clear(*popular);
        let cached = &mut self.cached;
        self.expected.longest(chain, *popular, |node, blocks| cached.expect(node, blocks));
        let held = self.matches.iter().map(|(key, _)| key);
        let expected = self.cached.expecting();
        let expected = expected.filter(|&key| self.matches.of(key).blocks == 0);
        let all = held.chain(expected).map(|key| (key, self.cached.of(key, &self.matches)));
        self.shortlist.begin(all, *popular);
    }

    /// Whoever really holds most of the request's blocks, in device memory, and their tokens.
    fn source(&self, job: &Job) -> Option<(NodeKey, usize)> {
        let holders = self.matches.iter().filter_map(|(key, held)| {
            // What every node has or will have is fetched from nobody.
            if held.device_blocks <= job.coming.popular {
                return None;
            }
            let node = self.node(key).filter(|node| node.root == job.root)?;
            Some((held.device_blocks, std::cmp::Reverse((node.serving, key)), node.block_tokens))
        });
        let (blocks, std::cmp::Reverse((_, key)), block_tokens) = holders.max()?;
        let most = job.demand.tokens.saturating_sub(1);
        Some((key, (blocks * block_tokens).min(most)))
    }

    /// A node in numbers, if it may take the request.
    fn candidate(&self, key: NodeKey, node: &Node, asked: &Asked<'_>) -> Result<Candidate, Why> {
        let job = asked.job;
        // It would end the output earlier than the others.
        if node.max_model_len < job.longest {
            return Err(Why::TooSmall);
        }
        if !node.breaker.admits(asked.now) {
            return Err(Why::Failing);
        }
        if job.avoid.iter().any(|avoid| avoid.epoch == node.epoch && avoid.node == node.id) {
            return Err(Why::FailedIt);
        }
        let blocks = self.cached.of(key, &self.matches);
        let cached = (blocks * node.block_tokens).min(job.demand.tokens.saturating_sub(1));
        let typical = &asked.pool.typical[node.role as usize];
        Ok(node.candidate(cached, typical, asked.now))
    }

    /// How a node would compute the prompt, with the place in its queue added to the candidate.
    fn queued(
        &self,
        asked: &Asked<'_>,
        node: &Node,
        key: NodeKey,
        candidate: &mut Candidate,
    ) -> Prefill {
        let Asked { job, source, now, .. } = *asked;
        let source = source.filter(|&(from, _)| from != key).map(|(from, tokens)| {
            let serving = self.node(from).map_or(0, |node| node.serving);
            let ms_per_byte = asked.pulls.ms_per_byte(from, key) * (1.0 + f64::from(serving));
            Source { tokens, token_ms: ms_per_byte * job.demand.token_bytes }
        });
        let work = cost::prefill(&job.demand, candidate, source);
        if node.queue.is_empty() || job.turn == Some(key) {
            return work;
        }
        let place = node.queue.place(&job.entry(work.ms), now + candidate.queue_ms);
        candidate.queue_ms += place.ahead_ms;
        candidate.behind = place.behind;
        if place.slack_ms < work.ms {
            // Somebody behind it would be late.
            candidate.behind += 1;
            candidate.late = true;
        }
        work
    }

    fn cheapest_pair(
        &self,
        asked: &Asked<'_>,
        senders: &Best,
        receivers: &Best,
        others: &mut Others,
    ) -> Option<(Side, Side, Cost)> {
        let Demand { tokens, token_bytes, .. } = asked.job.demand;
        let mut best: Option<(Side, Side, Cost)> = None;
        for p in senders.all() {
            for d in receivers.all() {
                let incoming = self.node(d.key).map_or(0, |node| node.incoming);
                let missing = tokens.saturating_sub(d.cached) as f64 * token_bytes;
                let link = asked.handover.ms_per_byte(p.key, d.key);
                let mut cost = p.cost.and(&d.cost);
                cost.transfer += missing * link * (1.0 + f64::from(incoming));
                others.add_pair(&p, d.key, cost);
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
