//! The engine's thread: takes the inbox, asks the scheduler, computes, tells the sink.
#![expect(unsafe_code, reason = "lets the model write to blocks that the scheduler gave it")]

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use baton_kernels::cpu::KvStore;
use baton_proto::ids::TransferId;
use baton_proto::message::{Report, Retry};

use crate::engine::Sink;
use crate::events::{EngineEvent, Kind};
use crate::forward::{Chunk, Forward, Wanted};
use crate::inbox::{Inbox, Inputs, Wait};
use crate::lease::{BlockLease, Gate};
use crate::pace::Pace;
use crate::sampler::{Sampler, logprobs};
use crate::scheduler::{Event, Outcome, Plan, PlannedChunk, Scheduler};

/// All that the thread owns.
pub(crate) struct Device {
    scheduler: Scheduler,
    model: Box<dyn Forward>,
    store: Arc<KvStore>,
    sampler: Sampler,
    pace: Pace,
    /// Of every lease that is out.
    gates: HashMap<TransferId, Arc<Gate>>,
    layers: usize,
    inbox: Arc<Inbox>,
    report: Arc<Mutex<Report>>,
    sink: Sink,
}

/// A chunk of an export, whose blocks are told as they become complete.
struct Exported {
    id: TransferId,
    gate: Arc<Gate>,
    blocks: Range<usize>,
}

impl Device {
    pub(crate) fn new(
        scheduler: Scheduler,
        model: Box<dyn Forward>,
        store: Arc<KvStore>,
        inbox: Arc<Inbox>,
        report: Arc<Mutex<Report>>,
        sink: Sink,
    ) -> Self {
        let sampler = Sampler::new(model.vocab_size());
        let layers = model.geometry(1).layers as usize;
        let (pace, gates) = (Pace::default(), HashMap::new());
        Self { scheduler, model, store, sampler, pace, gates, layers, inbox, report, sink }
    }

    /// Serves until nobody holds the engine any more.
    pub(crate) fn run(mut self) {
        // A panic is a defect of one node: its jobs have to go on elsewhere.
        let served = std::panic::catch_unwind(AssertUnwindSafe(|| self.serve()));
        let reason = if served.is_ok() { "the engine has stopped" } else { "the engine failed" };
        for id in self.inbox.close() {
            if !self.scheduler.end_told(id) {
                let reason = reason.to_owned();
                (self.sink)(EngineEvent::Failed { id, reason, retry: Retry::OtherNode });
            }
        }
    }

