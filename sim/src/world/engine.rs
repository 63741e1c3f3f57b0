//! A node's engine under virtual time: the real scheduler, with a modelled device instead of a
//! thread that computes. Mirrors the thread's loop: inputs, plan, step, results.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Instant;

use baton_engine::pace::Pace;
use baton_engine::scheduler::{Event, Limits, Scheduler};
use baton_engine::{EngineInfo, FirstToken, Kind, Submission, SubmitError};
use baton_proto::hash::BlockHash;
use baton_proto::ids::TransferId;
use baton_proto::message::Report;

use super::memory::{Memory, Piece};
use crate::replay::{DecodeCost, PrefillCost};

mod step;

use step::Step;

/// How long a device takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device {
    /// Of prompts. What a prompt costs once comes with its last chunk.
    pub(crate) prefill: PrefillCost,
    /// Of steps with sequences that generate.
    pub(crate) decode: DecodeCost,
}

/// What an engine tells its node.
#[derive(Debug)]
pub(crate) enum News {
    /// What the scheduler tells.
    Event(Event),
    /// Export: one layer of these blocks may be read.
    KvReady { id: TransferId, layer: usize, blocks: Range<usize> },
    /// Entered and left the prefix cache.
    Cache { stored: Vec<BlockHash>, removed: Vec<BlockHash> },
    /// All that the prefix cache holds.
    Snapshot(Vec<BlockHash>),
}

/// Blocks that a transfer may read or write.
struct Lease {
    blocks: Vec<u32>,
    /// Leading blocks that were here at admission.
    shared: usize,
    /// Export: of each layer, how many leading blocks may be read.
    readable: Vec<usize>,
    /// Import: nothing may be written any more.
    sealed: bool,
}

#[derive(Default)]
struct Inputs {
    submitted: Vec<(Submission, Instant)>,
    released: BTreeSet<TransferId>,
    fetched: BTreeSet<TransferId>,
    imported: BTreeMap<TransferId, FirstToken>,
    cancelled: BTreeSet<TransferId>,
    returned: Vec<TransferId>,
    snapshot: bool,
}

/// See the module's description.
pub(crate) struct Engine {
    pub(crate) info: EngineInfo,
    pub(crate) scheduler: Scheduler,
    memory: Memory,
    device: Device,
    /// How many times longer than the device model says everything takes.
    pub(crate) slowness: f64,
    pace: Pace,
    max_waiting: usize,
    inputs: Inputs,
    /// Jobs between their submission and the return of their last block.
    live: BTreeSet<TransferId>,
    leases: BTreeMap<TransferId, Lease>,
    step: Option<Step>,
    /// Steps begun.
    pub(crate) steps: u64,
}

impl Engine {
    pub(crate) fn new(
        info: EngineInfo,
        limits: Limits,
        max_waiting: usize,
        device: Device,
    ) -> Self {
        let layers = info.geometry.layers as usize;
        Self {
            memory: Memory::new(layers, limits.kv_blocks, limits.block_tokens),
            scheduler: Scheduler::new(limits, info.root),
            info,
            device,
            slowness: 1.0,
            pace: Pace::default(),
            max_waiting,
            inputs: Inputs::default(),
            live: BTreeSet::new(),
            leases: BTreeMap::new(),
            step: None,
            steps: 0,
        }
    }

    pub(crate) fn submit(&mut self, job: Submission, now: Instant) -> Result<(), SubmitError> {
        self.info.check(&job)?;
        let waiting = self.scheduler.waiting() + self.inputs.submitted.len();
        if waiting >= self.max_waiting {
            return Err(SubmitError::Full(waiting));
        }
        if !self.live.insert(job.job.id) {
            return Err(SubmitError::Duplicate(job.job.id));
        }
        self.inputs.submitted.push((job, now));
        Ok(())
    }

    pub(crate) fn imported(&mut self, id: TransferId, first: FirstToken) {
        if self.live.contains(&id) {
            self.inputs.imported.entry(id).or_insert(first);
        }
    }

    pub(crate) fn release(&mut self, id: TransferId) {
        if self.live.contains(&id) {
            self.inputs.released.insert(id);
        }
    }

    pub(crate) fn fetched(&mut self, id: TransferId) {
        if self.live.contains(&id) {
            self.inputs.fetched.insert(id);
        }
    }

    pub(crate) fn cancel(&mut self, id: TransferId) {
        if self.live.contains(&id) {
            self.inputs.cancelled.insert(id);
        }
    }

    pub(crate) fn return_lease(&mut self, id: TransferId) {
        self.inputs.returned.push(id);
    }

    pub(crate) fn request_snapshot(&mut self) {
        self.inputs.snapshot = true;
    }

    /// Whether a step is under way.
    pub(crate) fn is_busy(&self) -> bool {
        self.step.is_some()
    }

    /// Whether the next turn would find something to do.
    pub(crate) fn has_inputs(&self) -> bool {
        let Inputs { submitted, released, fetched, imported, .. } = &self.inputs;
        let Inputs { cancelled, returned, snapshot, .. } = &self.inputs;
        let new = submitted.len() + released.len() + fetched.len() + imported.len();
        new + cancelled.len() + returned.len() > 0 || *snapshot
    }

