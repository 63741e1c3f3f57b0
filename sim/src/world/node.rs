//! A node: its engine and its endpoint, and what coordinators ask of it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use baton_engine::scheduler::{Event as Told, Limits};
use baton_engine::{EngineInfo, Kind, Submission};
use baton_kvtransfer::frame::Manifest;
use baton_kvtransfer::{FirstToken, Reason, ReceiveError, SendError, Timing};
use baton_proto::ids::{Epoch, NodeId, Role, TransferId};
use baton_proto::message::{Command, Hello, Job, NodeEvent, Peer, Retry, TokenEvent};

use super::endpoint::{Around, Endpoint, Outcome};
use super::engine::{Device, Engine, News};
use super::log::note;
use super::net::{Message, Net, WireId};
use super::{Event, NodeTimer};

/// From an input to an idle engine until its thread looks.
const WAKE: Duration = Duration::from_micros(20);
/// Blocks that come back within this time are one report.
const REPORT_PAUSE: Duration = Duration::from_millis(5);
/// Most hashes of one part of a snapshot.
const SNAPSHOT_PART: usize = 65_536;

/// What a node is made of.
#[derive(Clone)]
pub(crate) struct NodeSpec {
    pub(crate) role: Role,
    pub(crate) info: EngineInfo,
    pub(crate) limits: Limits,
    pub(crate) max_waiting: usize,
    pub(crate) device: Device,
    pub(crate) timing: Timing,
    /// Between reports.
    pub(crate) report: Duration,
}

/// See the module's description.
pub(crate) struct Node {
    index: usize,
    pub(crate) spec: NodeSpec,
    pub(crate) life: u64,
    pub(crate) engine: Engine,
    pub(crate) endpoint: Endpoint,
    jobs: BTreeMap<TransferId, (WireId, Doing)>,
    streams: BTreeMap<WireId, Stream>,
    /// The earliest time for which the engine is to be woken.
    turn_at: Option<Instant>,
    draining: bool,
}

/// What is being done for a job.
enum Doing {
    Sending,
    Reserving { from: Peer, manifest: Manifest },
    Receiving,
    Running,
}

/// An open stream to a coordinator.
#[derive(Default)]
struct Stream {
    sequence: u64,
    has_snapshot: bool,
    wants_snapshot: bool,
    report_soon: bool,
}

/// The number in a node's name.
pub(crate) fn index_of(name: &NodeId) -> usize {
    let number = name.as_str().rsplit('-').next().and_then(|number| number.parse().ok());
    number.expect("names end with the node's number")
}

impl Node {
    /// A process that has just started.
    pub(crate) fn start(index: usize, spec: NodeSpec, life: u64) -> Self {
        let engine = Engine::new(spec.info, spec.limits.clone(), spec.max_waiting, spec.device);
        Self {
            index,
            life,
            engine,
            endpoint: Endpoint::new(index, Epoch(life), spec.timing),
            jobs: BTreeMap::new(),
            streams: BTreeMap::new(),
            turn_at: None,
            draining: false,
            spec,
        }
    }

    /// Jobs that have not ended.
    pub(crate) fn jobs(&self) -> usize {
        self.jobs.len()
    }

    pub(crate) fn hello(&self) -> Hello {
        let info = &self.spec.info;
        Hello {
            role: self.spec.role,
            epoch: Epoch(self.life),
            model: "demo".to_owned(),
            root: info.root,
            geometry: info.geometry,
            max_model_len: info.max_model_len as u32,
            vocab_size: info.vocab_size as u32,
            total_blocks: info.kv_blocks as u64,
            kv_address: format!("node-{}:1", self.index),
            transports: vec!["quic".to_owned()],
        }
    }

    /// Something arrived on a join stream.
    pub(crate) fn hear(&mut self, wire: WireId, message: Message, net: &mut Net, names: &[NodeId]) {
        match message {
            Message::Welcome => {
                self.streams.insert(wire, Stream { wants_snapshot: true, ..Stream::default() });
                self.engine.request_snapshot();
                let first = net.some(self.spec.report);
                self.timer(net, net.now() + first, NodeTimer::Report { wire, regular: true });
            }
            Message::Command(command) => self.command(wire, *command, net, names),
            other => panic!("a coordinator said {other:?}"),
        }
        self.settle(net, names);
    }

