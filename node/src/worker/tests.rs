//! Any order of what coordinators, the engine's real scheduler and the endpoint say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use baton_engine::Kind;
use baton_engine::sampler::Sampled;
use baton_engine::scheduler::{Event, Limits, Outcome, Scheduler};
use baton_kvtransfer::{ReceiveError, SendError, Sent};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{CacheSalt, ModelRoot};
use baton_proto::ids::{Epoch, RequestId, Role, TransferId};
use baton_proto::message::{Command, Job, NodeEvent, Peer, Pull, Retry};
use baton_proto::sampling::SamplingParams;
use proptest::prelude::*;

use super::pull::NO_TOKEN;
use super::*;

const BLOCK_TOKENS: usize = 4;
const ROOT: ModelRoot = ModelRoot([1; 16]);

fn id(request: usize) -> TransferId {
    TransferId { request: RequestId(request as u128), attempt: 1 }
}

fn job(request: usize, seed: u32, length: usize, max_tokens: u32) -> Job {
    Job {
        id: id(request),
        // Few different tokens, so that prompts share prefixes.
        tokens: (0..length as u32).map(|i| i / 7 * seed % 2).collect(),
        prompt_tokens: length,
        sampling: SamplingParams { max_tokens, ..SamplingParams::default() },
        salt: CacheSalt::default(),
        deadline: (seed == 2).then(|| Duration::from_millis(20)),
    }
}

fn peer() -> Peer {
    let node = "other".parse().expect("a legal name");
    Peer { node, epoch: Epoch(1), kv_address: "127.0.0.1:1".to_owned() }
}

/// One node, whose engine computes when told to and whose transfers end as told.
struct World {
    now: Instant,
    worker: Worker,
    scheduler: Scheduler,
    /// Transfers, and whether they have the lease of their blocks.
    sends: BTreeMap<TransferId, Sending>,
    receives: BTreeMap<TransferId, Receiving>,
    /// Whose lease the admission that is being handled offers.
    lease: Option<TransferId>,
    /// Outcomes of cancelled transfers, which come late.
    late: Vec<Input>,
    streams: BTreeMap<StreamId, bool>,
    told: Vec<(StreamId, NodeEvent)>,
    cancelled: BTreeSet<TransferId>,
    begun: BTreeMap<TransferId, StreamId>,
}

#[derive(Default)]
struct Sending {
    finished: bool,
}

#[derive(Default)]
struct Receiving {
    offered: bool,
    reserved: bool,
}

impl World {
    fn new() -> Self {
        let limits = Limits {
            block_tokens: BLOCK_TOKENS,
            kv_blocks: 16,
            max_batch_tokens: 10,
            max_sequences: 4,
            max_model_len: 60,
            vocab_size: 8,
        };
        let geometry = KvGeometry {
            layers: 2,
            kv_heads: 1,
            head_dim: 1,
            dtype: KvDtype::F32,
            block_tokens: BLOCK_TOKENS as u32,
        };
        let mut world = Self {
            now: Instant::now(),
            worker: Worker::new(Role::Prefill, ROOT, geometry),
            scheduler: Scheduler::new(limits, ROOT),
            sends: BTreeMap::new(),
            receives: BTreeMap::new(),
            lease: None,
            late: Vec::new(),
            streams: BTreeMap::new(),
            told: Vec::new(),
            cancelled: BTreeSet::new(),
            begun: BTreeMap::new(),
        };
        world.open(1);
        world
    }

    fn open(&mut self, stream: u64) {
        self.streams.insert(StreamId(stream), true);
        self.input(Input::Opened(StreamId(stream)));
    }

    fn close(&mut self, stream: u64) {
        self.streams.insert(StreamId(stream), false);
        self.input(Input::Closed(StreamId(stream)));
    }

    fn command(&mut self, stream: u64, command: Command) {
        let stream = StreamId(stream);
        let new = match &command {
            Command::Prefill { job, .. } | Command::Decode { job, .. } => Some(job.id),
            Command::Serve { id, .. } => Some(*id),
            _ => None,
        };
        if let Some(id) = new
            && self.streams.get(&stream) == Some(&true)
        {
            self.begun.entry(id).or_insert(stream);
        }
        if let Command::Cancel(id) = command
            && self.begun.get(&id) == Some(&stream)
        {
            self.cancelled.insert(id);
        }
        self.input(Input::Command { stream, command: Box::new(command) });
    }

