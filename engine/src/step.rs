//! The engine's thread: takes the inbox, asks the scheduler, computes, tells the sink.
#![expect(unsafe_code, reason = "lets the device write to blocks that the scheduler gave it")]

mod chunks;
mod meters;

use std::collections::{HashMap, VecDeque};
use std::ops::{ControlFlow, Range};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_proto::ids::TransferId;
use baton_proto::message::{Report, Retry};

use crate::engine::Sink;
use crate::events::{EngineEvent, Kind};
use crate::executor::{DeviceFailure, Executor, Step};
use crate::guiding::Guides;
use crate::inbox::{Inbox, Inputs, Wait};
use crate::lease::{BlockLease, Gate};
use crate::memory::KvMemory;
use crate::pace::Pace;
use crate::scheduler::{Event, Plan, Scheduler};

use chunks::step_chunk;
use meters::Meters;

/// How long a step is put off for masks that its sequences lack: far longer than most take, and
/// little enough for those that wait without need.
const MASK_WAIT: Duration = Duration::from_millis(1);

/// All that the thread owns.
pub(crate) struct Device {
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    /// Launched steps that are not finished, oldest first.
    in_flight: VecDeque<InFlight>,
    memory: KvMemory,
    block_tokens: usize,
    pace: Pace,
    /// Compute masks, if the engine can follow grammars.
    guides: Option<Guides>,
    /// Of every lease that is out.
    gates: HashMap<TransferId, Arc<Gate>>,
    layers: usize,
    inbox: Arc<Inbox>,
    report: Arc<Mutex<Report>>,
    sink: Sink,
    meters: Meters,
}

struct InFlight {
    plan: Plan,
    exported: Vec<Exported>,
}

/// A chunk of an export, whose blocks are told as they become complete.
struct Exported {
    /// Its place in the plan.
    chunk: usize,
    gate: Arc<Gate>,
    blocks: Range<usize>,
}

impl Device {
    pub(crate) fn new(
        (scheduler, executor, memory, guides): (
            Scheduler,
            Box<dyn Executor>,
            KvMemory,
            Option<Guides>,
        ),
        block_tokens: usize,
        inbox: Arc<Inbox>,
        report: Arc<Mutex<Report>>,
        sink: Sink,
    ) -> Self {
        let layers = executor.geometry(1).layers as usize;
        Self {
            scheduler,
            executor,
            in_flight: VecDeque::new(),
            memory,
            block_tokens,
            pace: Pace::default(),
            guides,
            gates: HashMap::new(),
            layers,
            inbox,
            report,
            sink,
            meters: Meters::new(),
        }
    }

    /// Serves until nobody holds the engine any more.
    pub(crate) fn run(mut self) {
        // A panic is a defect of one node: its jobs have to go on elsewhere.
        let served = std::panic::catch_unwind(AssertUnwindSafe(|| self.serve()));
        let reason = match served {
            Ok(Ok(())) => "the engine has stopped".to_owned(),
            Ok(Err(failure)) => failure.to_string(),
            Err(_) => "the engine failed".to_owned(),
        };
        for id in self.inbox.close() {
            if !self.scheduler.end_told(id) {
                let reason = reason.clone();
                (self.sink)(EngineEvent::Failed { id, reason, retry: Retry::OtherNode });
            }
        }
    }

    fn serve(&mut self) -> Result<(), DeviceFailure> {
        let mut wait = Wait::No;
        loop {
            self.ask_masks();
            let awaited = self.scheduler.masks_awaited();
            if awaited > 0 {
                self.inbox.await_masks(awaited, MASK_WAIT);
            }
            let inputs = self.inbox.take(wait);
            if inputs.stop {
                return Ok(());
            }
            let (snapshot, returned) = self.apply(inputs);
            self.ask_masks();
            let limit = self.pace.prefill_limit(self.scheduler.decodes());
            self.scheduler.set_prefill_limit(whole_tiles(limit));
            let plan = self.scheduler.plan(Instant::now());
            self.tell(&returned, snapshot);
            let launches = !plan.chunks.is_empty();
            if launches {
                self.launch(plan)?;
            }
            wait = Wait::No;
            if !launches && self.in_flight.is_empty() {
                wait = self.scheduler.next_deadline().map_or(Wait::Forever, Wait::Until);
            } else if !launches || self.in_flight.len() >= self.executor.depth() {
                self.finish()?;
            }
        }
    }

