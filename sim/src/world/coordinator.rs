//! A coordinator: the real [`Control`], its nodes' streams and its clients.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use baton_coordinator::cluster::{LinkId, NodeRef};
use baton_coordinator::control::{Control, Options};
use baton_coordinator::core::{NewRequest, SubmitError, Update};
use baton_coordinator::orders::{Order, OrderError};
use baton_coordinator::requests::Action;
use baton_proto::hash::BlockHash;
use baton_proto::ids::{Epoch, NodeId, RequestId};
use baton_proto::message::{Command, NodeEvent, Peer, Pull};

use super::legs::Legs;
use super::log::note;
use super::net::{Close, Message, Net, Party, WireId};
use super::node::index_of;
use super::{Event, Meddling};

/// See the module's description.
pub(crate) struct Coordinator {
    index: usize,
    pub(crate) life: u64,
    pub(crate) control: Control,
    /// Of each joined node: its stream and its epoch.
    links: BTreeMap<usize, (WireId, Epoch)>,
    /// Which client has which request.
    clients: BTreeMap<RequestId, usize>,
    actions: Vec<Action>,
    legs: Legs,
    /// Tokens that were fetched for clients' prompts, until somebody takes them.
    pub(crate) pulled: Vec<(usize, u32)>,
    meddling: Meddling,
    /// Nodes of which the last cache event did not reach the index.
    pub(crate) behind: BTreeSet<usize>,
    armed: Option<Instant>,
}

impl Coordinator {
    /// A process that has just started.
    pub(crate) fn start(
        index: usize,
        life: u64,
        options: Options,
        meddling: Meddling,
        now: Instant,
    ) -> Self {
        Self {
            index,
            life,
            control: Control::new(options, now),
            links: BTreeMap::new(),
            clients: BTreeMap::new(),
            actions: Vec::new(),
            legs: Legs::default(),
            pulled: Vec::new(),
            meddling,
            behind: BTreeSet::new(),
            armed: None,
        }
    }

    /// Whether the present life of a node has joined, and neither end has lost the stream.
    pub(crate) fn has_joined(&self, node: usize, net: &Net) -> bool {
        let current = Epoch(net.life(Party::Node(node)));
        let link = self.links.get(&node).filter(|(_, epoch)| *epoch == current);
        link.is_some_and(|&(wire, _)| net.is_open(wire, 0) && net.is_open(wire, 1))
    }

    /// Clients that wait for an answer.
    pub(crate) fn clients(&self) -> Vec<usize> {
        self.clients.values().copied().collect()
    }

    /// Something arrived on a node's stream.
    pub(crate) fn hear(
        &mut self,
        wire: WireId,
        node: &NodeId,
        message: Message,
        net: &mut Net,
    ) -> Vec<(usize, Update)> {
        let (now, index) = (net.now(), index_of(node));
        match message {
            Message::Hello(hello) => {
                let epoch = hello.epoch;
                self.behind.remove(&index);
                self.legs.lost(index);
                match self.control.join(node, *hello, LinkId(wire), now, &mut self.actions) {
                    Ok(()) => {
                        if let Some((earlier, _)) = self.links.insert(index, (wire, epoch)) {
                            net.close(earlier, 1, Close::Replaced, false);
                        }
                        net.send(wire, 1, 0, Message::Welcome);
                    }
                    Err(refusal) => {
                        note!(net, "coordinator-{} refuses {node}: {refusal}", self.index);
                        net.close(wire, 1, Close::Plain, false);
                    }
                }
            }
            Message::Said(event) if self.misses(&event, index, net) => {}
            Message::Said(event) => {
                if let Some((_, epoch)) = self.links.get(&index).filter(|(at, _)| *at == wire) {
                    self.legs.hears(index, *epoch, &event);
                }
                if let NodeEvent::Pulled { id, tokens, .. } = *event
                    && let Some(&client) = self.clients.get(&id.request)
                {
                    self.pulled.push((client, tokens));
                }
                self.control.event(node, LinkId(wire), *event, now, &mut self.actions);
            }
            other => panic!("a node said {other:?}"),
        }
        self.settle(net)
    }

    /// Whether a cache event gets lost, so that the next one leaves a gap.
    fn misses(&mut self, event: &NodeEvent, node: usize, net: &mut Net) -> bool {
        if !matches!(event, NodeEvent::Cache { .. }) {
            return false;
        }
        let lost = net.random.f64() < self.meddling.lost_events;
        if lost {
            self.behind.insert(node);
        } else {
            self.behind.remove(&node);
        }
        lost
    }

    /// A node's stream has ended.
    pub(crate) fn lost(
        &mut self,
        wire: WireId,
        node: &NodeId,
        net: &mut Net,
    ) -> Vec<(usize, Update)> {
        if self.links.get(&index_of(node)).is_some_and(|(current, _)| *current == wire) {
            self.legs.lost(index_of(node));
        }
        if self.control.leave(node, LinkId(wire), net.now(), &mut self.actions) {
            self.links.remove(&index_of(node));
        }
        self.settle(net)
    }

