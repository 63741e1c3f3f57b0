//! [`ParallelModel`]: a model on several GPUs, each of which has a [shard](super::shard).
//!
//! All devices run the same steps, launched by a thread for each: what a device needs first (a
//! kernel to be loaded, a connection of NCCL) may wait for what runs on it, which may wait for the
//! other devices.

#![expect(unsafe_code, reason = "implements an unsafe function")]

use std::sync::{Arc, Mutex};

use baton_kernels::cpu::ThreadPool;
use baton_kernels::cuda::{Device, DeviceError, Event, Nccl};
use baton_proto::geometry::KvGeometry;

use super::group::{Group, Member};
use super::shard::Shard;
use super::warm_up::{Parts, WarmUp, Work, capture, warm_up};
use super::{GpuLoadError, GpuModel, GpuOptions};
use crate::config::ModelConfig;
use crate::executor::{AfterLayer, DeviceFailure, Executor, Step};
use crate::memory::KvMemory;
use crate::model::{LoadProgress, Opened};
use crate::scheduler::Outcome;
use crate::staging::DeviceKv;

/// A model on several GPUs.
pub struct ParallelModel {
    /// The first one samples.
    ranks: Vec<GpuModel>,
    group: Arc<Group>,
    config: ModelConfig,
    threads: ThreadPool,
}

impl ParallelModel {
    /// Loads the model of a folder. Nothing may write to the folder's files meanwhile.
    ///
    /// # Errors
    /// If the folder cannot be served, by so many devices, or their memory is not enough.
    pub fn load(
        devices: &[Arc<Device>],
        nccl: &Arc<Nccl>,
        options: GpuOptions<'_>,
    ) -> Result<Self, GpuLoadError> {
        let opened = Opened::open(options.dir, options.format, options.max_model_len)?;
        Shard::check(&opened.config, devices.len()).map_err(GpuLoadError::Unsupported)?;
        let group = Group::of(nccl, devices)?;
        let total_bytes = opened.weights.total_bytes(&opened.config);
        let GpuOptions { on_progress, block_tokens, max_batch_tokens, .. } = options;
        let budget = options.warm_up;
        let mut ranks = Vec::new();
        // One after the other: the threads that read are what takes time.
        for (rank, device) in devices.iter().enumerate() {
            let shard = Shard { rank, ranks: devices.len() };
            let mut on_progress = |own: LoadProgress| {
                let done = rank as f64 + own.done_bytes as f64 / own.total_bytes as f64;
                let done_bytes = (total_bytes as f64 * done / devices.len() as f64) as usize;
                on_progress(LoadProgress { done_bytes, total_bytes });
            };
            let options = GpuOptions { on_progress: &mut on_progress, ..options };
            let member = Member { group: group.clone(), shard };
            ranks.push(GpuModel::load_shard(device, &opened, options, Some(member))?);
        }
        let threads = ThreadPool::new(devices.len());
        let mut model = Self { ranks, group, config: opened.config, threads };
        warm_up(&mut model, block_tokens, max_batch_tokens, budget)?;
        Ok(model)
    }

    /// What was done before the first request.
    #[must_use]
    pub fn warm_up(&self) -> &WarmUp {
        self.ranks[0].warm_up()
    }

    /// The configuration that the model was loaded with.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes that all devices together have for a KV cache, which they share equally.
    ///
    /// # Errors
    /// If a device is lost.
    pub fn free_bytes(&self) -> Result<usize, DeviceError> {
        let free = self.ranks.iter().map(GpuModel::free_bytes).collect::<Result<Vec<_>, _>>()?;
        Ok(free.into_iter().min().unwrap_or(0) * self.ranks.len())
    }

    /// Tokens that end a sequence, from `generation_config.json` or else `config.json`.
    #[must_use]
    pub fn eos_token_ids(&self) -> &[u32] {
        self.ranks[0].eos_token_ids()
    }

    /// Waits until every device has reached its event. If one fails, all are given up.
    fn wait(&self, event: impl Fn(&GpuModel) -> &Event) -> Result<(), DeviceError> {
        self.group.wait(|| {
            let mut all = true;
            for rank in &self.ranks {
                all &= event(rank).is_done()?;
            }
            Ok(all)
        })
    }
}

impl Parts for ParallelModel {
    fn on_each(&mut self, work: &Work<'_>) -> Result<(), DeviceError> {
        let failed = Mutex::new(None);
        self.threads.for_each_chunk(&mut self.ranks, 1, &|_, rank| {
            if let Err(error) = work(&mut rank[0]) {
                failed.lock().expect("nothing panics with the lock").get_or_insert(error);
                // The others wait for sums in which this one takes no part.
                self.group.abort();
            }
        });
        failed.into_inner().expect("nothing panics with the lock").map_or(Ok(()), Err)
    }

    fn first(&mut self) -> &mut GpuModel {
        &mut self.ranks[0]
    }
}

impl Executor for ParallelModel {
    fn revision(&self) -> [u8; 32] {
        self.ranks[0].revision()
    }

    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        let own = self.ranks[0].geometry(block_tokens);
        KvGeometry { kv_heads: self.config.kv_heads as u32, ..own }
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn hidden_size(&self) -> usize {
        self.config.hidden
    }

    fn max_model_len(&self) -> usize {
        self.ranks[0].max_model_len()
    }

    fn depth(&self) -> usize {
        self.ranks[0].depth()
    }

    fn allocate(&mut self, block_tokens: u32, blocks: usize) -> KvMemory {
        let reserve = |rank: &mut GpuModel| rank.reserve_cache(block_tokens, blocks);
        let shards = self.ranks.iter_mut().map(reserve).collect::<Result<_, _>>();
        let memory = shards.and_then(DeviceKv::memory);
        let memory = memory.unwrap_or_else(|e| panic!("no memory for the KV cache: {e}"));
        // What fails here fails again in a step, and there is somebody to tell.
        let _ = capture(self);
        memory
    }

    unsafe fn launch(
        &mut self,
        step: &Step<'_>,
        _: &mut AfterLayer<'_>,
    ) -> Result<(), DeviceFailure> {
        Ok(self.on_each(&|rank| rank.queue(step))?)
    }

    fn finish(
        &mut self,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<Option<Outcome>, DeviceFailure> {
        let mut flights = self.ranks.iter_mut().map(GpuModel::pop_flight);
        let flight = flights.next().expect("there are devices");
        flights.for_each(drop);
        if flight.watched {
            for layer in 0..self.config.layers() {
                self.wait(|rank| &rank.slot(&flight).layers[layer])?;
                // What is queued is computed, wanted or not.
                let _ = after_layer(layer);
            }
        }
        self.wait(|rank| &rank.slot(&flight).ended)?;
        Ok(Some(self.ranks[0].outcome(flight)?))
    }
}