    /// A join stream has ended; its jobs end with it.
    pub(crate) fn join_lost(&mut self, wire: WireId, net: &mut Net, names: &[NodeId]) {
        self.streams.remove(&wire);
        let orphans = self.jobs.iter().filter(|(_, (owner, _))| *owner == wire);
        for id in orphans.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.cancel(id, net, names);
        }
        self.settle(net, names);
    }

    pub(crate) fn due(&mut self, what: NodeTimer, net: &mut Net, names: &[NodeId]) {
        match what {
            NodeTimer::Turn => {
                self.turn_at = None;
                if !self.engine.is_busy() {
                    self.turn(net, names);
                }
            }
            NodeTimer::Layer => {
                let mut news = Vec::new();
                let over = self.engine.layer_done(&mut news);
                self.take_news(news, net, names);
                if over {
                    self.turn(net, names);
                } else {
                    self.await_layer(net);
                }
            }
            NodeTimer::Report { wire, regular } => self.report(wire, regular, net),
            NodeTimer::Sender(id) => {
                let (endpoint, mut around) = self.split(net, names);
                endpoint.sender_due(id, &mut around);
            }
            NodeTimer::Receiver(id) => {
                let (endpoint, mut around) = self.split(net, names);
                endpoint.receiver_due(id, &mut around);
            }
            NodeTimer::Departed(id) => {
                let (endpoint, mut around) = self.split(net, names);
                endpoint.departed(id, &mut around);
            }
            NodeTimer::Dialled { target, epoch } => {
                let (endpoint, mut around) = self.split(net, names);
                endpoint.dialled(target, epoch, &mut around);
            }
            NodeTimer::Join { .. } => unreachable!("the world dials"),
        }
        self.settle(net, names);
    }

    /// Something happened to a KV connection.
    pub(crate) fn kv(
        &mut self,
        net: &mut Net,
        names: &[NodeId],
        act: impl FnOnce(&mut Endpoint, &mut Around<'_>),
    ) {
        let (endpoint, mut around) = self.split(net, names);
        act(endpoint, &mut around);
        self.settle(net, names);
    }

    /// Takes nothing new from now on; or does again.
    pub(crate) fn drain(&mut self, draining: bool, net: &mut Net) {
        self.draining = draining;
        self.report_soon(net);
    }

    fn split<'a>(
        &'a mut self,
        net: &'a mut Net,
        names: &'a [NodeId],
    ) -> (&'a mut Endpoint, Around<'a>) {
        (&mut self.endpoint, Around { net, engine: &mut self.engine, names })
    }

    fn timer(&self, net: &mut Net, at: Instant, what: NodeTimer) {
        net.timeline.at(at, Event::Node { node: self.index, life: self.life, what });
    }

    fn turn(&mut self, net: &mut Net, names: &[NodeId]) {
        let mut news = Vec::new();
        self.engine.turn(net.now(), &mut news);
        self.take_news(news, net, names);
        self.await_layer(net);
        if !self.engine.is_busy()
            && let Some(deadline) = self.engine.scheduler.next_deadline()
        {
            self.wake(deadline, net);
        }
    }

    fn await_layer(&mut self, net: &mut Net) {
        if let Some(at) = self.engine.next_layer() {
            self.timer(net, at, NodeTimer::Layer);
        }
    }

    fn wake(&mut self, at: Instant, net: &mut Net) {
        if self.turn_at.is_none_or(|armed| at < armed) {
            self.turn_at = Some(at);
            self.timer(net, at, NodeTimer::Turn);
        }
    }

    /// Everything that follows from the last input.
    fn settle(&mut self, net: &mut Net, names: &[NodeId]) {
        let mut outcomes = VecDeque::new();
        loop {
            outcomes.extend(self.endpoint.outcomes.drain(..));
            let Some((id, outcome)) = outcomes.pop_front() else { break };
            note!(net, "{} {id} {outcome:?}", names[self.index]);
            self.transfer_ended(id, outcome, net, names);
        }
        if !self.engine.is_busy() && self.engine.has_inputs() {
            self.wake(net.now() + WAKE, net);
        }
    }

    fn command(&mut self, wire: WireId, command: Command, net: &mut Net, names: &[NodeId]) {
        match command {
            Command::Prefill { job, decode, .. } => {
                self.begin(wire, job, Some(decode), None, net, names)
            }
            Command::Decode { job, prefill, .. } => {
                self.begin(wire, job, None, prefill, net, names)
            }
            Command::Cancel(id) => {
                if self.jobs.get(&id).is_some_and(|(owner, _)| *owner == wire) {
                    self.cancel(id, net, names);
                }
            }
            Command::SendSnapshot => {
                if let Some(stream) = self.streams.get_mut(&wire) {
                    stream.wants_snapshot = true;
                }
                self.engine.request_snapshot();
            }
            Command::Serve { .. } | Command::SetRole(_) | Command::SetDraining(_) => {}
        }
    }

    fn begin(
        &mut self,
        wire: WireId,
        job: Job,
        target: Option<Peer>,
        source: Option<Peer>,
        net: &mut Net,
        names: &[NodeId],
    ) {
        let id = job.id;
        if self.jobs.contains_key(&id) {
            return;
        }
        if self.draining {
            return self.say_failed(
                wire,
                id,
                "the node is draining".to_owned(),
                Retry::OtherNode,
                net,
            );
        }
        let info = &self.spec.info;
        let manifest = |job: &Job| Manifest {
            transfer: id,
            root: info.root,
            geometry: info.geometry,
            blocks: info.geometry.blocks_for(job.tokens.len()) as u32,
            hashes: info.root.chain(job.salt, &job.tokens, info.geometry.block_tokens as usize),
        };
        let (kind, doing, outgoing) = match (target, source) {
            (Some(peer), _) => (Kind::Export, Doing::Sending, Some((manifest(&job), peer))),
            (None, Some(from)) => {
                (Kind::Import, Doing::Reserving { from, manifest: manifest(&job) }, None)
            }
            (None, None) => (Kind::Local, Doing::Running, None),
        };
        if let Err(error) = self.engine.submit(Submission { job, kind, held: false }, net.now()) {
            return self.say_failed(wire, id, error.to_string(), error.retry(), net);
        }
        self.jobs.insert(id, (wire, doing));
        if let Some((manifest, peer)) = outgoing {
            let (endpoint, mut around) = self.split(net, names);
            endpoint.send(manifest, (index_of(&peer.node), peer.epoch), &mut around);
        }
    }

    fn cancel(&mut self, id: TransferId, net: &mut Net, names: &[NodeId]) {
        let Some((_, doing)) = self.jobs.remove(&id) else { return };
        self.cancel_transfer(id, &doing, net, names);
        self.engine.cancel(id);
    }

    fn cancel_transfer(&mut self, id: TransferId, doing: &Doing, net: &mut Net, names: &[NodeId]) {
        let (endpoint, mut around) = self.split(net, names);
        match doing {
            Doing::Sending => endpoint.sender(id, &mut around, |machine, _| machine.cancel()),
            Doing::Receiving => endpoint.receiver(id, &mut around, |machine, _| machine.cancel()),
            Doing::Reserving { .. } | Doing::Running => {}
        }
    }

    fn take_news(&mut self, news: Vec<News>, net: &mut Net, names: &[NodeId]) {
        for news in news {
            note!(net, "{} {news:?}", names[self.index]);
            match news {
                News::Event(event) => self.told(event, net, names),
                News::KvReady { id, layer, blocks } => {
                    let (endpoint, mut around) = self.split(net, names);
                    let blocks = blocks.start as u32..blocks.end as u32;
                    endpoint.sender(id, &mut around, |machine, now| {
                        machine.ready(now, layer as u32, blocks);
                    });
                }
                News::Cache { stored, removed } => self.cache_changed(&stored, &removed, net),
                News::Snapshot(hashes) => self.snapshot(&hashes, net),
            }
        }
    }

    fn told(&mut self, event: Told, net: &mut Net, names: &[NodeId]) {
        match event {
            Told::Admitted { id, kind, cached_blocks, queued, .. } => {
                let size = self.spec.info.geometry.block_tokens as usize;
                let cached_tokens = (cached_blocks * size) as u32;
                self.tell(id, NodeEvent::Started { id, cached_tokens, queued }, net);
                if kind != Kind::Local {
                    self.leased(id, cached_blocks as u32, net, names);
                }
            }
            Told::Tokens(tokens) => self.tokens(tokens, net, names),
            Told::PromptLogprobs { id, tokens } => {
                self.tell(id, NodeEvent::PromptLogprobs { id, tokens }, net);
            }
            Told::Failed { id, reason, retry } => {
                self.report_soon(net);
                if let Some((wire, doing)) = self.jobs.remove(&id) {
                    self.say_failed(wire, id, reason, retry, net);
                    self.cancel_transfer(id, &doing, net, names);
                }
            }
            Told::Ended { id } => {
                self.report_soon(net);
                if let Some((_, Doing::Running)) = self.jobs.get(&id) {
                    self.jobs.remove(&id);
                }
            }
        }
    }

    /// A job's blocks are reserved for its transfer.
    fn leased(&mut self, id: TransferId, cached: u32, net: &mut Net, names: &[NodeId]) {
        let layers = self.spec.info.geometry.layers;
        match self.jobs.get_mut(&id).map(|(_, doing)| doing) {
            Some(Doing::Sending) => {
                let (endpoint, mut around) = self.split(net, names);
                for layer in (0..layers).filter(|_| cached > 0) {
                    endpoint.sender(id, &mut around, |machine, now| {
                        machine.ready(now, layer, 0..cached);
                    });
                }
            }
            Some(doing @ Doing::Reserving { .. }) => {
                let Doing::Reserving { from, manifest } =
                    std::mem::replace(doing, Doing::Receiving)
                else {
                    unreachable!("it was matched")
                };
                let (endpoint, mut around) = self.split(net, names);
                endpoint.expect(manifest, (from.node, from.epoch), cached, &mut around);
            }
            _ => self.engine.return_lease(id),
        }
    }

    fn tokens(&mut self, tokens: Vec<TokenEvent>, net: &mut Net, names: &[NodeId]) {
        let mut by_stream: BTreeMap<WireId, Vec<TokenEvent>> = BTreeMap::new();
        for token in tokens {
            if let Some((wire, _)) = self.jobs.get(&token.id) {
                by_stream.entry(*wire).or_default().push(token);
            }
        }
        for (wire, tokens) in by_stream {
            self.say(wire, NodeEvent::Tokens(tokens.clone()), net);
            for TokenEvent { id, token, logprobs, finish, .. } in tokens {
                if let Some((_, Doing::Sending)) = self.jobs.get(&id) {
                    let first = FirstToken { token, logprobs, finish };
                    let (endpoint, mut around) = self.split(net, names);
                    endpoint.sender(id, &mut around, |machine, now| machine.finish(now, first));
                }
            }
        }
    }

    fn transfer_ended(
        &mut self,
        id: TransferId,
        outcome: Outcome,
        net: &mut Net,
        names: &[NodeId],
    ) {
        // What the transfer held is let go before anybody hears of its end.
        if self.engine.leased(id).is_some() {
            self.engine.return_lease(id);
        }
        let (error, retry) = match outcome {
            Outcome::Sent(Ok(sent)) => {
                let (hidden, exposed) = (sent.hidden, sent.exposed);
                let (bytes, blocks) = (sent.bytes, sent.blocks);
                let event = NodeEvent::Transferred { id, hidden, exposed, bytes, blocks };
                self.tell(id, event, net);
                self.jobs.remove(&id);
                return;
            }
            Outcome::Received(Ok(FirstToken { token, logprobs, finish })) => {
                if let Some((_, doing)) = self.jobs.get_mut(&id) {
                    *doing = Doing::Running;
                    let first = baton_engine::FirstToken { token, logprobs, finish };
                    self.engine.imported(id, first);
                }
                return;
            }
            Outcome::Sent(Err(error)) => match error {
                SendError::Cancelled | SendError::Refused(Reason::Cancelled) => {
                    (error.to_string(), Retry::OtherNode)
                }
                error => (error.to_string(), error.retry()),
            },
            Outcome::Received(Err(error)) => match error {
                ReceiveError::Cancelled | ReceiveError::Ended(Reason::Cancelled) => {
                    (error.to_string(), Retry::OtherNode)
                }
                error => (error.to_string(), error.retry()),
            },
        };
        if let Some((wire, _)) = self.jobs.remove(&id) {
            self.say_failed(wire, id, error, retry, net);
            self.engine.cancel(id);
        }
        let _ = names;
    }

    // What coordinators are told.

    fn say(&self, wire: WireId, event: NodeEvent, net: &mut Net) {
        if self.streams.contains_key(&wire) {
            net.send(wire, 0, 0, Message::Said(Box::new(event)));
        }
    }

    fn say_failed(
        &self,
        wire: WireId,
        id: TransferId,
        reason: String,
        retry: Retry,
        net: &mut Net,
    ) {
        self.say(wire, NodeEvent::Failed { id, reason, retry }, net);
    }

    fn tell(&self, id: TransferId, event: NodeEvent, net: &mut Net) {
        if let Some((wire, _)) = self.jobs.get(&id) {
            self.say(*wire, event, net);
        }
    }

    fn cache_changed(
        &mut self,
        stored: &[baton_proto::hash::BlockHash],
        removed: &[baton_proto::hash::BlockHash],
        net: &mut Net,
    ) {
        for (&wire, stream) in self.streams.iter_mut().filter(|(_, stream)| stream.has_snapshot) {
            stream.sequence += 1;
            let (sequence, stored, removed) = (stream.sequence, stored.to_vec(), removed.to_vec());
            let event = NodeEvent::Cache { sequence, stored, removed };
            net.send(wire, 0, 0, Message::Said(Box::new(event)));
        }
    }

    fn snapshot(&mut self, hashes: &[baton_proto::hash::BlockHash], net: &mut Net) {
        for (&wire, stream) in &mut self.streams {
            if !std::mem::take(&mut stream.wants_snapshot) {
                continue;
            }
            stream.has_snapshot = true;
            let parts = hashes.len().div_ceil(SNAPSHOT_PART).max(1);
            for part in 0..parts {
                let end = hashes.len().min((part + 1) * SNAPSHOT_PART);
                let hashes = hashes[part * SNAPSHOT_PART..end].to_vec();
                let (sequence, last) = (stream.sequence, part + 1 == parts);
                let event = NodeEvent::Snapshot { sequence, hashes, last };
                net.send(wire, 0, 0, Message::Said(Box::new(event)));
            }
        }
    }

    fn report(&mut self, wire: WireId, regular: bool, net: &mut Net) {
        let Some(stream) = self.streams.get_mut(&wire) else { return };
        if !regular {
            stream.report_soon = false;
        }
        let mut report = self.engine.report();
        report.draining = self.draining;
        report.role = self.spec.role;
        self.say(wire, NodeEvent::Report(report), net);
        if regular {
            self.timer(net, net.now() + self.spec.report, NodeTimer::Report { wire, regular });
        }
    }

    fn report_soon(&mut self, net: &mut Net) {
        let mut soon = Vec::new();
        for (&wire, stream) in &mut self.streams {
            if !std::mem::replace(&mut stream.report_soon, true) {
                soon.push(wire);
            }
        }
        for wire in soon {
            let at = net.now() + REPORT_PAUSE;
            self.timer(net, at, NodeTimer::Report { wire, regular: false });
        }
    }
}
