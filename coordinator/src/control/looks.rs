//! What operators and the front look at: models, nodes and caches, requests, events, and the cluster's
//! pulse.

use std::collections::BTreeMap;
use std::time::Instant;

use baton_proto::hash::BlockHash;
use baton_proto::ids::{NodeId, RequestId, Role};

use super::Control;
use crate::alerts::Facts;
use crate::aliases::Estimate;
use crate::core::{
    CacheView, Explained, ModelInfo, NodeCacheView, NodeView, Pulse, RequestList, StatusView,
};
use crate::events::{Event, Happening};
use crate::history::{FindError, IdPrefix, Record, RequestView};
use crate::request::{Phase, Request};
use crate::requests::{Action, Totals};

/// Requests that have not ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// On nodes.
    pub(crate) running: usize,
    /// On none: those whose turn is to come, and those for whom there is no node.
    pub(crate) waiting: usize,
}

impl Control {
    /// Requests by their model, of all models known.
    pub(crate) fn loads(&self) -> BTreeMap<&str, Load> {
        let models = self.cluster.model_names().map(|model| (model, Load::default()));
        let mut loads: BTreeMap<_, _> = models.collect();
        for request in self.requests.running() {
            let load = loads.entry(request.model.name.as_str()).or_default();
            match request.phase {
                Phase::Waiting { .. } | Phase::Held => load.waiting += 1,
                Phase::Running(_) | Phase::Finishing { .. } => load.running += 1,
            }
        }
        loads
    }

    /// All models known.
    #[must_use]
    pub fn models(&self) -> Vec<ModelInfo> {
        self.cluster.models()
    }

    /// Counts since the start.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.requests.totals()
    }

    /// Joined nodes, by name.
    #[must_use]
    pub fn nodes(&self, now: Instant) -> Vec<NodeView> {
        self.cluster.views(now)
    }

    /// The coordinator as a whole.
    #[must_use]
    pub fn status(&self, now: Instant) -> StatusView {
        let cluster = &self.cluster;
        let ready = cluster.models().into_iter().filter(|model| cluster.is_ready(model));
        let models: Vec<String> = ready.map(|model| model.name).collect();
        let decode_nodes = cluster.count(Role::Decode);
        let reason = match (models.is_empty(), decode_nodes) {
            (false, _) => "",
            (true, 0) => "no decode node has joined",
            (true, _) => "every decode node is draining",
        };
        let Totals { finished, failed, retried, .. } = self.requests.totals();
        StatusView {
            ready: !models.is_empty(),
            reason: reason.to_owned(),
            models,
            requests_active: self.requests.len(),
            requests_waiting: self.placement.waiting(),
            prefill_nodes: cluster.count(Role::Prefill),
            decode_nodes,
            peers: self.shares.peers().map(ToString::to_string).collect(),
            uptime: now.saturating_duration_since(self.started),
            requests_finished: finished,
            requests_failed: failed,
            requests_retried: retried,
        }
    }

    /// What a prompt of so many tokens would take with this model, if it can be served now.
    #[must_use]
    pub fn estimate(&self, model: &str, tokens: usize, now: Instant) -> Option<Estimate> {
        let model = self.cluster.model(model).filter(|model| self.cluster.is_ready(model))?;
        self.placement.estimate(model.root, tokens, now)
    }

    /// What the prefix caches hold, of one node or of all, and how much of a prompt.
    pub fn cache(
        &mut self,
        node: Option<&NodeId>,
        chain: &[BlockHash],
        block_tokens: usize,
    ) -> CacheView {
        let Self { cluster, placement, matches, .. } = self;
        placement.index.longest(chain, matches);
        let names = cluster.names().filter(|id| node.is_none_or(|node| node == *id));
        let view = |id: &NodeId| {
            let key = placement.key(id)?;
            let matched_tokens = (matches.of(key).blocks * block_tokens) as u64;
            let blocks = placement.index.blocks_of(key);
            let hits = placement.hits(key);
            Some(NodeCacheView { node: id.clone(), blocks, matched_tokens, hits })
        };
        let nodes = names.filter_map(view).collect();
        let index_bytes = placement.index.bytes() as u64;
        CacheView { nodes, index_blocks: self.index_blocks(), index_bytes }
    }

    /// Blocks in the index.
    #[must_use]
    pub fn index_blocks(&self) -> u64 {
        self.placement.index.len() as u64
    }

    /// Requests that run, the oldest first, then those that ended or were refused, the newest first.
    #[must_use]
    pub fn requests(&self, only_active: bool, limit: usize, now: Instant) -> RequestList {
        let mut running: Vec<&Request> = self.requests.running().collect();
        running.sort_unstable_by_key(|request| request.arrived);
        let views = running.iter().take(limit).map(|request| request.view(now));
        let mut requests: Vec<RequestView> = views.collect();
        if !only_active {
            let rest = limit - requests.len();
            let ended = self.requests.history().latest().take(rest);
            requests.extend(ended.map(|record| record.view.clone()));
        }
        RequestList { requests, active: running.len() }
    }

    /// One request, and why it went where it went.
    pub fn explain(&self, id: IdPrefix, now: Instant) -> Result<Explained, FindError> {
        let running = self.requests.running_as(id).map(|request| request.record(now));
        let ids = id.range();
        let ended = self.requests.history().latest();
        let ended = ended.filter(|record| ids.contains(&record.view.id)).cloned();
        let record = single(running.chain(ended), |record| record.view.id)?;
        let waits = self.placement.waits_for(record.view.id);
        Ok(Explained { record, waits })
    }

    /// An operator ends a request.
    pub fn cancel_one(
        &mut self,
        id: IdPrefix,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<RequestId, FindError> {
        let running = self.requests.running_as(id).map(|request| request.new.id);
        let id = match single(running, |id| *id) {
            Err(FindError::Unknown) => return Err(self.why_not_running(id, now)),
            found => found?,
        };
        self.events.push(Happening::Cancelled(id), now);
        self.cancel(id, now, out);
        Ok(id)
    }

    fn why_not_running(&self, id: IdPrefix, now: Instant) -> FindError {
        match self.explain(id, now) {
            Ok(Explained { record: Record { view, .. }, .. }) => FindError::Ended(view.id),
            Err(error) => error,
        }
    }

    /// Number of the newest event.
    #[must_use]
    pub fn newest_event(&self) -> u64 {
        self.events.newest()
    }

    /// Events after that number, the oldest first.
    #[must_use]
    pub fn events_after(&self, after: u64, most: usize) -> Vec<Event> {
        self.events.after(after, most)
    }

    /// How the cluster does.
    #[must_use]
    pub fn pulse(&self, now: Instant) -> Pulse {
        let (status, nodes) = (self.status(now), self.nodes(now));
        let resting: Vec<_> = self.placement.resting(now).cloned().collect();
        let facts = Facts {
            reason: &status.reason,
            nodes: &nodes,
            resting: &resting,
            events: &self.events,
            now,
        };
        Pulse {
            alerts: facts.alerts(),
            totals: self.requests.totals(),
            recent: self.requests.history().recent(now),
            transfers: self.placement.transfers(),
        }
    }
}

/// The only one of `all`. The same id may have been refused and run afterwards: the first counts.
fn single<T>(all: impl Iterator<Item = T>, id: impl Fn(&T) -> RequestId) -> Result<T, FindError> {
    let mut all = all.into_iter();
    let first = all.next().ok_or(FindError::Unknown)?;
    let others = all.any(|other| id(&other) != id(&first));
    if others { Err(FindError::Ambiguous) } else { Ok(first) }
}

#[cfg(test)]
#[path = "looks_tests.rs"]
mod tests;
