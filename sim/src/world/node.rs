//! A node under virtual time: the real `Worker` between its engine, its endpoint and the streams to
//! coordinators. Mirrors what the node's driver does with threads and sockets.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use baton_engine::EngineInfo;
use baton_engine::scheduler::{Event as Told, Limits};
use baton_kvtransfer::Timing;
use baton_kvtransfer::frame::Manifest;
use baton_node::worker::{Action, Input, News as NodeNews, StreamId, Transfer, Worker};
use baton_proto::ids::{Epoch, NodeId, Role, TransferId};
use baton_proto::message::{Command, Hello, NodeEvent};

use super::endpoint::{Around, Copy, Endpoint, Happened};
use super::engine::{Device, Engine, News};
use super::log::note;
use super::memory::Piece;
use super::net::{Message, Net, WireId};
use super::{Event, NodeTimer};

/// From an input to an idle engine until its thread looks.
const WAKE: Duration = Duration::from_micros(20);
/// Blocks that come back within this time are one report.
const REPORT_PAUSE: Duration = Duration::from_millis(5);

/// What a node is made of.
#[derive(Clone)]
pub(crate) struct NodeSpec {
    /// What it begins as.
    pub(crate) role: Role,
    pub(crate) info: EngineInfo,
    pub(crate) limits: Limits,
    pub(crate) max_waiting: usize,
    pub(crate) device: Device,
    pub(crate) timing: Timing,
    /// Between reports.
    pub(crate) report: Duration,
    /// Jobs that nobody wants any more are looked for after every step.
    pub(crate) watched: bool,
}

/// See the module's description.
pub(crate) struct Node {
    index: usize,
    pub(crate) spec: NodeSpec,
    pub(crate) life: u64,
    pub(crate) engine: Engine,
    pub(crate) endpoint: Endpoint,
    worker: Worker,
    /// For the worker, in order.
    inputs: VecDeque<Input>,
    /// Of each open stream: whether a report is about to be sent.
    streams: BTreeMap<WireId, bool>,
    /// What the coordinators were told last.
    news: NodeNews,
    /// Whose lease, of the admission that is being handled, nobody has taken.
    lease: Option<TransferId>,
    /// Who asked for which job that the engine may still have.
    owners: BTreeMap<TransferId, WireId>,
    /// Jobs that nobody wants any more since the engine last looked.
    unwanted: BTreeSet<TransferId>,
    turn_at: Option<Instant>,
    worker_at: Option<Instant>,
}

/// The number in a node's name.
pub(crate) fn index_of(name: &NodeId) -> usize {
    let number = name.as_str().rsplit('-').next().and_then(|number| number.parse().ok());
    number.expect("names end with the node's number")
}

impl Node {
    /// A process that has just started.
    pub(crate) fn start(index: usize, spec: NodeSpec, life: u64) -> Self {
        let NodeSpec { role, info, .. } = spec;
        let worker = Worker::new(role, info.root, info.geometry);
        Self {
            index,
            life,
            engine: Engine::new(info, spec.limits.clone(), spec.max_waiting, spec.device),
            endpoint: Endpoint::new(index, Epoch(life), spec.timing),
            inputs: VecDeque::new(),
            streams: BTreeMap::new(),
            news: worker.news(),
            worker,
            lease: None,
            owners: BTreeMap::new(),
            unwanted: BTreeSet::new(),
            turn_at: None,
            worker_at: None,
            spec,
        }
    }

    /// Whether nothing is left of any job.
    pub(crate) fn is_idle(&self) -> bool {
        self.worker.tasks() == 0 && self.engine.is_empty() && self.endpoint.transfers() == (0, 0)
    }

    /// What is left, for people.
    pub(crate) fn left(&self) -> String {
        let (tasks, transfers) = (self.worker.tasks(), self.endpoint.transfers());
        format!("{tasks} tasks, {transfers:?} transfers, {:?}", self.engine.scheduler.blocks())
    }

