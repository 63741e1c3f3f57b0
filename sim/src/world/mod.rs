//! A whole cluster in one process under virtual time: the real `Control` of every coordinator, the
//! real `Scheduler`, `Sender`, `Receiver` and `Inbox` of every node, with a modelled device, a
//! modelled network and faults.
//!
//! Everything follows from a seed, so that a run that fails can be seen again, event by event.

use std::collections::VecDeque;
use std::time::Duration;

use baton_coordinator::control::Options;
use baton_coordinator::core::Update;
use baton_proto::hash::ModelRoot;
use baton_proto::ids::{Epoch, NodeId, TransferId};

mod check;
mod client;
mod clients;
mod coordinator;
mod endpoint;
mod engine;
mod faults;
mod legs;
mod log;
mod memory;
mod net;
mod node;
mod scenario;
mod timeline;
mod traced;

pub use log::Logging;
pub use scenario::{Report, run_seed};
pub use traced::{TraceError, replay_trace};

use client::Client;
use coordinator::Coordinator;
use engine::Device;
use faults::Fault;
use log::note;
use memory::Piece;
use net::{Close, Message, Net, Party, Presence, WireId};
use node::{Node, NodeSpec};

/// A silent peer of a join stream is given up after so long.
const JOIN_PATIENCE: Duration = Duration::from_secs(5);
/// A dial of a coordinator that nobody answers takes so long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Pauses between dials double from the least to the most.
const LEAST_PAUSE: Duration = Duration::from_millis(50);
const MOST_PAUSE: Duration = Duration::from_secs(1);
/// Between two shares of a coordinator.
const SHARE: Duration = Duration::from_millis(50);

/// What happens.
#[derive(Debug)]
pub(crate) enum Event {
    /// A message arrives at an end of a connection.
    Deliver { wire: WireId, to: usize, message: Message },
    /// An end of a connection may have heard nothing for too long.
    Silence { wire: WireId, end: usize },
    /// A timer of one life of a node.
    Node { node: usize, life: u64, what: NodeTimer },
    /// The timer of one life of a coordinator.
    Coordinator { coordinator: usize, life: u64 },
    /// A client asks.
    Ask(usize),
    /// A client goes away.
    Leave(usize),
    /// Coordinators tell each other what they have promised.
    Share,
    /// Something goes wrong, or is mended.
    Fault(Fault),
}

/// A node's timers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NodeTimer {
    /// Dials a coordinator.
    Join {
        coordinator: usize,
        attempt: u32,
    },
    /// The engine looks for input.
    Turn,
    /// A layer of the engine's step is complete.
    Layer,
    /// Reports the load.
    Report {
        wire: WireId,
        regular: bool,
    },
    /// A transfer's deadline.
    Sender(TransferId),
    Receiver(TransferId),
    /// A payload unit has left.
    Departed(TransferId),
    /// A copy from a neighbour's memory has ended.
    Copied,
    /// The worker's deadline.
    Worker,
    /// A KV dial had the time to succeed.
    Dialled {
        target: usize,
        epoch: Epoch,
    },
}

/// What the world does to coordinators.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Meddling {
    /// Share of the prompts of which a part is pulled, wherever that makes sense or not.
    pub(crate) pulls: f64,
    /// Share of the cache events that are lost.
    pub(crate) lost_events: f64,
    /// Coordinators shift nodes between roles.
    pub(crate) roles: bool,
}

/// See the module's description.
pub(crate) struct World {
    pub(crate) net: Net,
    names: Vec<NodeId>,
    specs: Vec<NodeSpec>,
    nodes: Vec<Option<Node>>,
    options: Vec<Options>,
    coordinators: Vec<Option<Coordinator>>,
    clients: Vec<Client>,
    /// Clients that have not ended.
    open: usize,
    root: ModelRoot,
    block_tokens: usize,
    meddling: Meddling,
    /// What clients that have ended asked is not kept.
    pub(crate) forgets: bool,
    updates: VecDeque<(usize, Update)>,
}

impl World {
    /// Starts all processes.
    pub(crate) fn new(
        net: Net,
        specs: Vec<NodeSpec>,
        options: Vec<Options>,
        meddling: Meddling,
    ) -> Self {
        let info = specs[0].info;
        let name = |at: usize| format!("node-{at}").parse().expect("a node name");
        let mut world = Self {
            net,
            names: (0..specs.len()).map(name).collect(),
            nodes: specs.iter().map(|_| None).collect(),
            coordinators: options.iter().map(|_| None).collect(),
            specs,
            options,
            clients: Vec::new(),
            open: 0,
            root: info.root,
            block_tokens: info.geometry.block_tokens as usize,
            meddling,
            forgets: false,
            updates: VecDeque::new(),
        };
        (0..world.options.len()).for_each(|coordinator| world.start_coordinator(coordinator));
        (0..world.specs.len()).for_each(|node| world.start_node(node));
        if world.options.len() > 1 {
            world.net.timeline.after(SHARE, Event::Share);
        }
        world
    }

