//! All that the coordinator decides, as one pure machine: what happened goes in, what is to be
//! done comes out. The driver gives it sockets and a clock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::hash::BlockHash;
use baton_proto::ids::{NodeId, RequestId};
use baton_proto::message::{Command, Hello, NodeEvent, Report};
use baton_proto::share::Share;

use crate::cluster::{Cluster, LinkId, NodeRef, Refusal};
use crate::core::{NewRequest, SubmitError};
use crate::events::{Events, Happening};
use crate::index::{Heard, Index, Matches, Tier};
use crate::orders::{Order, OrderError};
use crate::peers::Shares;
use crate::placement::{self, Placement, Turn};
use crate::requests::{Action, Context, Limits, Requests};
use crate::roles::Roles;

mod looks;

pub(crate) use looks::Load;

/// Index entries of nodes that left, cleared per report.
const SWEEP_PER_REPORT: usize = 4096;

/// What an operator may choose.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bounds on requests.
    pub limits: Limits,
    /// Blocks in the index.
    pub index_blocks: usize,
    /// How requests are placed.
    pub placement: placement::Options,
}

/// The coordinator's state. See the module's description.
#[derive(Debug)]
pub struct Control {
    cluster: Cluster,
    placement: Placement,
    shares: Shares,
    matches: Matches,
    requests: Requests,
    /// What happened lately.
    events: Events,
    /// Shifts nodes between roles, if that is wanted.
    roles: Option<Roles>,
    started: Instant,
}

impl Control {
    /// Without nodes and requests.
    #[must_use]
    pub fn new(options: Options, now: Instant) -> Self {
        let index = Index::new(options.index_blocks);
        Self {
            cluster: Cluster::default(),
            placement: Placement::new(index, options.placement, now),
            shares: Shares::default(),
            matches: Matches::default(),
            requests: Requests::new(options.limits),
            events: Events::default(),
            roles: None,
            started: now,
        }
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
        self.cluster.admit(node, &hello)?;
        if let Some(earlier) = self.cluster.member(node).map(|member| member.link) {
            self.leave(node, earlier, now, out);
        }
        self.cluster.join(node, hello.clone(), link, now)?;
        let (role, model) = (hello.role, hello.model.clone());
        self.events.push(Happening::Joined { node: node.clone(), role, model }, now);
        self.shares.joined(node, hello.epoch);
        self.placement.join(node, &hello, now);
        self.placement.share(node, self.shares.load(node));
        self.of_requests(now, out, Requests::node_joined);
        self.take_turns(now, out);
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
        let Some(member) = self.cluster.leave(node, link) else {
            return false;
        };
        self.events.push(Happening::Left(node.clone()), now);
        self.placement.leave(node);
        self.shares.left(node);
        let lost = NodeRef { node: node.clone(), epoch: member.hello.epoch };
        self.of_requests(now, out, |requests, cx| requests.node_lost(&lost, cx));
        self.take_turns(now, out);
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
        let Some(member) = self.cluster.member(node).filter(|m| m.link == link) else {
            return;
        };
        let (was, from) = (
            (member.hello.role, member.report.draining),
            NodeRef { node: node.clone(), epoch: member.hello.epoch },
        );
        let Some(key) = self.placement.key(node) else { return };
        let index = &mut self.placement.index;
        match event {
            NodeEvent::Report(report) => {
                self.events.reported(node, was, &report, now);
                self.reported(node, report, now);
            }
            NodeEvent::Cache { sequence, stored, removed } => {
                let heard = index.event(key, sequence, Tier::Device, &stored, &removed);
                self.placement.evicted(key, removed.len());
                if heard == Heard::NeedSnapshot {
                    out.push(Action::Send { to: from, command: Command::SendSnapshot });
                }
                return;
            }
            NodeEvent::Snapshot { sequence, hashes, last } => {
                index.snapshot(key, sequence, Tier::Device, &hashes, last);
                return;
            }
            other => self.of_requests(now, out, |requests, cx| requests.event(&from, other, cx)),
        }
        self.take_turns(now, out);
    }

