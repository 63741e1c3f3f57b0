//! The cheapest few of the placements that were compared for one request, so that a decision can be
//! explained. Fixed in size: every decision makes one.

use baton_proto::ids::NodeId;
use smallvec::SmallVec;

use super::Placement;
use super::best::{Best, Side};
use super::choose::Choice;
use super::cost::Cost;
use super::job::Job;
use super::left_out::LeftOut;
use super::pool::Pool;
use crate::decision::{Considered, Decision, MOST_CONSIDERED, MOST_LEFT_OUT, Why};
use crate::index::NodeKey;

/// Pairs that are kept, and single nodes.
const PAIRS: usize = 4;
const LOCALS: usize = MOST_CONSIDERED - PAIRS;

/// A placement that was compared.
#[derive(Clone, Copy, Debug)]
struct Other {
    prefill: Option<NodeKey>,
    decode: NodeKey,
    pulls: bool,
    cached: usize,
    cost: Cost,
    total: f64,
}

/// See the module's description.
#[derive(Clone, Copy, Debug)]
pub(super) struct Others {
    prefill_nodes: usize,
    decode_nodes: usize,
    pairs: [Option<Other>; PAIRS],
    locals: [Option<Other>; LOCALS],
    left_out: LeftOut,
}

impl Others {
    pub(super) fn new(senders: &Best, receivers: &Best, left_out: LeftOut) -> Self {
        let (prefill_nodes, decode_nodes) = (senders.offered(), receivers.offered());
        let (pairs, locals) = ([None; PAIRS], [None; LOCALS]);
        Self { prefill_nodes, decode_nodes, pairs, locals, left_out }
    }

    /// A decode node by itself; the cheapest come first.
    pub(super) fn add_local(&mut self, side: &Side) {
        if let Some(free) = self.locals.iter_mut().find(|other| other.is_none()) {
            *free = Some(Other {
                prefill: None,
                decode: side.key,
                pulls: side.work.pulls,
                cached: side.cached,
                cost: side.cost,
                total: side.cost.total(),
            });
        }
    }

    /// A pair, in any order.
    pub(super) fn add_pair(&mut self, sender: &Side, decode: NodeKey, cost: Cost) {
        let total = cost.total();
        let worse = |other: &Option<Other>| other.is_none_or(|other| total < other.total);
        if let Some(at) = self.pairs.iter().position(worse) {
            self.pairs[at..].rotate_right(1);
            let (prefill, pulls, cached) = (Some(sender.key), sender.work.pulls, sender.cached);
            self.pairs[at] = Some(Other { prefill, decode, pulls, cached, cost, total });
        }
    }

    /// All, the one that was chosen first, then by their cost.
    fn in_order(&self, choice: &Choice) -> SmallVec<[&Other; MOST_CONSIDERED]> {
        let mut all: SmallVec<[&Other; MOST_CONSIDERED]> =
            self.pairs.iter().chain(&self.locals).flatten().collect();
        let chosen = |o: &Other| o.prefill == choice.prefill && o.decode == choice.decode;
        all.sort_unstable_by(|a, b| chosen(b).cmp(&chosen(a)).then(a.total.total_cmp(&b.total)));
        all
    }
}

impl Placement {
    /// The choice with names, as it is to be remembered.
    pub(super) fn decision(&self, job: &Job, choice: &Choice, now: f64) -> Decision {
        let source = choice.source.map(|(key, tokens)| (self.name(key), tokens));
        let considered = |other: &Other| Considered {
            prefill: other.prefill.map(|key| self.name(key)),
            decode: self.name(other.decode),
            pull: source.clone().filter(|_| other.pulls),
            cached: other.cached,
            cost: other.cost,
        };
        let others = &choice.others;
        Decision {
            prefill_nodes: others.prefill_nodes,
            decode_nodes: others.decode_nodes,
            considered: others.in_order(choice).into_iter().map(considered).collect(),
            ..self.no_decision(job, &others.left_out, now)
        }
    }

    /// The same where there was no choice.
    pub(super) fn no_decision(&self, job: &Job, left_out: &LeftOut, now: f64) -> Decision {
        let pool = self.pools.get(&job.root);
        let draining = pool.map_or(&[][..], |pool| &pool.draining);
        let all = left_out.iter().chain(draining.iter().map(|&key| (key, Why::Draining)));
        let named: Vec<_> =
            all.take(MOST_LEFT_OUT).map(|(key, why)| (self.name(key), why)).collect();
        let joined: usize = self.pools.values().map(Pool::len).sum();
        Decision {
            at: self.instant(now),
            tokens: job.demand.tokens,
            prefill_nodes: 0,
            decode_nodes: 0,
            considered: Vec::new(),
            more_left_out: left_out.count() + draining.len() - named.len(),
            left_out: named,
            of_other_models: joined - pool.map_or(0, Pool::len),
        }
    }

    fn name(&self, key: NodeKey) -> NodeId {
        self.node(key).expect("a node that was looked at is joined").id.clone()
    }
}