    fn serve(&mut self) {
        let mut wait = Wait::No;
        loop {
            let inputs = self.inbox.take(wait);
            if inputs.stop {
                return;
            }
            let (snapshot, returned) = self.apply(inputs);
            let limit = self.pace.prefill_limit(self.scheduler.decodes());
            self.scheduler.set_prefill_limit(limit);
            let plan = self.scheduler.plan(Instant::now());
            self.tell(&returned, snapshot);
            if plan.chunks.is_empty() {
                wait = self.scheduler.next_deadline().map_or(Wait::Forever, Wait::Until);
                continue;
            }
            // An abandoned step changed nothing, and its sequences are about to be cancelled.
            if let Some(outcome) = self.compute(&plan) {
                self.scheduler.complete(&plan, outcome);
                self.tell(&[], false);
            }
            wait = Wait::No;
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
                let cached_tokens = (cached_blocks * self.store.layout().block_tokens) as u32;
                EngineEvent::Admitted { id, lease, cached_tokens, queued }
            }
            Event::Tokens(tokens) => EngineEvent::Tokens(tokens),
            Event::PromptLogprobs { id, tokens } => EngineEvent::PromptLogprobs { id, tokens },
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
            Kind::Local => return None,
            Kind::Export | Kind::Serve => Gate::reading(self.layers, cached),
            Kind::Import | Kind::Fetch => Gate::writing(self.layers),
        };
        self.gates.insert(id, gate.clone());
        let (store, inbox) = (self.store.clone(), self.inbox.clone());
        Some(BlockLease::new(id, store, (blocks, cached), gate, inbox))
    }

    /// The results of a plan; none if all of its sequences were cancelled meanwhile.
    fn compute(&mut self, plan: &Plan) -> Option<Outcome> {
        let began = Instant::now();
        let exported = self.exported(plan);
        let (scheduler, sampler) = (&self.scheduler, &mut self.sampler);
        let (sink, inbox) = (&self.sink, &self.inbox);
        let chunks: Vec<Chunk<'_>> = plan.chunks.iter().map(|c| chunk(scheduler, c)).collect();
        let mut after_layer = |layer: usize| {
            for Exported { id, gate, blocks } in &exported {
                gate.complete(layer, blocks.end);
                sink(EngineEvent::KvReady { id: *id, layer, blocks: blocks.clone() });
            }
            match inbox.cancels(plan.chunks.iter().map(|chunk| chunk.id)) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let rows = wanted_rows(plan);
        let mut outcome = Outcome {
            sampled: vec![None; plan.chunks.len()],
            prompt_logprobs: vec![Vec::new(); plan.chunks.len()],
            ..Outcome::default()
        };
        let mut logits = |row: usize, values: &mut [f32]| {
            let (index, position) = rows[row];
            read_logits(scheduler, sampler, plan, (index, position), values, &mut outcome);
        };
        // SAFETY: the blocks that a chunk writes are its sequence's own: shared ones are full, and
        // a sequence continues behind them. Leases write an import's blocks only until the gate is
        // sealed, before its sequence runs; they read an export's only when they are complete.
        let done =
            unsafe { self.model.forward(&chunks, &self.store, &mut after_layer, &mut logits) };
        if done.is_break() {
            return None;
        }
        outcome.took = began.elapsed();
        let decode = plan.chunks.iter().filter(|chunk| chunk.decode).count();
        self.pace.observe(plan.prefill_tokens(), decode, outcome.took);
        Some(outcome)
    }

    /// The blocks that become complete with this plan, the last and partial one with the last
    /// chunk.
    fn exported(&self, plan: &Plan) -> Vec<Exported> {
        let block_tokens = self.store.layout().block_tokens;
        let exports = plan.chunks.iter().filter_map(|chunk| {
            let export = self.scheduler.sequence(chunk).kind == Kind::Export;
            let gate = self.gates.get(&chunk.id).filter(|_| export)?.clone();
            let end = match chunk.samples {
                true => chunk.end().div_ceil(block_tokens),
                false => chunk.end() / block_tokens,
            };
            Some(Exported { id: chunk.id, gate, blocks: chunk.start / block_tokens..end })
        });
        exports.filter(|exported| !exported.blocks.is_empty()).collect()
    }
}

fn chunk<'a>(scheduler: &'a Scheduler, planned: &PlannedChunk) -> Chunk<'a> {
    let sequence = scheduler.sequence(planned);
    Chunk {
        tokens: &sequence.tokens[planned.start..planned.end()],
        start: planned.start,
        blocks: &sequence.blocks,
        logits: planned.logits,
    }
}

/// Of every row with logits, which chunk it is of and which position.
fn wanted_rows(plan: &Plan) -> Vec<(usize, usize)> {
    let rows = |chunk: &PlannedChunk| match chunk.logits {
        Wanted::None => 0..0,
        Wanted::Last => chunk.end() - 1..chunk.end(),
        Wanted::All => chunk.start..chunk.end(),
    };
    let chunks = plan.chunks.iter().enumerate();
    chunks.flat_map(|(i, chunk)| rows(chunk).map(move |position| (i, position))).collect()
}

fn read_logits(
    scheduler: &Scheduler,
    sampler: &mut Sampler,
    plan: &Plan,
    (index, position): (usize, usize),
    values: &[f32],
    outcome: &mut Outcome,
) {
    let chunk = &plan.chunks[index];
    let sequence = scheduler.sequence(chunk);
    if let Some(before) = &sequence.prompt_logprobs {
        let more = &mut outcome.prompt_logprobs[index];
        // After a preemption the leading ones are here already.
        let next = before.len() + more.len() + 1;
        if position + 1 == next && next < sequence.prompt_tokens {
            let top = sequence.sampling.prompt_logprobs.unwrap_or(0) as usize;
            let token = sequence.tokens[next];
            more.push((token, logprobs(values, token, top)));
        }
    }
    if chunk.samples && position + 1 == chunk.end() {
        let (params, output) = (&sequence.sampling, sequence.output());
        outcome.sampled[index] = Some(sampler.sample(values, params, sequence.prompt(), output));
    }
}