    /// Whether nothing is left of any job.
    pub(crate) fn is_empty(&self) -> bool {
        self.live.is_empty() && self.leases.is_empty()
    }

    /// Whether blocks are leased for a transfer.
    pub(crate) fn has_lease(&self, id: TransferId) -> bool {
        self.leases.contains_key(&id)
    }

    /// One layer of an exported block.
    ///
    /// # Panics
    /// If it was not said to be readable.
    pub(crate) fn read(&self, id: TransferId, layer: u32, ordinal: u32) -> Piece {
        let lease = self.leases.get(&id).expect("what is sent is leased");
        let (layer, ordinal) = (layer as usize, ordinal as usize);
        assert!(ordinal < lease.readable[layer], "block {ordinal} is not complete");
        self.memory.piece(layer, lease.blocks[ordinal])
    }

    /// Where the blocks of a transfer are in memory.
    pub(crate) fn block(&self, id: TransferId, ordinal: u32) -> u32 {
        self.leases.get(&id).expect("what is sent is leased").blocks[ordinal as usize]
    }

    /// What lies in memory, whoever owns it now.
    pub(crate) fn look(&self, layer: u32, block: u32) -> Piece {
        self.memory.piece(layer as usize, block)
    }

    /// Writes one layer of an imported block, if the lease still allows it.
    pub(crate) fn write(&mut self, id: TransferId, layer: u32, ordinal: u32, piece: Piece) {
        let lease = self.leases.get(&id).expect("what is received is leased");
        let ordinal = ordinal as usize;
        if !lease.sealed && ordinal >= lease.shared {
            self.memory.set(layer as usize, lease.blocks[ordinal], piece);
        }
    }

    /// Takes the inputs and begins the next step, if there is something to compute.
    pub(crate) fn turn(&mut self, now: Instant, news: &mut Vec<News>) {
        assert!(self.step.is_none(), "steps follow each other");
        let inputs = std::mem::take(&mut self.inputs);
        for (Submission { job, kind, held }, arrived) in inputs.submitted {
            let id = job.id;
            self.scheduler.add(job, kind, arrived);
            if held {
                self.scheduler.hold(id);
            }
        }
        inputs.released.into_iter().for_each(|id| self.scheduler.release(id));
        for id in inputs.imported.keys().chain(&inputs.fetched) {
            if let Some(lease) = self.leases.get_mut(id) {
                lease.sealed = true;
            }
        }
        for (id, first) in inputs.imported {
            self.scheduler.imported(id, &first);
        }
        inputs.fetched.into_iter().for_each(|id| self.scheduler.fetched(id));
        inputs.cancelled.into_iter().for_each(|id| self.scheduler.cancel(id));
        for id in &inputs.returned {
            self.leases.remove(id);
            self.scheduler.lease_returned(*id);
        }
        let limit = self.pace.prefill_limit(self.scheduler.decodes());
        self.scheduler.set_prefill_limit(limit);
        let plan = self.scheduler.plan(now);
        self.tell(&inputs.returned, inputs.snapshot, news);
        if !plan.chunks.is_empty() {
            self.begin(plan, now);
        }
    }

    /// The load, as after the last step.
    pub(crate) fn report(&self) -> Report {
        Report {
            waiting: self.scheduler.waiting() as u32,
            running: self.scheduler.admitted() as u32,
            queued_tokens: self.scheduler.queued_tokens() as u64,
            blocks: self.scheduler.blocks(),
            prefill_tokens_per_second: self.pace.prefill_tokens_per_second(),
            decode_step_ms: self.pace.decode_step_ms(),
            ..Report::default()
        }
    }

    /// Tells what happened, and forgets jobs of which nothing is left.
    fn tell(&mut self, returned: &[TransferId], snapshot: bool, news: &mut Vec<News>) {
        let events = self.scheduler.take_events();
        let ended = events.iter().filter_map(|event| match event {
            Event::Ended { id } | Event::Failed { id, .. } => Some(id),
            _ => None,
        });
        for id in returned.iter().chain(ended) {
            if !self.scheduler.knows(*id) {
                self.live.remove(id);
            }
        }
        let (stored, removed) = self.scheduler.take_cache_changes();
        if !stored.is_empty() || !removed.is_empty() {
            news.push(News::Cache { stored, removed });
        }
        if snapshot {
            news.push(News::Snapshot(self.scheduler.cached_hashes()));
        }
        let layers = self.info.geometry.layers as usize;
        for event in events {
            if let Event::Admitted { id, kind, lease, cached_blocks, .. } = &event
                && !matches!(kind, Kind::Local | Kind::Embed(_))
            {
                let reads = matches!(kind, Kind::Export | Kind::Serve);
                let readable = if reads { *cached_blocks } else { 0 };
                let lease = Lease {
                    blocks: lease.clone(),
                    shared: *cached_blocks,
                    readable: vec![readable; layers],
                    sealed: false,
                };
                self.leases.insert(*id, lease);
            }
            news.push(News::Event(event));
        }
    }
}