    /// The next event happens; false if there is none.
    pub(crate) fn step(&mut self) -> bool {
        let Some(event) = self.net.timeline.next() else { return false };
        if let Some(until) = self.concerns(&event).and_then(|party| self.net.frozen(party)) {
            self.net.timeline.at(until, event);
            return true;
        }
        note!(self.net, "{event:?}");
        match event {
            Event::Deliver { wire, to, message } => self.deliver(wire, to, message),
            Event::Silence { wire, end } => {
                let (own, other) = (self.net.party(wire, end), self.net.party(wire, 1 - end));
                if let (Some(own), Some(other), true) = (own, other, self.net.lost(wire, end)) {
                    self.connection_lost(wire, end, own, other, Close::Plain);
                }
            }
            Event::Node { node, life, what } => self.node_due(node, life, what),
            Event::Coordinator { coordinator, life } => {
                let process = self.coordinators[coordinator].as_mut();
                if let Some(process) = process.filter(|process| process.life == life) {
                    let updates = process.due(&mut self.net);
                    self.tell_clients(updates);
                }
            }
            Event::Ask(client) => self.ask(client),
            Event::Leave(client) => self.leave(client, false),
            Event::Share => self.share(),
            Event::Fault(fault) => self.happen(fault),
        }
        true
    }

    /// The process that an event happens to.
    fn concerns(&self, event: &Event) -> Option<Party> {
        match *event {
            Event::Deliver { wire, to: end, .. } | Event::Silence { wire, end } => {
                self.net.party(wire, end)
            }
            Event::Node { node, .. } => Some(Party::Node(node)),
            Event::Coordinator { coordinator, .. } => Some(Party::Coordinator(coordinator)),
            Event::Leave(client) => self.clients[client].coordinator.map(Party::Coordinator),
            Event::Ask(_) | Event::Share | Event::Fault(_) => None,
        }
    }

    fn deliver(&mut self, wire: WireId, to: usize, message: Message) {
        let (own, other) = (self.net.party(wire, to), self.net.party(wire, 1 - to));
        let (Some(own), Some(other)) = (own, other) else { return };
        let Some(message) = self.net.arrive(wire, to, message) else { return };
        if let Message::Closed(why) = message {
            self.net.heard_close(wire, to);
            return self.connection_lost(wire, to, own, other, why);
        }
        match (own, other) {
            (Party::Node(own), Party::Node(_)) => self.kv(own, |endpoint, around| match to {
                0 => endpoint.hear_out(wire, message, around),
                _ => endpoint.hear_in(wire, message, around),
            }),
            (Party::Node(own), Party::Coordinator(_)) => {
                if let Some(node) = &mut self.nodes[own] {
                    node.hear(wire, message, &mut self.net, &self.names);
                }
            }
            (Party::Coordinator(own), Party::Node(node)) => {
                if let Some(process) = &mut self.coordinators[own] {
                    let updates = process.hear(wire, &self.names[node], message, &mut self.net);
                    for (client, tokens) in process.pulled.drain(..) {
                        self.clients[client].pulled_tokens += tokens;
                    }
                    self.tell_clients(updates);
                }
            }
            (Party::Coordinator(_), Party::Coordinator(_)) => {
                unreachable!("coordinators do not dial each other")
            }
        }
    }

