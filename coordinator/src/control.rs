//! All that the coordinator decides, as one pure machine: what happened goes in, what is to be
//! done comes out. The driver gives it sockets and a clock.

use std::time::{Duration, Instant};

use baton_proto::hash::BlockHash;
use baton_proto::ids::{NodeId, RequestId, Role};
use baton_proto::message::{Command, Hello, NodeEvent};
use baton_proto::share::Share;

use crate::cluster::{Cluster, LinkId, NodeRef, Refusal};
use crate::core::{
    CacheView, ModelInfo, NewRequest, NodeCacheView, NodeView, StatusView, SubmitError,
};
use crate::index::{Heard, Index, Matches, NodeKeys, Tier};
use crate::ledger::Ledger;
use crate::orders::{Order, OrderError};
use crate::peers::{Own, Shares};
use crate::placement::LocalPrefill;
use crate::placing::Placing;
use crate::requests::{Action, Context, Limits, Requests, Totals};
use crate::roles::Roles;

/// Index entries of nodes that left, cleared per report.
const SWEEP_PER_REPORT: usize = 4096;

/// What an operator may choose.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bounds on requests.
    pub limits: Limits,
    /// Blocks in the index.
    pub index_blocks: usize,
    /// Whether decode nodes may compute prompts.
    pub local_prefill: LocalPrefill,
}

/// The coordinator's state. See the module's description.
#[derive(Debug)]
pub struct Control {
    nodes: Placing,
    requests: Requests,
    /// Shifts nodes between roles, if that is wanted.
    roles: Option<Roles>,
    started: Instant,
}

impl Control {
    /// Without nodes and requests.
    #[must_use]
    pub fn new(options: Options, now: Instant) -> Self {
        let nodes = Placing {
            cluster: Cluster::default(),
            keys: NodeKeys::default(),
            index: Index::new(options.index_blocks),
            matches: Matches::default(),
            ledger: Ledger::default(),
            shares: Shares::default(),
            local_prefill: options.local_prefill,
        };
        Self { nodes, requests: Requests::new(options.limits), roles: None, started: now }
    }

    /// A node says hello on a new stream. An earlier stream of it is over with this.
    pub fn join(
        &mut self,
        node: &NodeId,
        hello: Hello,
        link: LinkId,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        self.nodes.cluster.admit(node, &hello)?;
        if let Some(earlier) = self.nodes.cluster.member(node).map(|member| member.link) {
            self.leave(node, earlier, now, out);
        }
        let epoch = hello.epoch;
        self.nodes.cluster.join(node, hello, link, now)?;
        self.nodes.shares.joined(node, epoch);
        let key = self.nodes.keys.join(node);
        self.nodes.index.join(key, Tier::Device);
        self.nodes.ledger.clear(node);
        self.requests.node_joined(&mut Context { now, placer: &mut self.nodes, out });
        Ok(())
    }

    /// A stream ended. Returns whether that took the node away: a replaced stream does not.
    pub fn leave(
        &mut self,
        node: &NodeId,
        link: LinkId,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(member) = self.nodes.cluster.leave(node, link) else {
            return false;
        };
        self.nodes.shares.left(node);
        if let Some(key) = self.nodes.keys.leave(node) {
            self.nodes.index.leave(key);
        }
        self.nodes.ledger.clear(node);
        let lost = NodeRef { node: node.clone(), epoch: member.hello.epoch };
        self.requests.node_lost(&lost, &mut Context { now, placer: &mut self.nodes, out });
        true
    }

    /// A node says something on its stream.
    pub fn event(
        &mut self,
        node: &NodeId,
        link: LinkId,
        event: NodeEvent,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let Some(member) = self.nodes.cluster.member(node).filter(|m| m.link == link) else {
            return;
        };
        let from = NodeRef { node: node.clone(), epoch: member.hello.epoch };
        let Some(key) = self.nodes.keys.of(node) else { return };
        let index = &mut self.nodes.index;
        match event {
            NodeEvent::Report(report) => {
                self.nodes.ledger.report(node, &report, now);
                self.nodes.shares.reported(node, now);
                self.nodes.cluster.report(node, report, now);
                index.sweep(SWEEP_PER_REPORT);
            }
            NodeEvent::Cache { sequence, stored, removed } => {
                let heard = index.event(key, sequence, Tier::Device, &stored, &removed);
                if heard == Heard::NeedSnapshot {
                    out.push(Action::Send { to: from, command: Command::SendSnapshot });
                }
            }
            NodeEvent::Snapshot { sequence, hashes, last } => {
                index.snapshot(key, sequence, Tier::Device, &hashes, last);
            }
            other => {
                let mut cx = Context { now, placer: &mut self.nodes, out };
                self.requests.event(&from, other, &mut cx);
            }
        }
    }

