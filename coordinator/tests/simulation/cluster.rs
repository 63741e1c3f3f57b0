//! The made-up cluster: nodes, the streams between them and the coordinator, clients, and time.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use baton_coordinator::cluster::LinkId;
use baton_coordinator::control::{Control, Options};
use baton_coordinator::core::{NewRequest, RequestError, StatusView, SubmitError, Update};
use baton_coordinator::requests::{Action, Limits};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{CacheSalt, ModelRoot};
use baton_proto::ids::{Epoch, NodeId, RequestId, Role, TransferId};
use baton_proto::message::{Command, Hello, NodeEvent, Report, Retry};
use baton_proto::sampling::SamplingParams;

use crate::node::{Kv, Node, State, VOCAB, oracle};

/// Disturbances of a run: fewer than attempts that may fail in a row.
const MAX_DISTURBANCES: usize = 6;
const GEOMETRY: KvGeometry =
    KvGeometry { layers: 1, kv_heads: 1, head_dim: 8, dtype: KvDtype::F32, block_tokens: 4 };

/// Something that happens. Numbers choose among what is there.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Submit { prompt: u8, output: u8, late: bool },
    DeliverDown(u16),
    DeliverUp(u16),
    DeliverKv(u16),
    Work(u16),
    Report(u16),
    Kill(u16),
    LoseStream(u16),
    Restart(u16),
    Fail(u16),
    Refuse(u16),
    Cancel(u16),
    Stop(u16),
    Repeat(u16),
    Wait(u16),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Ended {
    Complete,
    Late,
    ByClient,
}

pub(crate) struct Client {
    prompt: Vec<u32>,
    max_tokens: u32,
    pub(crate) late: bool,
    pub(crate) left: bool,
    pub(crate) tokens: Vec<u32>,
    pub(crate) ended: Option<Ended>,
}

impl Client {
    /// What an undisturbed node gives.
    pub(crate) fn oracle(&self) -> Vec<u32> {
        let mut all = self.prompt.clone();
        loop {
            let emitted = all.len() - self.prompt.len();
            let (token, finish) = oracle(&all, emitted, self.max_tokens);
            all.push(token);
            if finish.is_some() {
                return all.split_off(self.prompt.len());
            }
        }
    }
}

/// The stream of a node that the coordinator knows of.
struct Stream {
    link: LinkId,
    epoch: u64,
    down: VecDeque<Command>,
    up: VecDeque<NodeEvent>,
    /// The node's end is gone: what is under way still arrives, then the end.
    broken: bool,
}

pub(crate) struct Sim {
    pub(crate) control: Control,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) clients: BTreeMap<RequestId, Client>,
    streams: BTreeMap<NodeId, Stream>,
    kv: Vec<Kv>,
    now: Instant,
    links: u64,
    disturbances: usize,
}

fn pick<T: Clone>(mut all: impl Iterator<Item = T> + Clone, number: u16) -> Option<T> {
    let count = all.clone().count();
    (count > 0).then(|| all.nth(usize::from(number) % count))?
}

impl Sim {
    pub(crate) fn new(prefill: usize, decode: usize) -> Self {
        let now = Instant::now();
        let options = Options {
            limits: Limits { requests: 100, tokens: 100_000 },
            index_blocks: 1000,
            placement: Default::default(),
        };
        let mut sim = Self {
            control: Control::new(options, now),
            nodes: BTreeMap::new(),
            clients: BTreeMap::new(),
            streams: BTreeMap::new(),
            kv: Vec::new(),
            now,
            links: 0,
            disturbances: 0,
        };
        for (role, count) in [(Role::Prefill, prefill), (Role::Decode, decode)] {
            for number in 0..count {
                let name: NodeId =
                    format!("{}-{number}", role.as_str()).parse().expect("a node name");
                sim.nodes.insert(name.clone(), Node::new(role));
                sim.join(&name);
            }
        }
        sim
    }

    fn node(&mut self, name: &NodeId) -> &mut Node {
        self.nodes.get_mut(name).expect("nodes are never removed")
    }

    pub(crate) fn status(&self) -> StatusView {
        self.control.status(self.now)
    }

