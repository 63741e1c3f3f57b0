//! An engine with a fake model, and the transfer between two of them.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_engine::scheduler::Outcome;
use baton_engine::testing::delayed::Clocks;
use baton_engine::testing::{Ahead, FakeModel};
use baton_engine::{
    AfterLayer, BlockLease, DeviceFailure, Engine, EngineConfig, EngineEvent, Executor, FirstToken,
    HostExecutor, Kind, KvMemory, MemoryLost, Soon, Step, Submission,
};
use baton_proto::geometry::KvGeometry;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::{Job, Logprobs, Report, TokenEvent};
use baton_proto::sampling::SamplingParams;

use crate::grammar::grammars;

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

thread_local! {
    /// Whether the devices of this test run ahead.
    static AHEAD: Cell<bool> = const { Cell::new(false) };
}

/// Runs a test with devices that run ahead.
pub(crate) fn ahead(test: fn()) {
    AHEAD.set(true);
    test();
}

pub(crate) fn device(model: FakeModel) -> Box<dyn Executor> {
    if AHEAD.get() { Box::new(Ahead::new(model)) } else { Box::new(HostExecutor::new(model)) }
}

pub(crate) fn config() -> EngineConfig {
    EngineConfig {
        block_tokens: 4,
        kv_blocks: 100,
        max_batch_tokens: 64,
        max_sequences: 16,
        max_waiting: 32,
    }
}

fn model() -> FakeModel {
    FakeModel::new(128, 200)
}

pub(crate) fn id(request: u32) -> TransferId {
    TransferId { request: RequestId(request.into()), attempt: 1 }
}

pub(crate) fn prompt(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (seed * 31 + i * i + i * seed) % 128).collect()
}

/// A greedy job.
pub(crate) fn job(request: u32, tokens: Vec<u32>, max_tokens: u32) -> Job {
    let sampling = SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() };
    let prompt_tokens = tokens.len();
    let salt = CacheSalt::default();
    Job {
        id: id(request),
        tokens: tokens.into(),
        prompt_tokens,
        sampling,
        salt,
        deadline: None,
        trace: None,
    }
}

/// The tokens of a greedy job, computed without cache and batch.
pub(crate) fn expected(job: &Job) -> Vec<u32> {
    model().expect(&job.tokens, job.sampling.max_tokens as usize)
}

pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) events: Receiver<EngineEvent>,
}

impl Node {
    pub(crate) fn start(config: EngineConfig) -> Self {
        Self::with(config, model())
    }

    /// Every step waits for a permit; none is needed once the sender is gone.
    pub(crate) fn gated(config: EngineConfig) -> (Sender<()>, Self) {
        let (permits, gate) = channel();
        let gate = Mutex::new(gate);
        let wait = move |_: &[baton_engine::Chunk<'_>]| {
            let _ = gate.lock().expect("one thread waits here").recv();
        };
        (permits, Self::with(config, model().on_step(Box::new(wait))))
    }

    fn with(config: EngineConfig, model: FakeModel) -> Self {
        Self::on(config, device(model))
    }

    /// Leases reach the blocks through `slots` slots of `slot_bytes` each way.
    pub(crate) fn staged(slots: (usize, usize)) -> (Clocks, Self) {
        let clocks = Clocks::default();
        let device = clocks.before(device(model()), slots);
        (clocks, Self::on(config(), device))
    }

    fn on(config: EngineConfig, device: Box<dyn Executor>) -> Self {
        let (sink, events) = channel();
        let sink = Box::new(move |event| drop(sink.send(event)));
        Self { engine: Engine::start(config, device, Some(grammars()), sink), events }
    }

    pub(crate) fn submit(&self, job: &Job, kind: Kind) {
        let submitted = self.engine.submit(Submission { job: job.clone(), kind, held: false });
        submitted.expect("the engine takes the job");
    }

    pub(crate) fn next(&self) -> EngineEvent {
        self.events.recv_timeout(PATIENCE).expect("something happens")
    }