    pub(crate) fn hello(&self) -> Hello {
        let info = &self.spec.info;
        Hello {
            role: self.worker.news().role,
            epoch: Epoch(self.life),
            model: "demo".to_owned(),
            root: info.root,
            geometry: info.geometry,
            max_model_len: info.max_model_len as u32,
            vocab_size: info.vocab_size as u32,
            hidden_size: info.hidden_size as u32,
            total_blocks: info.kv_blocks as u64,
            kv_address: format!("node-{}:1", self.index),
            transports: vec!["quic".to_owned()],
            price: 1.0,
        }
    }

    /// Something arrived on a join stream.
    pub(crate) fn hear(&mut self, wire: WireId, message: Message, net: &mut Net, names: &[NodeId]) {
        let stream = StreamId(wire);
        match message {
            Message::Welcome => {
                self.streams.insert(wire, false);
                self.inputs.push_back(Input::Opened(stream));
                let first = net.now() + net.some(self.spec.report);
                self.timer(net, first, NodeTimer::Report { wire, regular: true });
            }
            Message::Command(command) => {
                self.watch(wire, &command);
                self.inputs.push_back(Input::Command { stream, command });
            }
            other => panic!("a coordinator said {other:?}"),
        }
        self.settle(net, names);
    }

    /// A join stream has ended.
    pub(crate) fn join_lost(&mut self, wire: WireId, net: &mut Net, names: &[NodeId]) {
        self.streams.remove(&wire);
        let orphans = self.owners.iter().filter(|(_, owner)| **owner == wire);
        self.unwanted.extend(orphans.map(|(&id, _)| id));
        self.inputs.push_back(Input::Closed(StreamId(wire)));
        self.settle(net, names);
    }