    pub(crate) fn apply(&mut self, op: Op) {
        let mut out = Vec::new();
        match op {
            Op::Submit { prompt, output, late } => self.submit(prompt, output, late),
            Op::DeliverDown(n) => self.deliver_down(n),
            Op::DeliverUp(n) => drop(self.deliver_up(n)),
            Op::DeliverKv(n) => self.deliver_kv(n),
            Op::Work(n) => self.work(n),
            Op::Report(n) => self.report(n),
            Op::Kill(n) => self.disturb(|sim| sim.kill(n)),
            Op::LoseStream(n) => self.disturb(|sim| sim.lose_stream(n)),
            Op::Restart(n) => self.restart(n),
            Op::Fail(n) => self.disturb(|sim| sim.fail(n, Retry::OtherNode)),
            Op::Refuse(n) => self.fail(n, Retry::SameNode),
            Op::Cancel(n) => {
                if let Some(id) = self.leave(n) {
                    self.control.cancel(id, self.now, &mut out);
                }
            }
            Op::Stop(n) => {
                if let Some(id) = self.leave(n) {
                    self.control.stop(id, self.now, &mut out);
                }
            }
            Op::Repeat(n) => self.repeat(n),
            Op::Wait(ms) => self.wait(Duration::from_millis(ms.into())),
        }
        self.carry_out(out);
    }

    /// Brings all nodes back and lets everything run to its end.
    pub(crate) fn settle(&mut self) {
        let names: Vec<NodeId> = self.nodes.keys().cloned().collect();
        for round in 0..3000_u16 {
            for name in &names {
                self.restart_node(name);
            }
            while self.deliver_up(round).is_some() {}
            for n in 0..4 {
                self.deliver_down(round.wrapping_add(n));
                self.work(round.wrapping_add(n));
                self.deliver_kv(round.wrapping_add(n));
            }
            let idle = self.streams.values().all(|s| s.up.is_empty() && s.down.is_empty());
            if idle && self.status().requests_active == 0 && self.kv.is_empty() {
                return;
            }
            self.wait(Duration::from_millis(20));
        }
    }

    fn disturb(&mut self, act: impl FnOnce(&mut Self)) {
        if self.disturbances < MAX_DISTURBANCES {
            self.disturbances += 1;
            act(self);
        }
    }

    fn submit(&mut self, prompt: u8, output: u8, late: bool) {
        let id = RequestId(self.clients.len() as u128 + 1);
        let prompt: Vec<u32> = (0..=u32::from(prompt)).map(|n| (n * 7 + 3) % VOCAB).collect();
        let max_tokens = output.into();
        let sampling = SamplingParams { max_tokens, ..SamplingParams::default() };
        let request = NewRequest {
            id,
            model: "demo".to_owned(),
            tokens: prompt.as_slice().into(),
            embed: None,
            sampling,
            salt: CacheSalt::default(),
            standing: Default::default(),
            tenant: Default::default(),
            deadline: late.then_some(Duration::from_millis(100)),
            trace: None,
        };
        let root = ModelRoot::new(&[0; 32], &GEOMETRY);
        let chain = root.chain(CacheSalt::default(), &prompt, 4);
        let mut out = Vec::new();
        let client =
            Client { prompt, max_tokens, late, left: false, tokens: Vec::new(), ended: None };
        match self.control.submit(request, chain, self.now, self.now, &mut out) {
            Ok(()) => drop(self.clients.insert(id, client)),
            Err(SubmitError::TooLate { .. }) => assert!(late && out.is_empty()),
            Err(error) => {
                assert!(matches!(error, SubmitError::NoNodes(_)), "{error}");
                assert!(out.is_empty() && !self.status().ready);
            }
        }
        self.carry_out(out);
    }

    fn leave(&mut self, n: u16) -> Option<RequestId> {
        let here = self.clients.iter().filter(|(_, client)| client.ended.is_none());
        let id = pick(here.map(|(&id, _)| id), n)?;
        self.clients.get_mut(&id)?.left = true;
        Some(id)
    }