    fn input(&mut self, input: Input) {
        self.worker.input(self.now, input);
        self.act();
    }

    fn act(&mut self) {
        while let Some(action) = self.worker.poll_action() {
            self.carry_out(action);
        }
        // Nobody took it.
        if let Some(id) = self.lease.take() {
            self.scheduler.lease_returned(id);
        }
        self.scheduler.check();
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Tell { stream, event } => {
                assert_eq!(self.streams.get(&stream), Some(&true), "nothing is told to the dead");
                self.told.push((stream, event));
            }
            Action::AskSnapshot => {
                let hashes = self.scheduler.cached_hashes();
                self.worker.input(self.now, Input::Snapshot(hashes));
            }
            Action::Submit(Submission { job, kind, held }) => {
                let id = job.id;
                if self.scheduler.knows(id) {
                    let (reason, retry) = ("here already".to_owned(), Retry::Never);
                    return self.worker.input(self.now, Input::Failed { id, reason, retry });
                }
                self.scheduler.add(job, kind, self.now);
                if held {
                    self.scheduler.hold(id);
                }
            }
            Action::Release(id) => self.scheduler.release(id),
            Action::Imported { id, first } => self.scheduler.imported(id, &first),
            Action::Fetched(id) => self.scheduler.fetched(id),
            Action::Stop(id) => self.scheduler.cancel(id),
            Action::Send(transfer) => {
                assert_eq!(self.lease.take(), Some(transfer.id), "what is sent is leased");
                self.sends.insert(transfer.id, Sending::default());
            }
            Action::Ready { .. } => {}
            Action::Finish { id, .. } => {
                if let Some(send) = self.sends.get_mut(&id) {
                    send.finished = true;
                }
            }
            Action::CancelSend(id) => {
                if self.sends.remove(&id).is_some() {
                    self.scheduler.lease_returned(id);
                    self.late.push(Input::Sent { id, outcome: Err(SendError::Cancelled) });
                }
            }
            Action::Expect(transfer) => {
                let before = self.receives.insert(transfer.id, Receiving::default());
                assert!(before.is_none(), "expected once");
            }
            Action::Reserve { id, .. } => {
                if let Some(receive) = self.receives.get_mut(&id) {
                    assert_eq!(self.lease.take(), Some(id), "what is written is leased");
                    receive.reserved = true;
                }
            }
            Action::CancelReceive(id) => {
                if let Some(receive) = self.receives.remove(&id) {
                    if receive.reserved {
                        self.scheduler.lease_returned(id);
                    }
                    self.late.push(Input::Received { id, outcome: Err(ReceiveError::Cancelled) });
                }
            }
        }
    }

    /// One step of the engine.
    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        let plan = self.scheduler.plan(self.now);
        self.tell_engine_events();
        if plan.chunks.is_empty() {
            return;
        }
        // Who was cancelled since the plan was made makes it void, as in the engine's thread.
        let current = |id| self.scheduler.knows(id) && !self.scheduler.end_told(id);
        if !plan.chunks.iter().all(|chunk| current(chunk.id)) {
            return;
        }
        let samples = plan.chunks.iter().map(|chunk| chunk.samples);
        let sampled = samples.map(|s| s.then_some(Sampled { token: 1, logprobs: None }));
        let outcome = Outcome {
            sampled: sampled.collect(),
            prompt_logprobs: vec![Vec::new(); plan.chunks.len()],
            took: Duration::from_millis(1),
        };
        self.scheduler.complete(&plan, outcome);
        self.tell_engine_events();
    }

    fn tell_engine_events(&mut self) {
        let (stored, removed) = self.scheduler.take_cache_changes();
        if !stored.is_empty() || !removed.is_empty() {
            self.input(Input::CacheChanged { stored, removed });
        }
        for event in self.scheduler.take_events() {
            let input = match event {
                Event::Admitted { id, kind, cached_blocks, queued, .. } => {
                    self.lease = (kind != Kind::Local).then_some(id);
                    Input::Admitted { id, cached_blocks: cached_blocks as u32, queued }
                }
                Event::Tokens(tokens) => Input::Tokens(tokens),
                Event::PromptLogprobs { id, tokens } => Input::PromptLogprobs { id, tokens },
                Event::Failed { id, reason, retry } => Input::Failed { id, reason, retry },
                Event::Ended { id } => Input::Ended(id),
            };
            self.input(input);
        }
    }

    fn offer(&mut self, id: TransferId) {
        if let Some(receive) = self.receives.get_mut(&id)
            && !std::mem::replace(&mut receive.offered, true)
        {
            self.input(Input::Offered(id));
        }
    }

    /// A transfer to here ends; well, if it can.
    fn receive(&mut self, id: TransferId, well: bool) {
        let Some(receive) = self.receives.remove(&id) else { return };
        // As in the endpoint: the blocks are let go before the end is told.
        let whole = receive.reserved && receive.offered;
        if receive.reserved {
            self.scheduler.lease_returned(id);
        }
        let outcome =
            if well && whole { Ok(NO_TOKEN) } else { Err(ReceiveError::Timeout("the next piece")) };
        self.input(Input::Received { id, outcome });
    }

    fn sent(&mut self, id: TransferId, well: bool) {
        let Some(send) = self.sends.remove(&id) else { return };
        self.scheduler.lease_returned(id);
        let zero = Duration::ZERO;
        let outcome = if well && send.finished {
            Ok(Sent { hidden: zero, exposed: zero, bytes: 8, blocks: 1 })
        } else {
            Err(SendError::Timeout("the receiver's grant"))
        };
        self.input(Input::Sent { id, outcome });
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.worker.handle_timeout(self.now);
        self.act();
    }

    /// Everything goes well from here on; then nothing may be left.
    fn settle(&mut self) {
        for _ in 0..3000 {
            let receives: Vec<_> = self.receives.keys().copied().collect();
            for id in receives {
                self.offer(id);
                if self.receives.get(&id).is_some_and(|receive| receive.reserved) {
                    self.receive(id, true);
                }
            }
            let sends = self.sends.iter().filter(|(_, send)| send.finished);
            let sends: Vec<_> = sends.map(|(id, _)| *id).collect();
            sends.into_iter().for_each(|id| self.sent(id, true));
            for input in std::mem::take(&mut self.late) {
                self.input(input);
            }
            self.step();
            if self.worker.tasks() == 0 && self.sends.is_empty() && self.receives.is_empty() {
                self.step();
                let counts = self.scheduler.blocks();
                assert_eq!((counts.active, counts.leased), (0, 0), "every block came back");
                assert_eq!((self.scheduler.waiting(), self.scheduler.admitted()), (0, 0));
                return;
            }
            self.wait(1);
        }
        panic!("it does not come to an end: {:?}", self.worker);
    }

    /// How often a task's end was told.
    fn ends(&self, id: TransferId) -> usize {
        let end = |event: &NodeEvent| match event {
            NodeEvent::Failed { id: ended, .. } | NodeEvent::Transferred { id: ended, .. } => {
                *ended == id
            }
            NodeEvent::Tokens(tokens) => tokens.iter().any(|t| {
                // The end of an export is that of its transfer.
                t.id == id && t.finish.is_some() && !self.exported(id)
            }),
            _ => false,
        };
        self.told.iter().filter(|(_, event)| end(event)).count()
    }

    fn exported(&self, id: TransferId) -> bool {
        self.told.iter().any(|(_, event)| match event {
            NodeEvent::Transferred { id: sent, .. } => *sent == id,
            NodeEvent::Failed { id: sent, .. } => *sent == id,
            _ => false,
        })
    }

    fn judge(&self) {
        let mut failed = BTreeSet::new();
        for (_, event) in &self.told {
            match event {
                NodeEvent::Failed { id, .. } => assert!(failed.insert(*id), "{id} fails twice"),
                NodeEvent::Started { id, .. } | NodeEvent::Pulled { id, .. } => {
                    assert!(!failed.contains(id), "{id} goes on after its end");
                }
                _ => {}
            }
        }
        for (&id, stream) in &self.begun {
            let open = self.streams[stream];
            let ends = self.ends(id);
            assert!(ends <= 1, "{id} ends once: {:?}", self.told);
            // A job whose first token, at its import, was its last has nothing to tell.
            if open && !self.cancelled.contains(&id) {
                assert_eq!(ends, 1, "{id} does not end: {:?}", self.told);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Prefill {
        stream: u64,
        seed: u32,
        length: usize,
        pull: Option<usize>,
    },
    Remote {
        stream: u64,
        seed: u32,
        length: usize,
        tokens: u32,
    },
    Local {
        stream: u64,
        seed: u32,
        length: usize,
        tokens: u32,
        pull: Option<usize>,
    },
    Serve {
        stream: u64,
        seed: u32,
        length: usize,
    },
    /// By its owner, or by another coordinator.
    Cancel {
        by: Option<u64>,
        of: usize,
        pull: bool,
    },
    Offer(usize),
    Receive(usize, bool),
    Sent(usize, bool),
    Late,
    Step,
    Wait(u64),
    Drain(bool),
    Open(u64),
    Close(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let shape = || (1..4_u64, 0..3_u32, 1..40_usize);
    let pull = || prop::option::of(1..40_usize);
    prop_oneof![
        2 => (shape(), pull()).prop_map(|((stream, seed, length), pull)| {
            Op::Prefill { stream, seed, length, pull }
        }),
        2 => (shape(), 2..8_u32).prop_map(|((stream, seed, length), tokens)| {
            Op::Remote { stream, seed, length, tokens }
        }),
        2 => (shape(), 1..8_u32, pull()).prop_map(|((stream, seed, length), tokens, pull)| {
            Op::Local { stream, seed, length, tokens, pull }
        }),
        1 => shape().prop_map(|(stream, seed, length)| Op::Serve { stream, seed, length }),
        2 => (prop::option::weighted(0.2, 1..4_u64), any::<usize>(), prop::bool::weighted(0.3))
            .prop_map(|(by, of, pull)| Op::Cancel { by, of, pull }),
        4 => any::<usize>().prop_map(Op::Offer),
        4 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(i, well)| Op::Receive(i, well)),
        4 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(i, well)| Op::Sent(i, well)),
        2 => Just(Op::Late),
        12 => Just(Op::Step),
        1 => (1..3000_u64).prop_map(Op::Wait),
        1 => any::<bool>().prop_map(Op::Drain),
        1 => (1..4_u64).prop_map(Op::Open),
        1 => (1..4_u64).prop_map(Op::Close),
    ]
}

fn pick<T>(map: &BTreeMap<TransferId, T>, i: usize) -> Option<TransferId> {
    map.keys().nth(i.checked_rem(map.len())?).copied()
}

impl World {
    fn apply(&mut self, op: Op) {
        let next = self.begun.len() + 1;
        let pulled = |pull: Option<usize>, length: usize| {
            pull.map(|tokens| Pull { from: peer(), tokens: tokens.min(length) })
        };
        match op {
            Op::Prefill { stream, seed, length, pull } => {
                let (job, pull) = (job(next, seed, length, 9), pulled(pull, length));
                self.command(stream, Command::Prefill { job, decode: peer(), pull });
            }
            Op::Remote { stream, seed, length, tokens } => {
                let (job, prefill) = (job(next, seed, length, tokens), Some(peer()));
                self.command(stream, Command::Decode { job, prefill, pull: None });
            }
            Op::Local { stream, seed, length, tokens, pull } => {
                let (job, pull) = (job(next, seed, length, tokens), pulled(pull, length));
                self.command(stream, Command::Decode { job, prefill: None, pull });
            }
            Op::Serve { stream, seed, length } => {
                let Job { tokens, salt, .. } = job(next, seed, length, 1);
                let id = id(next).pull();
                self.command(stream, Command::Serve { id, tokens, salt, to: peer() });
            }
            Op::Cancel { by, of, pull } => {
                if let Some(id) = pick(&self.begun, of) {
                    let stream = by.unwrap_or(self.begun[&id].0);
                    let id = if pull { id.pull() } else { id };
                    self.command(stream, Command::Cancel(id));
                }
            }
            Op::Offer(i) => {
                if let Some(id) = pick(&self.receives, i) {
                    self.offer(id);
                }
            }
            Op::Receive(i, well) => {
                if let Some(id) = pick(&self.receives, i) {
                    self.receive(id, well);
                }
            }
            Op::Sent(i, well) => {
                if let Some(id) = pick(&self.sends, i) {
                    self.sent(id, well);
                }
            }
            Op::Late => {
                for input in std::mem::take(&mut self.late) {
                    self.input(input);
                }
            }
            Op::Step => self.step(),
            Op::Wait(ms) => self.wait(ms),
            Op::Drain(draining) => self.command(1, Command::SetDraining(draining)),
            Op::Open(stream) if !self.streams.contains_key(&StreamId(stream)) => self.open(stream),
            Op::Close(stream) if stream > 1 => self.close(stream),
            Op::Open(_) | Op::Close(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn whatever_happens_every_job_ends_once_and_every_block_comes_back(
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
        }
        world.settle();
        world.judge();
    }
}