    fn ask_masks(&mut self) {
        if let Some(guides) = &self.guides {
            self.scheduler.masks_wanted().into_iter().for_each(|wanted| guides.ask(wanted));
        }
    }

    fn apply(&mut self, inputs: Inputs) -> (bool, Vec<TransferId>) {
        for (submission, arrived) in inputs.submitted {
            let (id, held) = (submission.job.id, submission.held);
            self.scheduler.add(submission.job, submission.kind, arrived);
            if held {
                self.scheduler.hold(id);
            }
        }
        for id in inputs.released {
            self.scheduler.release(id);
        }
        // From here on the blocks are the model's; a late write must not reach them.
        for id in inputs.imported.keys().chain(&inputs.fetched) {
            if let Some(gate) = self.gates.get(id) {
                gate.seal();
            }
        }
        for (id, first) in inputs.imported {
            self.scheduler.imported(id, &first);
        }
        for id in inputs.fetched {
            self.scheduler.fetched(id);
        }
        for mask in inputs.masks {
            self.scheduler.mask_found(mask);
        }
        for id in inputs.cancelled {
            self.scheduler.cancel(id);
        }
        for id in &inputs.returned {
            self.gates.remove(id);
            self.scheduler.lease_returned(*id);
        }
        (inputs.snapshot, inputs.returned)
    }

    /// Tells what happened, after the state that others may look at says so too.
    fn tell(&mut self, returned: &[TransferId], snapshot: bool) {
        let events = self.scheduler.take_events();
        let mut gone = returned.to_vec();
        gone.extend(events.iter().filter_map(|event| match event {
            Event::Ended { id } | Event::Failed { id, .. } => Some(*id),
            _ => None,
        }));
        gone.retain(|id| !self.scheduler.knows(*id));
        self.inbox.settle(self.scheduler.waiting(), &gone);
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = self.load();
        let (stored, removed) = self.scheduler.take_cache_changes();
        if !stored.is_empty() || !removed.is_empty() {
            (self.sink)(EngineEvent::CacheChanged { stored, removed });
        }
        if snapshot {
            (self.sink)(EngineEvent::Snapshot(self.scheduler.cached_hashes()));
        }
        for event in events {
            let event = self.public(event);
            (self.sink)(event);
        }
    }

    fn load(&self) -> Report {
        // Role and draining are the node's to say.
        Report {
            waiting: self.scheduler.waiting() as u32,
            running: self.scheduler.admitted() as u32,
            queued_tokens: self.scheduler.queued_tokens() as u64,
            blocks: self.scheduler.blocks(),
            waiting_blocks: self.scheduler.waiting_blocks() as u64,
            prefill_tokens_per_second: self.pace.prefill_tokens_per_second(),
            decode_step_ms: self.pace.decode_step_ms(),
            ..Report::default()
        }
    }

    fn public(&mut self, event: Event) -> EngineEvent {
        match event {
            Event::Admitted { id, kind, lease, cached_blocks, queued } => {
                let lease = self.lease(id, kind, lease, cached_blocks);
                let cached_tokens = (cached_blocks * self.block_tokens) as u32;
                EngineEvent::Admitted { id, lease, cached_tokens, queued }
            }
            Event::Tokens(tokens) => EngineEvent::Tokens(tokens),
            Event::PromptLogprobs { id, tokens } => EngineEvent::PromptLogprobs { id, tokens },
            Event::Embedded { id, values, prefill } => {
                EngineEvent::Embedded { id, values, prefill }
            }
            Event::Failed { id, reason, retry } => EngineEvent::Failed { id, reason, retry },
            Event::Ended { id } => EngineEvent::Ended { id },
        }
    }

    fn lease(
        &mut self,
        id: TransferId,
        kind: Kind,
        blocks: Vec<u32>,
        cached: usize,
    ) -> Option<Arc<BlockLease>> {
        let gate = match kind {
            Kind::Local | Kind::Embed(_) => return None,
            Kind::Export | Kind::Serve => Gate::reading(self.layers, cached),
            Kind::Import | Kind::Fetch => Gate::writing(self.layers),
        };
        self.gates.insert(id, gate.clone());
        let (memory, inbox) = (self.memory.clone(), self.inbox.clone());
        Some(BlockLease::new(id, memory, (blocks, cached), gate, inbox))
    }