    fn join(&mut self, name: &NodeId) {
        let node = &self.nodes[name];
        self.links += 1;
        let (link, epoch) = (LinkId(self.links), node.epoch);
        let hello = Hello {
            role: node.role,
            epoch: Epoch(epoch),
            model: "demo".to_owned(),
            root: ModelRoot::new(&[0; 32], &GEOMETRY),
            geometry: GEOMETRY,
            max_model_len: 4096,
            vocab_size: VOCAB,
            hidden_size: 4,
            total_blocks: 64,
            kv_address: "127.0.0.1:1".to_owned(),
            transports: Vec::new(),
            price: 1.0,
        };
        let mut out = Vec::new();
        // The coordinator may not have seen the end of the earlier stream yet.
        self.control
            .join(name, hello, link, self.now, &mut out)
            .expect("nothing speaks against it");
        let (down, up) = (VecDeque::new(), VecDeque::new());
        self.streams.insert(name.clone(), Stream { link, epoch, down, up, broken: false });
        self.carry_out(out);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { to, command } => {
                    let stream = self.streams.get_mut(&to.node);
                    let stream = stream.expect("a command to a node that is not joined");
                    assert_eq!(stream.epoch, to.epoch.0, "a command to another life of a node");
                    stream.down.push_back(command);
                }
                Action::Update { request, update } => self.update(request, update),
            }
        }
    }

    fn update(&mut self, id: RequestId, update: Update) {
        let client = self.clients.get_mut(&id).expect("an update for nobody");
        assert_eq!(client.ended, None, "an update after the end");
        match update {
            Update::Tokens(tokens) => {
                assert!(!tokens.is_empty());
                client.tokens.extend(tokens.iter().map(|token| token.token));
                assert!(client.oracle().starts_with(&client.tokens), "other tokens");
            }
            Update::PromptLogprobs(_) | Update::Embedding(_) => panic!("nobody asked for these"),
            Update::Done(summary) => {
                assert_eq!(summary.usage.completion_tokens as usize, client.tokens.len());
                let complete = summary.finish.is_some();
                client.ended = Some(if complete { Ended::Complete } else { Ended::ByClient });
            }
            Update::Failed(RequestError::DeadlineExceeded) => client.ended = Some(Ended::Late),
            Update::Failed(RequestError::Cancelled) => client.ended = Some(Ended::ByClient),
            Update::Failed(error) => panic!("{error}"),
        }
    }

    fn deliver_down(&mut self, n: u16) {
        let ready = self.streams.iter().filter(|(_, s)| !s.broken && !s.down.is_empty());
        let Some(name) = pick(ready.map(|(name, _)| name.clone()), n) else { return };
        let command = self.streams.get_mut(&name).and_then(|stream| stream.down.pop_front());
        self.node(&name).command(command.expect("it was not empty"));
    }

    fn deliver_up(&mut self, n: u16) -> Option<()> {
        let ready = self.streams.iter().filter(|(_, s)| s.broken || !s.up.is_empty());
        let name = pick(ready.map(|(name, _)| name.clone()), n)?;
        let stream = self.streams.get_mut(&name)?;
        let (link, event, mut out) = (stream.link, stream.up.pop_front(), Vec::new());
        match event {
            Some(event) => self.control.event(&name, link, event, self.now, &mut out),
            None => {
                self.streams.remove(&name);
                assert!(self.control.leave(&name, link, self.now, &mut out));
            }
        }
        self.carry_out(out);
        Some(())
    }

    /// A node's events enter its stream, if it has one.
    fn collect(&mut self, name: &NodeId) {
        let sent = std::mem::take(&mut self.node(name).sent);
        if let Some(stream) = self.streams.get_mut(name).filter(|stream| !stream.broken) {
            stream.up.extend(sent);
        }
    }

    fn say(&mut self, name: &NodeId, event: NodeEvent) {
        self.node(name).sent.push(event);
        self.collect(name);
    }

    fn any_job(&self, n: u16) -> Option<(NodeId, TransferId)> {
        let jobs = self
            .nodes
            .iter()
            .flat_map(|(name, node)| node.jobs.keys().map(move |&id| (name.clone(), id)));
        pick(jobs, n)
    }

    fn work(&mut self, n: u16) {
        let Some((name, id)) = self.any_job(n) else { return };
        let kv = self.node(&name).work(&name, id);
        self.kv.extend(kv);
        self.collect(&name);
    }

    fn deliver_kv(&mut self, n: u16) {
        let Some(at) = pick(0..self.kv.len(), n) else { return };
        let Kv { id, from: (source, life), to, .. } = &self.kv[at];
        let (id, source, target) = (*id, source.clone(), to.node.clone());
        let sender = &self.nodes[&source];
        if sender.epoch != life.0 || !sender.jobs.contains_key(&id) {
            self.kv.swap_remove(at);
            return;
        }
        let receiver = self.nodes.get_mut(&target).expect("nodes are never removed");
        if receiver.epoch != to.epoch.0 || !receiver.alive {
            self.kv.swap_remove(at);
            let reason = "the peer is gone".to_owned();
            self.end(&source, id, NodeEvent::Failed { id, reason, retry: Retry::OtherNode });
        } else if receiver.landed(&self.kv[at]) {
            self.kv.swap_remove(at);
            self.collect(&target);
            let zero = Duration::ZERO;
            let event =
                NodeEvent::Transferred { id, hidden: zero, exposed: zero, bytes: 8, blocks: 1 };
            self.end(&source, id, event);
        }
    }

    fn end(&mut self, name: &NodeId, id: TransferId, event: NodeEvent) {
        self.node(name).jobs.remove(&id);
        self.say(name, event);
    }

    fn report(&mut self, n: u16) {
        let Some(name) = pick(self.nodes.keys().cloned(), n) else { return };
        if self.nodes[&name].alive {
            let (role, queued_tokens) = (self.nodes[&name].role, u64::from(n % 50));
            let report = Report { role, queued_tokens, ..Report::default() };
            self.say(&name, NodeEvent::Report(report));
        }
    }

    /// What a node sent shortly before its death may still arrive, or not.
    fn break_stream(&mut self, name: &NodeId, n: u16) {
        if let Some(stream) = self.streams.get_mut(name).filter(|stream| !stream.broken) {
            stream.broken = true;
            stream.down.clear();
            stream.up.truncate(usize::from(n >> 8) % (stream.up.len() + 1));
        }
        self.node(name).jobs.clear();
    }

    fn kill(&mut self, n: u16) {
        let Some(name) = pick(self.nodes.keys().cloned(), n) else { return };
        self.node(&name).alive = false;
        self.break_stream(&name, n);
    }

    fn lose_stream(&mut self, n: u16) {
        let Some(name) = pick(self.nodes.keys().cloned(), n) else { return };
        self.break_stream(&name, n);
    }

    fn restart(&mut self, n: u16) {
        if let Some(name) = pick(self.nodes.keys().cloned(), n) {
            self.restart_node(&name);
        }
    }

    /// A dead node starts again, and one without a stream joins.
    fn restart_node(&mut self, name: &NodeId) {
        let node = self.node(name);
        if !node.alive {
            node.alive = true;
            node.epoch += 1;
        }
        if self.streams.get(name).is_none_or(|stream| stream.broken) {
            self.join(name);
        }
    }

    fn fail(&mut self, n: u16, retry: Retry) {
        let Some((name, id)) = self.any_job(n) else { return };
        // A prefill that has sent its first token can still fail to move its KV.
        let fresh = self.nodes[&name].jobs[&id].state == State::Queued;
        if retry == Retry::OtherNode || fresh {
            self.end(&name, id, NodeEvent::Failed { id, reason: "made up".to_owned(), retry });
        }
    }

    /// A node says its last word twice.
    fn repeat(&mut self, n: u16) {
        let Some(name) = pick(self.streams.keys().cloned(), n) else { return };
        let stream = self.streams.get_mut(&name).expect("it was picked");
        stream.up.extend(stream.up.back().cloned());
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        let mut out = Vec::new();
        self.control.handle_timeout(self.now, &mut out);
        assert!(self.control.poll_timeout().is_none_or(|due| due > self.now), "time stands still");
        self.carry_out(out);
    }
}
