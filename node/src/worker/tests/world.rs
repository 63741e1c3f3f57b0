//! One node, whose engine computes when told to and whose transfers end as told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use baton_engine::Kind;
use baton_engine::sampler::Sampled;
use baton_engine::scheduler::{Event, Limits, Outcome, PlannedChunk, Scheduler};
use baton_kvtransfer::{ReceiveError, SendError, Sent, Transport};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::ModelRoot;
use baton_proto::ids::{Role, TransferId};
use baton_proto::message::{Command, NodeEvent, Retry};

use super::super::pull::NO_TOKEN;
use super::*;

const BLOCK_TOKENS: usize = 4;
const ROOT: ModelRoot = ModelRoot([1; 16]);

/// See the module's description.
pub(super) struct World {
    pub(super) now: Instant,
    worker: Worker,
    scheduler: Scheduler,
    /// Transfers, and whether they have the lease of their blocks.
    pub(super) sends: BTreeMap<TransferId, Sending>,
    pub(super) receives: BTreeMap<TransferId, Receiving>,
    /// Whose lease the admission that is being handled offers.
    lease: Option<TransferId>,
    /// Outcomes of cancelled transfers, which come late.
    pub(super) late: Vec<Input>,
    pub(super) streams: BTreeMap<StreamId, bool>,
    pub(super) told: Vec<(StreamId, NodeEvent)>,
    pub(super) cancelled: BTreeSet<TransferId>,
    pub(super) begun: BTreeMap<TransferId, StreamId>,
}

#[derive(Default)]
pub(super) struct Sending {
    finished: bool,
}

#[derive(Default)]
pub(super) struct Receiving {
    offered: bool,
    reserved: bool,
}

impl World {
    pub(super) fn new() -> Self {
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

    pub(super) fn open(&mut self, stream: u64) {
        self.streams.insert(StreamId(stream), true);
        self.input(Input::Opened(StreamId(stream)));
    }

    pub(super) fn close(&mut self, stream: u64) {
        self.streams.insert(StreamId(stream), false);
        self.input(Input::Closed(StreamId(stream)));
    }

    pub(super) fn command(&mut self, stream: u64, command: Command) {
        let stream = StreamId(stream);
        let new = match &command {
            Command::Prefill { job, .. }
            | Command::Decode { job, .. }
            | Command::Embed { job, .. } => Some(job.id),
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

    pub(super) fn input(&mut self, input: Input) {
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
    pub(super) fn step(&mut self) {
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
            pooled: plan.chunks.iter().map(pooled).collect(),
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
                    let alone = matches!(kind, Kind::Local | Kind::Embed(_));
                    self.lease = (!alone).then_some(id);
                    Input::Admitted { id, cached_blocks: cached_blocks as u32, queued }
                }
                Event::Tokens(tokens) => Input::Tokens(tokens),
                Event::PromptLogprobs { id, tokens } => Input::PromptLogprobs { id, tokens },
                Event::Embedded { id, values, prefill } => Input::Embedded { id, values, prefill },
                Event::Failed { id, reason, retry } => Input::Failed { id, reason, retry },
                Event::Ended { id } => Input::Ended(id),
            };
            self.input(input);
        }
    }

    pub(super) fn offer(&mut self, id: TransferId) {
        if let Some(receive) = self.receives.get_mut(&id)
            && !std::mem::replace(&mut receive.offered, true)
        {
            self.input(Input::Offered(id));
        }
    }

    /// A transfer to here ends; well, if it can.
    pub(super) fn receive(&mut self, id: TransferId, well: bool) {
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

    pub(super) fn sent(&mut self, id: TransferId, well: bool) {
        let Some(send) = self.sends.remove(&id) else { return };
        self.scheduler.lease_returned(id);
        let zero = Duration::ZERO;
        let outcome = if well && send.finished {
            Ok(Sent {
                hidden: zero,
                exposed: zero,
                bytes: 8,
                blocks: 1,
                transport: Transport::Quic,
            })
        } else {
            Err(SendError::Timeout("the receiver's grant"))
        };
        self.input(Input::Sent { id, outcome });
    }

    pub(super) fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.worker.handle_timeout(self.now);
        self.act();
    }

    /// Everything goes well from here on; then nothing may be left.
    pub(super) fn settle(&mut self) {
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
}

/// The sum over a chunk's hidden states, of which each is a one.
fn pooled(chunk: &PlannedChunk) -> Vec<f64> {
    let rows = chunk.wanted.rows(chunk.tokens).len();
    if chunk.wanted.is_hidden() { vec![rows as f64] } else { Vec::new() }
}