    /// A request arrives, with the hashes of its full blocks.
    pub fn submit(
        &mut self,
        request: NewRequest,
        chain: Vec<BlockHash>,
        arrived: Instant,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<(), SubmitError> {
        let model = self.nodes.cluster.model(&request.model).cloned();
        let model = model.ok_or_else(|| SubmitError::UnknownModel(request.model.clone()))?;
        let mut cx = Context { now, placer: &mut self.nodes, out };
        self.requests.arrive(request, chain, model, arrived, &mut cx)
    }

    /// How long it took to choose the nodes of a request that just arrived.
    pub fn placed_in(&mut self, id: RequestId, took: Duration) {
        self.requests.placed_in(id, took);
    }

    /// The client is gone, or wants no more.
    pub fn cancel(&mut self, id: RequestId, now: Instant, out: &mut Vec<Action>) {
        self.requests.cancel(id, &mut Context { now, placer: &mut self.nodes, out });
    }

    /// The client has what it wanted.
    pub fn stop(&mut self, id: RequestId, now: Instant, out: &mut Vec<Action>) {
        self.requests.stop(id, &mut Context { now, placer: &mut self.nodes, out });
    }

    /// Ends all requests.
    pub fn shut_down(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.requests.shut_down(&mut Context { now, placer: &mut self.nodes, out });
    }

    /// When [`Self::handle_timeout`] must be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let roles = self.roles.as_ref().map(Roles::poll_timeout);
        let timeouts = [self.requests.poll_timeout(), self.nodes.shares.poll_timeout(), roles];
        timeouts.into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.nodes.shares.expire(now);
        self.move_nodes(now, out);
        self.requests.handle_timeout(&mut Context { now, placer: &mut self.nodes, out });
    }

    /// From now on nodes are shifted between roles as load shifts. `name`: this coordinator; of several
    /// that hear each other, the first by name decides.
    pub fn adjust_roles(&mut self, name: NodeId, now: Instant) {
        self.roles = Some(Roles::new(name, now));
    }

    fn move_nodes(&mut self, now: Instant, out: &mut Vec<Action>) {
        let Some(roles) = self.roles.as_mut().filter(|roles| roles.poll_timeout() <= now) else {
            return;
        };
        let Placing { cluster, shares, .. } = &self.nodes;
        let decides = shares.peers().all(|peer| roles.name < *peer);
        for (node, role) in roles.observe(&cluster.seen(), decides, now) {
            // A node that left meanwhile needs no order.
            if let Ok((to, command)) = Order::Role(role).command(&node, false, cluster) {
                out.push(Action::Send { to, command });
            }
        }
    }

    /// An operator asks something of a node.
    pub fn order(
        &self,
        node: &NodeId,
        order: Order,
        force: bool,
        out: &mut Vec<Action>,
    ) -> Result<(), OrderError> {
        let (to, command) = order.command(node, force, &self.nodes.cluster)?;
        out.push(Action::Send { to, command });
        Ok(())
    }

    /// What to tell other coordinators.
    pub fn share(&mut self, now: Instant) -> Share {
        let Placing { cluster, ledger, shares, .. } = &mut self.nodes;
        let own = ledger.recent(now).filter_map(|(node, sent, load)| {
            let epoch = cluster.member(node)?.hello.epoch;
            Some(Own { node, epoch, sent, load })
        });
        shares.share(own, now)
    }

    /// Another coordinator says what it has promised.
    pub fn heard(&mut self, from: &NodeId, share: Share, now: Instant) {
        self.nodes.shares.heard(from, share, now);
    }

    /// All models known.
    #[must_use]
    pub fn models(&self) -> Vec<ModelInfo> {
        self.nodes.cluster.models()
    }

    /// Counts since the start.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.requests.totals()
    }

    /// Joined nodes, by name.
    #[must_use]
    pub fn nodes(&self, now: Instant) -> Vec<NodeView> {
        self.nodes.cluster.views(now)
    }

    /// The coordinator as a whole.
    #[must_use]
    pub fn status(&self, now: Instant) -> StatusView {
        let cluster = &self.nodes.cluster;
        let ready = cluster.models().into_iter().filter(|model| cluster.is_ready(model));
        let models: Vec<String> = ready.map(|model| model.name).collect();
        let decode_nodes = cluster.count(Role::Decode);
        let reason = match (models.is_empty(), decode_nodes) {
            (false, _) => "",
            (true, 0) => "no decode node has joined",
            (true, _) => "every decode node is draining",
        };
        let Totals { finished, failed, retried } = self.requests.totals();
        StatusView {
            ready: !models.is_empty(),
            reason: reason.to_owned(),
            models,
            requests_active: self.requests.len(),
            prefill_nodes: cluster.count(Role::Prefill),
            decode_nodes,
            peers: self.nodes.shares.peers().map(ToString::to_string).collect(),
            uptime: now.saturating_duration_since(self.started),
            requests_finished: finished,
            requests_failed: failed,
            requests_retried: retried,
        }
    }

    /// What the prefix caches hold, of one node or of all, and how much of a prompt.
    pub fn cache(
        &mut self,
        node: Option<&NodeId>,
        chain: &[BlockHash],
        block_tokens: usize,
    ) -> CacheView {
        let Placing { cluster, keys, index, matches, .. } = &mut self.nodes;
        index.longest(chain, matches);
        let names = cluster.names().filter(|id| node.is_none_or(|node| node == *id));
        let view = |id: &NodeId| {
            let key = keys.of(id)?;
            let matched_tokens = (matches.of(key).blocks * block_tokens) as u64;
            Some(NodeCacheView { node: id.clone(), blocks: index.blocks_of(key), matched_tokens })
        };
        let (nodes, index_bytes) = (names.filter_map(view).collect(), index.bytes() as u64);
        CacheView { nodes, index_blocks: self.index_blocks(), index_bytes }
    }

    /// Blocks in the index.
    #[must_use]
    pub fn index_blocks(&self) -> u64 {
        self.nodes.index.len() as u64
    }

    /// Attempts that are promised to nodes: none once all requests have ended.
    #[must_use]
    pub fn owes_nothing(&self) -> bool {
        self.nodes.ledger.is_empty()
    }
}