    fn find<T>(&self, mut wanted: impl FnMut(EngineEvent) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.next()) {
                return found;
            }
        }
    }

    /// Waits for an admission: the lease and the cached tokens.
    pub(crate) fn admitted(&self, wanted: TransferId) -> (Option<Arc<BlockLease>>, u32) {
        self.find(|event| match event {
            EngineEvent::Admitted { id, lease, cached_tokens, .. } => {
                assert_eq!(id, wanted);
                Some((lease, cached_tokens))
            }
            _ => None,
        })
    }

    pub(crate) fn tokens(&self) -> Vec<TokenEvent> {
        self.find(|event| match event {
            EngineEvent::Tokens(tokens) => Some(tokens),
            _ => None,
        })
    }

    pub(crate) fn prompt_logprobs(&self) -> Vec<(u32, Logprobs)> {
        self.find(|event| match event {
            EngineEvent::PromptLogprobs { tokens, .. } => Some(tokens),
            EngineEvent::Tokens(_) => panic!("they come before the first token"),
            _ => None,
        })
    }

    /// Waits for the end of a job, which must be its only one.
    pub(crate) fn ended(&self, wanted: TransferId) {
        self.find(|event| match event {
            EngineEvent::Ended { id } => {
                assert_eq!(id, wanted);
                Some(())
            }
            EngineEvent::Failed { id, reason, .. } => panic!("{id} failed: {reason}"),
            _ => None,
        });
    }

    /// Waits until `jobs` jobs have ended; their tokens, in order of their positions.
    pub(crate) fn until_ended(&self, jobs: usize) -> HashMap<TransferId, Vec<u32>> {
        let (tokens, ended) = (RefCell::new(HashMap::new()), RefCell::new(Vec::new()));
        let mut next = HashMap::new();
        self.find(|event| {
            match event {
                EngineEvent::Tokens(more) => {
                    for token in more {
                        let mut all = tokens.borrow_mut();
                        all.entry(token.id).or_insert_with(Vec::new).push(token.token);
                        let place = next.entry(token.id).or_insert(token.position);
                        assert_eq!(*place, token.position, "positions leave no gap");
                        *place += 1;
                    }
                }
                EngineEvent::Ended { id } => {
                    tokens.borrow_mut().entry(id).or_default();
                    ended.borrow_mut().push(id);
                }
                EngineEvent::Failed { id, reason, .. } => panic!("{id} failed: {reason}"),
                _ => {}
            }
            (ended.borrow().len() == jobs).then_some(())
        });
        let mut ended = ended.into_inner();
        ended.sort_unstable();
        ended.dedup();
        assert_eq!(ended.len(), jobs, "each ends once");
        tokens.into_inner()
    }

    /// Nothing is used by anybody, and nothing was told that nobody looked at.
    pub(crate) fn idle(&self) {
        let report = self.engine.report();
        let blocks = report.blocks;
        assert_eq!((blocks.active, blocks.leased), (0, 0));
        assert_eq!(blocks.free + blocks.cached, self.engine.info().kv_blocks as u64);
        assert_eq!((report.waiting, report.running, report.queued_tokens), (0, 0, 0));
    }

    pub(crate) fn eventually(&self, condition: impl Fn(&Report) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition(&self.engine.report()) {
            assert!(Instant::now() < until, "{:?}", self.engine.report());
            std::thread::yield_now();
        }
    }
}

/// Moves a job from one engine to the other, each piece through `spoil`. How many blocks the
/// importing engine held, and all tokens of the job.
pub(crate) fn hand_over(
    from: &Node,
    to: &Node,
    job: &Job,
    spoil: &mut dyn FnMut(&mut [u8]),
) -> (usize, Vec<u32>) {
    hand_over_with(from, to, job, spoil, &mut |_| {})
}