    /// Begins to compute a plan.
    fn launch(&mut self, plan: Plan) -> Result<(), DeviceFailure> {
        let exported = self.exported(&plan);
        let chunks = plan.chunks.iter().map(|chunk| step_chunk(&self.scheduler, chunk)).collect();
        let step = Step { chunks, watched: !exported.is_empty() };
        let mut after_layer =
            layer_listener(&plan, &exported, &self.scheduler, &self.inbox, &self.sink);
        // SAFETY: the blocks that a chunk writes are its sequence's own: shared ones are full, and
        // a sequence continues behind them. The scheduler gives them to nobody else while the step
        // is in flight. Leases write an import's blocks only until the gate is sealed, before its
        // sequence runs; they read an export's only when they are complete.
        unsafe { self.executor.launch(&step, &mut after_layer) }?;
        drop(after_layer);
        self.in_flight.push_back(InFlight { plan, exported });
        Ok(())
    }

    /// Waits for the oldest step in flight, and handles its results.
    fn finish(&mut self) -> Result<(), DeviceFailure> {
        let Some(InFlight { plan, exported }) = self.in_flight.pop_front() else { return Ok(()) };
        let mut after_layer =
            layer_listener(&plan, &exported, &self.scheduler, &self.inbox, &self.sink);
        let outcome = self.executor.finish(&mut after_layer)?;
        drop(after_layer);
        let Some(outcome) = outcome else {
            // The step changed nothing, and its sequences are about to be cancelled.
            self.scheduler.abandon(&plan);
            return Ok(());
        };
        let decode = plan.chunks.iter().filter(|chunk| chunk.decode).count();
        self.pace.observe(plan.prefill_tokens(), decode, outcome.took);
        self.meters.step(&plan, decode, outcome.took);
        self.scheduler.complete(&plan, outcome);
        self.tell(&[], false);
        Ok(())
    }

    /// The blocks that become complete with this plan, the last and partial one with the last
    /// chunk.
    fn exported(&self, plan: &Plan) -> Vec<Exported> {
        let block_tokens = self.block_tokens;
        let exports = plan.chunks.iter().enumerate().filter_map(|(index, chunk)| {
            let export = self.scheduler.sequence(chunk).kind == Kind::Export;
            let gate = self.gates.get(&chunk.id).filter(|_| export)?.clone();
            let end = match chunk.samples {
                true => chunk.end().div_ceil(block_tokens),
                false => chunk.end() / block_tokens,
            };
            Some(Exported { chunk: index, gate, blocks: chunk.start / block_tokens..end })
        });
        exports.filter(|exported| !exported.blocks.is_empty()).collect()
    }
}

/// Rows that a GPU multiplies at once.
const TILE_ROWS: usize = 128;

/// A limit that leaves no tile half empty, and chunks of few different lengths, for each of which a
/// matrix product is planned.
fn whole_tiles(limit: usize) -> usize {
    if limit > TILE_ROWS { limit - limit % TILE_ROWS } else { limit }
}

/// Tells who waits for the layers of a step, and breaks when nobody wants it any more.
fn layer_listener<'a>(
    plan: &'a Plan,
    exported: &'a [Exported],
    scheduler: &'a Scheduler,
    inbox: &'a Inbox,
    sink: &'a Sink,
) -> impl FnMut(usize) -> ControlFlow<()> + 'a {
    move |layer| {
        for Exported { chunk, gate, blocks } in exported {
            let chunk = &plan.chunks[*chunk];
            if !scheduler.is_over(chunk) {
                gate.complete(layer, blocks.end);
                sink(EngineEvent::KvReady { id: chunk.id, layer, blocks: blocks.clone() });
            }
        }
        let wanted = plan.chunks.iter().filter(|chunk| !scheduler.is_over(chunk));
        let mut wanted = wanted.map(|chunk| chunk.id).peekable();
        if wanted.peek().is_none() || inbox.cancels(wanted) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}
