//! What other coordinators have promised to the same nodes, and what this one tells them.
//!
//! Every node reports to every coordinator, and a report includes the work of all of them. So only
//! what the node's last report here cannot show yet has to be learned from the others: promises
//! younger than that report. Shares are whole states with durations instead of times, so a lost or
//! late one needs no repair, and no clocks are compared. A coordinator that falls silent is
//! forgotten: nodes cancel its jobs by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use baton_proto::ids::{Epoch, NodeId};
use baton_proto::share::{
    MAX_PROMISES, MAX_SHARED_NODES, NodePromises, Promise, Share, SharedLoad,
};

use crate::node_map::NodeMap;
use crate::placement::REPORT_LAG;

/// Most other coordinators that are listened to.
pub const MAX_PEERS: usize = 16;
/// What a coordinator promised is forgotten this long after it last said so.
pub const SILENCE: Duration = Duration::from_secs(1);
/// Promises of about the same age are told as one; the last group holds all older ones.
const GROUP: Duration = Duration::from_millis(16);

/// What the other coordinators say. Pure.
#[derive(Debug, Default)]
pub struct Shares {
    peers: BTreeMap<NodeId, Heard>,
    nodes: BTreeMap<NodeId, Node>,
    /// Sums over all peers, where they are not zero.
    loads: NodeMap<SharedLoad>,
    /// Of the last share given to others.
    sequence: u64,
}

/// The last share of another coordinator.
#[derive(Debug)]
struct Heard {
    at: Instant,
    sequence: u64,
    promises: BTreeMap<NodeId, (Epoch, Vec<Sent>)>,
}

/// Work that another coordinator sent to a node at about this time.
#[derive(Clone, Copy, Debug)]
struct Sent {
    at: Instant,
    load: SharedLoad,
}

/// A node that is joined here.
#[derive(Debug)]
struct Node {
    epoch: Epoch,
    /// Its last report shows what was sent to it until then.
    shown: Option<Instant>,
}

/// One own promise that reports may not show yet.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// Which node.
    pub node: &'a NodeId,
    /// Which life of it.
    pub epoch: Epoch,
    /// When it was promised.
    pub sent: Instant,
    /// What.
    pub load: SharedLoad,
}

impl Shares {
    /// A node joined, with nothing reported yet.
    pub fn joined(&mut self, node: &NodeId, epoch: Epoch) {
        self.nodes.insert(node.clone(), Node { epoch, shown: None });
        self.sum(node);
    }

    /// A node left.
    pub fn left(&mut self, node: &NodeId) {
        self.nodes.remove(node);
        self.sum(node);
    }

    /// A node's report came.
    pub fn reported(&mut self, node: &NodeId, now: Instant) {
        if let Some(known) = self.nodes.get_mut(node) {
            known.shown = now.checked_sub(REPORT_LAG);
            self.sum(node);
        }
    }

    /// Another coordinator says what it has promised. Whether it was taken: an earlier share that
    /// comes after a later one is not, nor is that of one coordinator too many.
    pub fn heard(&mut self, from: &NodeId, share: Share, now: Instant) -> bool {
        self.expire(now);
        let known = self.peers.get(from);
        let late = known.is_some_and(|known| share.sequence <= known.sequence);
        if late || (known.is_none() && self.peers.len() >= MAX_PEERS) {
            return false;
        }
        let sent =
            |promise: Promise| Some(Sent { at: now.checked_sub(promise.age)?, load: promise.load });
        let promises = share.nodes.into_iter().map(|NodePromises { node, epoch, promises }| {
            (node, (epoch, promises.into_iter().filter_map(sent).collect()))
        });
        let heard = Heard { at: now, sequence: share.sequence, promises: promises.collect() };
        let named: Vec<NodeId> = heard.promises.keys().cloned().collect();
        let before = self.peers.insert(from.clone(), heard);
        let before = before.into_iter().flat_map(|before| before.promises.into_keys());
        before.chain(named).collect::<BTreeSet<_>>().iter().for_each(|node| self.sum(node));
        true
    }

    /// What others have promised to a node and its last report does not show.
    #[must_use]
    pub fn load(&self, node: &NodeId) -> SharedLoad {
        self.loads.get(node).copied().unwrap_or_default()
    }

    /// Names of the other coordinators that are heard, in order.
    pub fn peers(&self) -> impl Iterator<Item = &NodeId> {
        self.peers.keys()
    }

    /// When [`Self::expire`] must be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.peers.values().map(|heard| heard.at + SILENCE).min()
    }

    /// Forgets coordinators that fell silent. Whether there were any.
    pub fn expire(&mut self, now: Instant) -> bool {
        let silent = self.peers.iter().filter(|(_, heard)| heard.at + SILENCE <= now);
        let silent: Vec<NodeId> = silent.map(|(peer, _)| peer.clone()).collect();
        for peer in &silent {
            let heard = self.peers.remove(peer);
            let nodes = heard.into_iter().flat_map(|heard| heard.promises.into_keys());
            nodes.for_each(|node| self.sum(&node));
        }
        !silent.is_empty()
    }

    fn sum(&mut self, node: &NodeId) {
        let mut load = SharedLoad::default();
        if let Some(Node { epoch, shown }) = self.nodes.get(node) {
            let all = self.peers.values().filter_map(|heard| heard.promises.get(node));
            let valid = all.filter(|(life, _)| life == epoch).flat_map(|(_, sent)| sent);
            let unseen = valid.filter(|sent| shown.is_none_or(|shown| sent.at > shown));
            unseen.for_each(|sent| load += sent.load);
        }
        if load == SharedLoad::default() {
            self.loads.remove(node);
        } else {
            self.loads.insert(node.clone(), load);
        }
    }

    /// What to tell the others; `own` is what this coordinator has promised.
    pub fn share<'a>(&mut self, own: impl IntoIterator<Item = Own<'a>>, now: Instant) -> Share {
        let mut nodes: BTreeMap<&NodeId, (Epoch, [Option<Promise>; MAX_PROMISES])> =
            BTreeMap::new();
        for Own { node, epoch, sent, load } in own {
            if nodes.len() >= MAX_SHARED_NODES && !nodes.contains_key(node) {
                continue;
            }
            let age = now.saturating_duration_since(sent);
            let group = (age.as_millis() / GROUP.as_millis()).min(MAX_PROMISES as u128 - 1);
            let (_, groups) = nodes.entry(node).or_insert((epoch, [None; MAX_PROMISES]));
            let group =
                groups[group as usize].get_or_insert(Promise { age, load: SharedLoad::default() });
            group.age = group.age.min(age);
            group.load += load;
        }
        let told = |(node, (epoch, groups)): (&NodeId, (Epoch, [Option<Promise>; _]))| {
            let promises = groups.into_iter().flatten().collect();
            NodePromises { node: node.clone(), epoch, promises }
        };
        self.sequence += 1;
        Share { sequence: self.sequence, nodes: nodes.into_iter().map(told).collect() }
    }
}

#[cfg(test)]
#[path = "peers_tests.rs"]
mod tests;