/// The same; `with` sees the lease of the import before it runs.
pub(crate) fn hand_over_with(
    from: &Node,
    to: &Node,
    job: &Job,
    spoil: &mut dyn FnMut(&mut [u8]),
    with: &mut dyn FnMut(&Arc<BlockLease>),
) -> (usize, Vec<u32>) {
    to.submit(job, Kind::Import);
    let lease = to.admitted(job.id).0.expect("an import has a lease");
    from.submit(job, Kind::Export);
    let first = copy(from, job, &lease, spoil);
    with(&lease);
    let held = lease.held();
    let kept = Arc::strong_count(&lease) > 1;
    drop(lease);
    let TokenEvent { token, logprobs, finish, .. } = first;
    to.engine.imported(job.id, FirstToken { token, logprobs, finish });
    let mut tokens = vec![token];
    if !kept {
        tokens.extend(to.until_ended(1).remove(&job.id).unwrap_or_default());
        return (held, tokens);
    }
    while tokens.len() < job.sampling.max_tokens as usize {
        tokens.extend(to.tokens().iter().map(|token| token.token));
    }
    (held, tokens)
}

/// Copies what becomes ready until the first token is there; every piece exactly once.
fn copy(
    from: &Node,
    job: &Job,
    to: &Arc<BlockLease>,
    spoil: &mut dyn FnMut(&mut [u8]),
) -> TokenEvent {
    let lease = from.admitted(job.id).0.expect("an export has a lease");
    let layers = from.engine.info().geometry.layers as usize;
    let mut done = vec![0; layers];
    let mut copy = |layer: usize, blocks: Range<usize>| {
        assert_eq!(done[layer], blocks.start, "blocks come in order");
        done[layer] = blocks.end;
        for ordinal in blocks.filter(|ordinal| *ordinal >= to.held()) {
            let pieces = wait(lease.read(layer, ordinal..ordinal + 1)).expect("it is readable");
            let mut bytes = pieces[0].as_ref().to_vec();
            spoil(&mut bytes);
            let (a, b) = bytes.split_at(7);
            let mut place = wait(to.place(layer, ordinal..ordinal + 1)).expect("there is room");
            place.write(ordinal, 0, a);
            place.write(ordinal, 7, b);
            wait(place.apply()).expect("it is writable");
        }
    };
    for layer in 0..layers {
        copy(layer, 0..lease.ready_blocks());
    }
    let first = from.find(|event| match event {
        EngineEvent::KvReady { layer, blocks, .. } => {
            copy(layer, blocks);
            None
        }
        EngineEvent::Tokens(tokens) => tokens.into_iter().next(),
        _ => None,
    });
    assert!(done.iter().all(|done| *done == lease.blocks()), "every piece became ready");
    drop(lease);
    from.ended(job.id);
    first
}

/// Writes `bytes` to the beginning of one layer of a block.
pub(crate) fn write(lease: &Arc<BlockLease>, layer: usize, ordinal: usize, bytes: &[u8]) {
    let mut place = wait(lease.place(layer, ordinal..ordinal + 1)).expect("there is room");
    place.write(ordinal, 0, bytes);
    wait(place.apply()).expect("it is writable");
}

pub(crate) fn wait<T>(soon: Soon<T>) -> Result<T, MemoryLost> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(soon)
}

/// A device that fails at its step number `steps`.
pub(crate) struct Failing {
    inner: Box<dyn Executor>,
    steps: usize,
}

impl Failing {
    pub(crate) fn new(inner: Box<dyn Executor>, steps: usize) -> Self {
        Self { inner, steps }
    }
}

impl Executor for Failing {
    fn revision(&self) -> [u8; 32] {
        self.inner.revision()
    }

    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        self.inner.geometry(block_tokens)
    }

    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn hidden_size(&self) -> usize {
        self.inner.hidden_size()
    }

    fn max_model_len(&self) -> usize {
        self.inner.max_model_len()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn allocate(&mut self, block_tokens: u32, blocks: usize) -> KvMemory {
        self.inner.allocate(block_tokens, blocks)
    }

    #[expect(unsafe_code, reason = "passes the promise on")]
    unsafe fn launch(
        &mut self,
        step: &Step<'_>,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<(), DeviceFailure> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch(step, after_layer) }
    }

    fn finish(
        &mut self,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<Option<Outcome>, DeviceFailure> {
        self.steps -= 1;
        if self.steps == 0 {
            return Err(DeviceFailure("it fell off the bus".to_owned()));
        }
        self.inner.finish(after_layer)
    }
}
