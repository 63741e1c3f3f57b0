//! Launching and finishing steps.

#![expect(unsafe_code, reason = "implements an unsafe function")]

use std::time::Duration;

use baton_kernels::cuda::{DeviceError, SamplingInputs};
use baton_proto::geometry::KvGeometry;

use super::cache::Cache;
use super::flight::{Flight, Slot};
use super::pass::Pass;
use super::places::Places;
use super::rows::Rows;
use super::shard::Shard;
use super::warm_up::capture;
use super::{DEPTH, GpuModel, MAX_GRAPH_ROWS};
use crate::executor::{AfterLayer, DeviceFailure, Executor, Step};
use crate::memory::KvMemory;
use crate::scheduler::Outcome;
use crate::staging::DeviceKv;

impl From<DeviceError> for DeviceFailure {
    fn from(error: DeviceError) -> Self {
        Self(error.to_string())
    }
}

impl Executor for GpuModel {
    fn revision(&self) -> [u8; 32] {
        self.revision
    }

    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        KvGeometry {
            layers: self.config.layers() as u32,
            kv_heads: self.config.kv_heads as u32,
            head_dim: self.config.head_dim as u32,
            dtype: self.kv_dtype,
            block_tokens,
        }
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn hidden_size(&self) -> usize {
        self.config.hidden
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn allocate(&mut self, block_tokens: u32, blocks: usize) -> KvMemory {
        let memory =
            self.reserve_cache(block_tokens, blocks).and_then(|kv| DeviceKv::memory(vec![kv]));
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
        assert!(self.flights.len() < DEPTH, "a step is finished before a third one is launched");
        Ok(self.queue(step)?)
    }

    fn finish(
        &mut self,
        after_layer: &mut AfterLayer<'_>,
    ) -> Result<Option<Outcome>, DeviceFailure> {
        let flight = self.pop_flight();
        let layers = if flight.watched { &self.slot(&flight).layers[..] } else { &[] };
        for (layer, event) in layers.iter().enumerate() {
            event.synchronize()?;
            // What is queued is computed, wanted or not.
            let _ = after_layer(layer);
        }
        Ok(Some(self.outcome(flight)?))
    }
}

impl GpuModel {
    /// Reserves the KV cache, or this device's part of it.
    pub(super) fn reserve_cache(
        &mut self,
        block_tokens: u32,
        blocks: usize,
    ) -> Result<DeviceKv, DeviceError> {
        let geometry = self.geometry(block_tokens);
        // They hold addresses of the cache before.
        self.graphs.clear();
        let cache = self.cache.insert(Cache::new(self.stream.device(), geometry, blocks)?);
        Ok(cache.kv(self.member.as_ref().map_or(Shard::WHOLE, |member| member.shard)))
    }

    /// The oldest launched step.
    pub(super) fn pop_flight(&mut self) -> Flight {
        self.flights.pop_front().expect("only launched steps are finished")
    }

    /// What a step in flight has.
    pub(super) fn slot(&self, flight: &Flight) -> &Slot {
        &self.slots[flight.slot]
    }

    /// What came of a step. Waits for its end.
    pub(super) fn outcome(&self, flight: Flight) -> Result<Outcome, DeviceError> {
        let slot = self.slot(&flight);
        let mut outcome = Outcome {
            sampled: vec![None; flight.chunks],
            prompt_logprobs: flight.prompt_logprobs,
            pooled: vec![Vec::new(); flight.chunks],
            took: Duration::from_secs_f64(f64::from(slot.took_ms()?.max(0.0)) / 1e3),
        };
        for (chunk, sampled) in slot.sampled(&flight.sampling)? {
            outcome.sampled[chunk] = Some(sampled);
        }
        for (chunk, sum) in slot.pooled(&flight.pooling, self.config.hidden)? {
            outcome.pooled[chunk] = sum;
        }
        Ok(outcome)
    }

    /// Queues a step.
    pub(super) fn queue(&mut self, step: &Step<'_>) -> Result<(), DeviceError> {
        let rows = Rows::of(step);
        let padded = graph_rows(&rows, step);
        let sampled = std::mem::take(&mut self.sampled);
        let places = Places::pack(&mut self.packing, (&rows, padded), step, &sampled, &self.shape);
        if !self.inputs.has_room(&self.packing) {
            self.graphs.clear();
            self.inputs.grow(&self.packing)?;
        }
        let slot = self.launched % DEPTH;
        self.slots[slot].began.record(&self.stream)?;
        self.inputs.upload(&self.stream, &self.packing)?;
        match padded {
            Some(_) => self.run_graph(&places)?,
            None => self.run(&places, step.watched.then_some(slot))?,
        }
        let sampling: Vec<_> = rows.sampling.iter().map(|i| (*i, top(step, *i))).collect();
        let mut prompt_logprobs = Vec::new();
        if self.pass().is_first() {
            prompt_logprobs = self.sample(&rows, &places, step)?;
            let logprobs = sampling.iter().any(|(_, top)| top.is_some());
            let to = &mut self.slots[slot];
            self.results.download(&self.stream, to, sampling.len(), logprobs)?;
            self.download_hidden(&rows, &places, slot)?;
        }
        self.slots[slot].ended.record(&self.stream)?;

        self.sampled = vec![None; step.chunks.len()];
        for (row, index) in rows.sampling.iter().enumerate() {
            self.sampled[*index] = Some(row as u32);
        }
        self.launched += 1;
        let (chunks, watched, pooling) = (step.chunks.len(), step.watched, rows.pooling);
        self.flights.push_back(Flight {
            slot,
            chunks,
            sampling,
            watched,
            pooling,
            prompt_logprobs,
        });
        Ok(())
    }