    fn kv(
        &mut self,
        node: usize,
        act: impl FnOnce(&mut endpoint::Endpoint, &mut endpoint::Around<'_>),
    ) {
        if let Some(node) = &mut self.nodes[node] {
            node.kv(&mut self.net, &self.names, act);
        }
    }

    /// `own` learns that its connection to `other` is over.
    fn connection_lost(&mut self, wire: WireId, end: usize, own: Party, other: Party, why: Close) {
        match (own, other) {
            (Party::Node(own), Party::Node(_)) => self.kv(own, |endpoint, around| match end {
                0 => endpoint.hear_out(wire, Message::Closed(why), around),
                _ => endpoint.hear_in(wire, Message::Closed(why), around),
            }),
            (Party::Node(own), Party::Coordinator(coordinator)) => {
                if let Some(node) = &mut self.nodes[own] {
                    node.join_lost(wire, &mut self.net, &self.names);
                    let life = node.life;
                    self.dial_later(own, life, coordinator, 0);
                }
            }
            (Party::Coordinator(own), Party::Node(node)) => {
                if let Some(process) = &mut self.coordinators[own] {
                    let updates = process.lost(wire, &self.names[node], &mut self.net);
                    self.tell_clients(updates);
                }
            }
            (Party::Coordinator(_), Party::Coordinator(_)) => {
                unreachable!("coordinators do not dial each other")
            }
        }
    }

    fn node_due(&mut self, node: usize, life: u64, what: NodeTimer) {
        let process = self.nodes[node].as_mut();
        let Some(process) = process.filter(|process| process.life == life) else { return };
        match what {
            NodeTimer::Join { coordinator, attempt } => self.dial(node, coordinator, attempt),
            NodeTimer::Copied => self.copied(node),
            what => process.due(what, &mut self.net, &self.names),
        }
    }

    /// A copy sees what is in its source's memory when it ends, or what a process left there.
    fn copied(&mut self, node: usize) {
        let Some(copy) = self.nodes[node].as_mut().and_then(Node::take_copy) else { return };
        let source = self.nodes[copy.from].as_ref().filter(|from| from.life == copy.epoch.0);
        let look = |&block: &u32| source.map_or(Piece::TORN, |from| from.look(copy.layer, block));
        let pieces: Vec<Piece> = copy.blocks.iter().map(look).collect();
        let readable = self.net.random.f64() >= self.net.quality.unreadable;
        self.kv(node, |endpoint, around| {
            endpoint.copied(&copy, readable.then_some(&pieces[..]), around);
        });
    }

    fn dial(&mut self, node: usize, coordinator: usize, attempt: u32) {
        let Some(process) = &self.nodes[node] else { return };
        let (own, other) = (Party::Node(node), Party::Coordinator(coordinator));
        if !self.net.answers(own, other) || self.net.presence(other) != Presence::Up {
            let life = process.life;
            return self.dial_later(node, life, coordinator, attempt + 1);
        }
        let wire = self.net.connect(own, other, JOIN_PATIENCE);
        self.net.send(wire, 0, 0, Message::Hello(Box::new(process.hello())));
    }

    fn dial_later(&mut self, node: usize, life: u64, coordinator: usize, attempt: u32) {
        let (own, other) = (Party::Node(node), Party::Coordinator(coordinator));
        let full = LEAST_PAUSE.saturating_mul(1 << attempt.min(16)).min(MOST_PAUSE);
        let mut pause = full / 2 + self.net.some(full / 2);
        if !self.net.answers(own, other) {
            pause += CONNECT_TIMEOUT;
        }
        let what = NodeTimer::Join { coordinator, attempt };
        self.net.timeline.after(pause, Event::Node { node, life, what });
    }

    pub(crate) fn start_node(&mut self, node: usize) {
        if self.nodes[node].is_some() {
            return;
        }
        let party = Party::Node(node);
        let life = self.net.life(party) + 1;
        self.net.set_presence(party, Presence::Up, life);
        self.nodes[node] = Some(Node::start(node, self.specs[node].clone(), life));
        for coordinator in 0..self.options.len() {
            let what = NodeTimer::Join { coordinator, attempt: 0 };
            let after = self.net.some(LEAST_PAUSE);
            self.net.timeline.after(after, Event::Node { node, life, what });
        }
    }

    pub(crate) fn start_coordinator(&mut self, coordinator: usize) {
        if self.coordinators[coordinator].is_some() {
            return;
        }
        let party = Party::Coordinator(coordinator);
        let life = self.net.life(party) + 1;
        self.net.set_presence(party, Presence::Up, life);
        let (options, now) = (self.options[coordinator], self.net.now());
        let mut process = Coordinator::start(coordinator, life, options, self.meddling, now);
        if self.meddling.roles {
            process.control.adjust_roles(coordinator_name(coordinator), now);
        }
        self.coordinators[coordinator] = Some(process);
    }

    /// What one says reaches the others, or not.
    fn share(&mut self) {
        let all = 0..self.coordinators.len();
        for (from, to) in all.clone().flat_map(|from| all.clone().map(move |to| (from, to))) {
            let lost = self.net.random.u32(..10) == 0;
            let frozen = |at| self.net.frozen(Party::Coordinator(at)).is_some();
            if from == to || lost || frozen(from) || frozen(to) {
                continue;
            }
            let now = self.net.now();
            let Some(share) = self.coordinators[from].as_mut().map(|c| c.control.share(now)) else {
                continue;
            };
            let name = coordinator_name(from);
            if let Some(to) = &mut self.coordinators[to] {
                to.control.heard(&name, share, now);
            }
        }
        self.net.timeline.after(SHARE, Event::Share);
    }
}

fn coordinator_name(number: usize) -> NodeId {
    format!("coordinator-{number}").parse().expect("a coordinator's name")
}