    /// Something happened to a KV connection.
    pub(crate) fn kv(
        &mut self,
        net: &mut Net,
        names: &[NodeId],
        act: impl FnOnce(&mut Endpoint, &mut Around<'_>),
    ) {
        act(&mut self.endpoint, &mut Around { net, engine: &mut self.engine, names });
        self.settle(net, names);
    }

    /// The oldest copy from a neighbour's memory, which has just ended.
    pub(crate) fn take_copy(&mut self) -> Option<Copy> {
        self.endpoint.take_copy()
    }

    /// What lies in its memory.
    pub(crate) fn look(&self, layer: u32, block: u32) -> Piece {
        self.engine.look(layer, block)
    }

    pub(crate) fn due(&mut self, what: NodeTimer, net: &mut Net, names: &[NodeId]) {
        let endpoint = &mut self.endpoint;
        let mut around = Around { net, engine: &mut self.engine, names };
        match what {
            NodeTimer::Sender(id) => endpoint.sender_due(id, &mut around),
            NodeTimer::Receiver(id) => endpoint.receiver_due(id, &mut around),
            NodeTimer::Departed(id) => endpoint.departed(id, &mut around),
            NodeTimer::Dialled { target, epoch } => endpoint.dialled(target, epoch, &mut around),
            NodeTimer::Turn => {
                self.turn_at = None;
                if !self.engine.is_busy() {
                    self.turn(net);
                }
            }
            NodeTimer::Layer => self.layer_done(net),
            NodeTimer::Report { wire, regular } => self.report(wire, regular, net),
            NodeTimer::Worker => {
                self.worker_at = None;
                self.worker.handle_timeout(net.now());
                self.act(net, names);
            }
            NodeTimer::Join { .. } | NodeTimer::Copied => unreachable!("the world dials"),
        }
        self.settle(net, names);
    }

    fn timer(&self, net: &mut Net, at: Instant, what: NodeTimer) {
        net.timeline.at(at, Event::Node { node: self.index, life: self.life, what });
    }

    fn turn(&mut self, net: &mut Net) {
        let mut news = Vec::new();
        self.engine.turn(net.now(), &mut news);
        let scheduler = &self.engine.scheduler;
        for id in std::mem::take(&mut self.unwanted) {
            // Copies that have begun keep the blocks.
            let goes_on = scheduler.knows(id) && !self.endpoint.copies(id);
            assert!(!goes_on, "{id} goes on, which nobody wants any more");
        }
        self.owners.retain(|id, _| scheduler.knows(*id));
        self.take_news(news, net);
        if let Some(at) = self.engine.next_layer() {
            self.timer(net, at, NodeTimer::Layer);
        } else if let Some(deadline) = self.engine.scheduler.next_deadline() {
            self.wake(deadline, net);
        }
    }

    fn layer_done(&mut self, net: &mut Net) {
        let mut news = Vec::new();
        let over = self.engine.layer_done(&mut news);
        self.take_news(news, net);
        match self.engine.next_layer() {
            Some(at) => self.timer(net, at, NodeTimer::Layer),
            None => assert!(over, "a step goes on or is over"),
        }
        if over {
            self.turn(net);
        }
    }

    /// Remembers who wants what, to see that nothing else is computed.
    fn watch(&mut self, wire: WireId, command: &Command) {
        match command {
            _ if !self.spec.watched => {}
            Command::Prefill { job, .. }
            | Command::Decode { job, .. }
            | Command::Embed { job, .. } => {
                self.owners.entry(job.id).or_insert(wire);
            }
            Command::Cancel(id) if self.owners.get(id) == Some(&wire) => {
                self.unwanted.insert(*id);
            }
            _ => {}
        }
    }

    fn wake(&mut self, at: Instant, net: &mut Net) {
        if self.turn_at.is_none_or(|armed| at < armed) {
            self.turn_at = Some(at);
            self.timer(net, at, NodeTimer::Turn);
        }
    }

    fn take_news(&mut self, news: Vec<News>, net: &mut Net) {
        for news in news {
            note!(net, "node-{} {news:?}", self.index);
            let input = match news {
                News::Event(Told::Admitted { id, cached_blocks, queued, .. }) => {
                    Input::Admitted { id, cached_blocks: cached_blocks as u32, queued }
                }
                News::Event(Told::Tokens(tokens)) => Input::Tokens(tokens),
                News::Event(Told::PromptLogprobs { id, tokens }) => {
                    Input::PromptLogprobs { id, tokens }
                }
                News::Event(Told::Embedded { id, values, prefill }) => {
                    Input::Embedded { id, values, prefill }
                }
                News::Event(Told::Failed { id, reason, retry }) => {
                    Input::Failed { id, reason, retry }
                }
                News::Event(Told::Ended { id }) => Input::Ended(id),
                News::KvReady { id, layer, blocks } => {
                    let blocks = blocks.start as u32..blocks.end as u32;
                    Input::KvReady { id, layer: layer as u32, blocks }
                }
                News::Cache { stored, removed } => Input::CacheChanged { stored, removed },
                News::Snapshot(hashes) => Input::Snapshot(hashes),
            };
            self.inputs.push_back(input);
        }
    }

    /// Everything that follows from the last input.
    fn settle(&mut self, net: &mut Net, names: &[NodeId]) {
        loop {
            for happened in self.endpoint.happened.drain(..) {
                note!(net, "{} {happened:?}", names[self.index]);
                let input = match happened {
                    Happened::Offered(id) => Input::Offered(id),
                    Happened::Returned(id) => {
                        self.engine.return_lease(id);
                        continue;
                    }
                    Happened::Sent(id, outcome) => Input::Sent { id, outcome },
                    Happened::Received(id, outcome) => Input::Received { id, outcome },
                };
                self.inputs.push_back(input);
            }
            let Some(input) = self.inputs.pop_front() else { break };
            if let Input::Admitted { id, .. } = input {
                self.lease = self.engine.has_lease(id).then_some(id);
            }
            self.worker.input(net.now(), input);
            self.act(net, names);
        }
        self.tell_news(net);
        if !self.engine.is_busy() && self.engine.has_inputs() {
            self.wake(net.now() + WAKE, net);
        }
        if let Some(due) = self.worker.poll_timeout()
            && self.worker_at.is_none_or(|armed| due < armed)
        {
            self.worker_at = Some(due);
            self.timer(net, due, NodeTimer::Worker);
        }
    }

    fn act(&mut self, net: &mut Net, names: &[NodeId]) {
        while let Some(action) = self.worker.poll_action() {
            self.carry_out(action, net, names);
        }
        // Of a job that is not wanted any more.
        if let Some(id) = self.lease.take() {
            self.engine.return_lease(id);
        }
    }

    fn carry_out(&mut self, action: Action, net: &mut Net, names: &[NodeId]) {
        let now = net.now();
        let endpoint = &mut self.endpoint;
        let mut around = Around { net, engine: &mut self.engine, names };
        match action {
            Action::Tell { stream, event } => self.say(stream.0, event, net),
            Action::AskSnapshot => self.engine.request_snapshot(),
            Action::Submit(submission) => {
                let id = submission.job.id;
                if let Err(error) = self.engine.submit(submission, now) {
                    let (reason, retry) = (error.to_string(), error.retry());
                    self.worker.input(now, Input::Failed { id, reason, retry });
                }
            }
            Action::Release(id) => self.engine.release(id),
            Action::Imported { id, first } => self.engine.imported(id, first),
            Action::Fetched(id) => self.engine.fetched(id),
            Action::Stop(id) => self.engine.cancel(id),
            Action::Send(transfer) => {
                let (id, peer) = (transfer.id, transfer.peer.clone());
                assert_eq!(self.lease.take(), Some(id), "what is sent is leased");
                let manifest = manifest(&self.spec.info, transfer);
                endpoint.send(manifest, (index_of(&peer.node), peer.epoch), &mut around);
            }
            Action::Ready { id, layer, blocks } => {
                endpoint.sender(id, &mut around, |machine, now| machine.ready(now, layer, blocks));
            }
            Action::Finish { id, first } => {
                endpoint.sender(id, &mut around, |machine, now| machine.finish(now, first));
            }
            Action::CancelSend(id) => {
                endpoint.sender(id, &mut around, |machine, _| machine.cancel());
            }
            Action::Expect(transfer) => {
                let peer = transfer.peer.clone();
                let manifest = manifest(&self.spec.info, transfer);
                endpoint.expect(manifest, (peer.node, peer.epoch), &mut around);
            }
            Action::Reserve { id, held } => {
                if endpoint.reserve(id, held, &mut around) {
                    assert_eq!(self.lease.take(), Some(id), "what is reserved is leased");
                }
            }
            Action::CancelReceive(id) => {
                endpoint.receiver(id, &mut around, |machine, _| machine.cancel());
            }
        }
    }

    fn say(&self, wire: WireId, event: NodeEvent, net: &mut Net) {
        if self.streams.contains_key(&wire) {
            net.send(wire, 0, 0, Message::Said(Box::new(event)));
        }
    }

    fn report(&mut self, wire: WireId, regular: bool, net: &mut Net) {
        let Some(soon) = self.streams.get_mut(&wire) else { return };
        if !regular {
            *soon = false;
        }
        let mut report = self.engine.report();
        (report.draining, report.role) = (self.news.draining, self.news.role);
        self.say(wire, NodeEvent::Report(report), net);
        if regular {
            self.timer(net, net.now() + self.spec.report, NodeTimer::Report { wire, regular });
        }
    }

    fn tell_news(&mut self, net: &mut Net) {
        if std::mem::replace(&mut self.news, self.worker.news()) == self.news {
            return;
        }
        let quiet = self.streams.iter_mut().filter(|(_, soon)| !**soon);
        let quiet: Vec<WireId> = quiet.map(|(&wire, soon)| (*soon = true, wire).1).collect();
        for wire in quiet {
            let at = net.now() + REPORT_PAUSE;
            self.timer(net, at, NodeTimer::Report { wire, regular: false });
        }
    }
}

fn manifest(info: &EngineInfo, transfer: Transfer) -> Manifest {
    let Transfer { id, hashes, blocks, .. } = transfer;
    Manifest { transfer: id, root: info.root, geometry: info.geometry, blocks, hashes }
}