    fn reported(&mut self, node: &NodeId, report: Report, now: Instant) {
        self.placement.index.sweep(SWEEP_PER_REPORT);
        self.shares.reported(node, now);
        let alone = self.shares.peers().next().is_none();
        self.placement.report(node, &report, alone, now);
        self.placement.share(node, self.shares.load(node));
        self.cluster.report(node, report, now);
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
        let model = self.cluster.model(&request.model).cloned();
        let model = model.ok_or_else(|| SubmitError::UnknownModel(request.model.clone()))?;
        self.of_requests(now, out, |requests, cx| {
            requests.arrive(request, Arc::new(chain), model, arrived, cx)
        })
    }

    /// How long it took to choose the nodes of a request that just arrived.
    pub fn placed_in(&mut self, id: RequestId, took: Duration) {
        self.requests.placed_in(id, took);
    }

    /// The client is gone, or wants no more.
    pub fn cancel(&mut self, id: RequestId, now: Instant, out: &mut Vec<Action>) {
        self.of_requests(now, out, |requests, cx| requests.cancel(id, cx));
    }

    /// The client has what it wanted.
    pub fn stop(&mut self, id: RequestId, now: Instant, out: &mut Vec<Action>) {
        self.of_requests(now, out, |requests, cx| requests.stop(id, cx));
    }

    /// Ends all requests.
    pub fn shut_down(&mut self, now: Instant, out: &mut Vec<Action>) {
        self.of_requests(now, out, Requests::shut_down);
    }

    /// When [`Self::handle_timeout`] must be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let roles = self.roles.as_ref().map(Roles::poll_timeout);
        let turn = self.placement.poll_timeout();
        let (requests, shares) = (self.requests.poll_timeout(), self.shares.poll_timeout());
        let timeouts = [requests, shares, self.events.poll_timeout(), turn, roles];
        timeouts.into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Vec<Action>) {
        if self.shares.expire(now) {
            self.learn_shares();
        }
        self.events.handle_timeout(now);
        self.move_nodes(now, out);
        self.of_requests(now, out, Requests::handle_timeout);
        self.take_turns(now, out);
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
        let cluster = &self.cluster;
        let decides = self.shares.peers().all(|peer| roles.name < *peer);
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
        let (to, command) = order.command(node, force, &self.cluster)?;
        out.push(Action::Send { to, command });
        Ok(())
    }

    /// What to tell other coordinators.
    pub fn share(&mut self, now: Instant) -> Share {
        let own = self.placement.recent(now);
        self.shares.share(own, now)
    }

    /// Another coordinator says what it has promised.
    pub fn heard(&mut self, from: &NodeId, share: Share, now: Instant) {
        self.shares.heard(from, share, now);
        self.learn_shares();
    }

    /// Attempts that are promised to nodes: none once all requests have ended.
    #[must_use]
    pub fn owes_nothing(&self) -> bool {
        self.placement.is_idle()
    }

    /// Sends what waited and may go now.
    fn take_turns(&mut self, now: Instant, out: &mut Vec<Action>) {
        while let Some(turn) = self.placement.next(now) {
            self.of_requests(now, out, |requests, cx| match turn {
                Turn::Go(request, placed) => requests.turn(request, placed, cx),
                Turn::Again(request) => requests.again(request, cx),
            });
        }
    }

    /// Does something with the requests, and what they need for it.
    fn of_requests<T>(
        &mut self,
        now: Instant,
        out: &mut Vec<Action>,
        act: impl FnOnce(&mut Requests, &mut Context<'_>) -> T,
    ) -> T {
        let Self { requests, placement, events, .. } = self;
        act(requests, &mut Context { now, placer: placement, events, out })
    }

    fn learn_shares(&mut self) {
        self.placement.share_all(|node| self.shares.load(node));
    }
}