    /// A client asks.
    pub(crate) fn submit(
        &mut self,
        client: usize,
        request: NewRequest,
        chain: Vec<BlockHash>,
        net: &mut Net,
    ) -> (Result<(), SubmitError>, Vec<(usize, Update)>) {
        let (now, id) = (net.now(), request.id);
        let result = self.control.submit(request, chain, now, now, &mut self.actions);
        if result.is_ok() {
            self.clients.insert(id, client);
        }
        (result, self.settle(net))
    }

    /// A client leaves, or has what it wanted.
    pub(crate) fn end(
        &mut self,
        id: RequestId,
        satisfied: bool,
        net: &mut Net,
    ) -> Vec<(usize, Update)> {
        if satisfied {
            self.control.stop(id, net.now(), &mut self.actions);
        } else {
            self.control.cancel(id, net.now(), &mut self.actions);
        }
        self.settle(net)
    }

    /// An operator asks something of a node.
    pub(crate) fn order(
        &mut self,
        node: &NodeId,
        order: Order,
        net: &mut Net,
    ) -> Result<(), OrderError> {
        self.control.order(node, order, false, &mut self.actions)?;
        let updates = self.settle(net);
        assert!(updates.is_empty(), "an order is no news to clients");
        Ok(())
    }

    /// Its timer is due.
    pub(crate) fn due(&mut self, net: &mut Net) -> Vec<(usize, Update)> {
        self.armed = None;
        if self.control.poll_timeout().is_some_and(|due| due <= net.now()) {
            self.control.handle_timeout(net.now(), &mut self.actions);
        }
        self.settle(net)
    }

    /// Carries out what was decided; what clients are told is returned.
    fn settle(&mut self, net: &mut Net) -> Vec<(usize, Update)> {
        let (mut updates, mut pulls) = (Vec::new(), Vec::new());
        for action in std::mem::take(&mut self.actions) {
            note!(net, "coordinator-{} {action:?}", self.index);
            match action {
                Action::Send { to, mut command } => {
                    self.legs.sent(index_of(&to.node), to.epoch, &command);
                    if net.random.f64() < self.meddling.pulls {
                        pulls.extend(self.add_pull(&to, &mut command, net));
                    }
                    self.send(&to, command, net);
                }
                Action::Update { request, update } => {
                    let ended = matches!(update, Update::Done(_) | Update::Failed(_));
                    let client = self.clients.get(&request).copied();
                    let client = client.expect("an update for a request that has ended");
                    if ended {
                        self.clients.remove(&request);
                        self.legs.ended(request);
                    }
                    updates.push((client, update));
                }
            }
        }
        for (to, serve) in pulls {
            self.send(&to, serve, net);
        }
        if let Some(due) = self.control.poll_timeout()
            && self.armed.is_none_or(|armed| due < armed)
        {
            self.armed = Some(due);
            let (coordinator, life) = (self.index, self.life);
            net.timeline.at(due, Event::Coordinator { coordinator, life });
        }
        updates
    }

    fn send(&self, to: &NodeRef, command: Command, net: &mut Net) {
        let link = self.links.get(&index_of(&to.node));
        if let Some(&(wire, _)) = link.filter(|(_, epoch)| *epoch == to.epoch) {
            net.send(wire, 1, 0, Message::Command(Box::new(command)));
        }
    }

    /// Lets a node that computes a prompt fetch a part of it from any other node: a pull is worth a
    /// try, and never a reason to fail. Returns what the other node is told.
    fn add_pull(
        &self,
        to: &NodeRef,
        command: &mut Command,
        net: &mut Net,
    ) -> Option<(NodeRef, Command)> {
        let (job, pull) = match command {
            Command::Prefill { job, pull: pull @ None, .. } => (job, pull),
            Command::Decode { job, prefill: None, pull: pull @ None } => (job, pull),
            _ => return None,
        };
        let others: Vec<usize> = self.links.keys().copied().collect();
        let other = others[net.random.usize(..others.len())];
        let tokens = net.random.usize(1..=job.tokens.len());
        let peer = |node: usize, epoch: Epoch| Peer {
            node: format!("node-{node}").parse().expect("a node name"),
            epoch,
            kv_address: "node:1".to_owned(),
        };
        let (_, epoch) = self.links[&other];
        let from = peer(other, epoch);
        if from.node == to.node {
            return None;
        }
        let serve = Command::Serve {
            id: job.id.pull(),
            tokens: job.tokens[..tokens].to_vec(),
            salt: job.salt,
            to: peer(index_of(&to.node), to.epoch),
        };
        let source = NodeRef { node: from.node.clone(), epoch };
        *pull = Some(Pull { from, tokens });
        Some((source, serve))
    }
}