    /// Computes all logits that are sampled from, kernel by kernel.
    fn run(&self, places: &Places, watched: Option<usize>) -> Result<(), DeviceError> {
        let (pass, a) = (self.pass(), &self.activations);
        pass.run(places, watched.map(|slot| &self.slots[slot].layers[..]))?;
        if !pass.is_first() {
            return Ok(());
        }
        let sampling = places.sampling.lengths.len();
        match &places.wanted {
            None => pass.score(a.normed.first(places.rows), a.logits.first(places.rows)),
            Some(wanted) => {
                let (ids, normed) = (self.inputs.array(wanted), a.normed.first(places.rows));
                baton_kernels::cuda::take_rows(
                    &self.stream,
                    a.wanted.first(wanted.len()),
                    normed,
                    ids,
                    0,
                )?;
                pass.score(a.wanted.first(sampling), a.logits.first(sampling))
            }
        }
    }

    /// The same from a graph, if there is one.
    fn run_graph(&mut self, places: &Places) -> Result<(), DeviceError> {
        if let Some(graph) = self.graphs.get(&places.rows) {
            return self.stream.replay(graph);
        }
        if self.warm.insert(places.rows) {
            return self.run(places, None);
        }
        let graph = self.stream.capture(|_| self.run(places, None))?;
        self.stream.replay(&graph)?;
        self.graphs.insert(places.rows, graph);
        Ok(())
    }

    /// Chooses tokens, and reads log-probabilities of prompts.
    fn sample(
        &mut self,
        rows: &Rows,
        places: &Places,
        step: &Step<'_>,
    ) -> Result<Vec<Vec<(u32, baton_proto::message::Logprobs)>>, DeviceError> {
        let count = rows.sampling.len();
        let s = &places.sampling;
        // In place: sampled tokens of penalised histories are looked up where their numbers are.
        let histories = self.inputs.array(&s.histories);
        let outputs = self.results.outputs(count);
        baton_kernels::cuda::resolve_tokens(
            &self.stream,
            histories,
            histories,
            self.results.tokens(),
        )?;
        let inputs = SamplingInputs {
            logits: self.activations.logits.first(count),
            params: self.inputs.array(&s.params).cast(),
            lengths: self.inputs.array(&s.lengths),
            histories,
            history_stride: 1,
            ends: self.inputs.array(&s.ends),
            biases: (self.inputs.array(&s.biased), self.inputs.array(&s.biases).cast()),
            allowed: self.inputs.array(&s.allowed),
        };
        self.sampler.sample(&self.stream, &inputs, &outputs, s.greedy)?;
        let mut scoring = std::mem::take(&mut self.scoring);
        let found = scoring.run(&self.pass(), step, count);
        self.scoring = scoring;
        found
    }

    /// Copies the hidden states that are to be summed, the last of the wanted rows, to the host.
    fn download_hidden(
        &mut self,
        rows: &Rows,
        places: &Places,
        slot: usize,
    ) -> Result<(), DeviceError> {
        let count: usize = rows.pooling.iter().map(|(_, count)| count).sum();
        let Some(wanted) = places.wanted.as_ref().filter(|_| count > 0) else { return Ok(()) };
        let (buffer, end) = (&self.activations.wanted, wanted.len());
        let hidden = buffer.first(end).slice((end - count) * buffer.width..end * buffer.width);
        self.slots[slot].download_hidden(&self.stream, hidden)
    }

    fn pass(&self) -> Pass<'_> {
        Pass {
            stream: &self.stream,
            gemm: &self.gemm,
            config: &self.config,
            weights: &self.weights,
            frequencies: self.frequencies.all(),
            shape: &self.shape,
            scratch: &self.scratch,
            cache: self.cache.as_ref().expect("the cache is allocated before the first launch"),
            widened: self.widened.as_ref(),
            inputs: &self.inputs,
            activations: &self.activations,
            sampled: self.results.tokens(),
            member: self.member.as_ref(),
        }
    }
}

/// Alternatives that a chunk's token wants log-probabilities of.
fn top(step: &Step<'_>, index: usize) -> Option<u32> {
    step.chunks[index].sample.and_then(|sample| sample.params.logprobs)
}

/// Rows of the graph for a step, if it is one of decoding sequences only.
fn graph_rows(rows: &Rows, step: &Step<'_>) -> Option<usize> {
    let decodes = rows.count == step.chunks.len() && rows.sampling.len() == rows.count;
    let plain = !step.watched && step.chunks.iter().all(|chunk| chunk.prompt_logprobs.is_none());
    let padded = rows.count.next_power_of_two();
    (decodes && plain && padded <= MAX_GRAPH_ROWS).then_some(padded)
}
