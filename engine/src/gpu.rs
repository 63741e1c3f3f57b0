//! [`GpuModel`]: a model on a GPU.
//!
//! Everything of a step is queued in one stream without waiting: the numbers that describe it go
//! over in one copy, tokens that the step before samples are looked up on the device, and what is
//! sampled comes back to page-locked memory. So the next step is queued while one is computed.
//! Steps in which every sequence decodes are captured as graphs, one for each power of two of rows.
//!
//! Results depend on the shape of a batch: matrix products and the sharing out of keys round
//! differently for other numbers of rows. The same steps give the same bits.

mod activations;
mod cache;
mod find;
mod flight;
mod group;
mod load;
mod packing;
mod parallel;
mod pass;
mod places;
mod rows;
mod sampling;
mod scoring;
mod shard;
mod step;
mod upload;
mod warm_up;
mod weights;

use std::collections::{BTreeSet, HashMap, VecDeque};

use baton_kernels::cuda::{Buffer, DecodeScratch, DeviceError, DeviceSampler, Gemm, Graph, Stream};
use baton_proto::geometry::KvDtype;

use self::activations::Activations;
use self::cache::{Cache, Widened};
use self::flight::{Flight, Results, Slot};
use self::group::Member;
use self::packing::{Inputs, Packing};
use self::places::AttentionShape;
use self::scoring::Scoring;
use self::weights::Weights;
use crate::config::ModelConfig;

pub use self::find::{Unavailable, find_nccl, open};
pub use self::load::{GpuLoadError, GpuOptions};
pub use self::parallel::ParallelModel;
pub use self::warm_up::WarmUp;

/// Steps that may be in flight.
const DEPTH: usize = 2;
/// Rows of the largest graph.
const MAX_GRAPH_ROWS: usize = 256;

/// What the matrices of layers are multiplied as. The others (embedding and output layer, norms,
/// biases) are bf16: tables are looked up or read once for a token, and rounding logits is what
/// changes tokens most.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WeightDtype {
    /// bf16, whatever the checkpoint has.
    #[default]
    Bf16,
    /// e4m3, rounded when they are loaded, with a scale for each output channel; what they are
    /// multiplied with is rounded too, with a scale for each token. On Hopper only.
    Fp8,
}

/// Of the largest steps.
struct Sizes {
    /// Rows.
    rows: usize,
    /// Rows with logits at once.
    logit_rows: usize,
}

/// A model on a GPU, or one GPU's part of it. Activations are bf16.
pub struct GpuModel {
    /// Of this GPU's part.
    config: ModelConfig,
    /// Its place among the GPUs of the model.
    member: Option<Member>,
    max_model_len: usize,
    kv_dtype: KvDtype,
    revision: [u8; 32],
    eos_token_ids: Vec<u32>,
    // Graphs before what they point to.
    graphs: HashMap<usize, Graph>,
    /// Rows of graphs that were run once, so that nothing is loaded during a capture.
    warm: BTreeSet<usize>,
    /// Memory that graphs will take, as far as it is known.
    graph_bytes: usize,
    warm_up: WarmUp,
    flights: VecDeque<Flight>,
    slots: [Slot; DEPTH],
    /// Steps launched so far.
    launched: usize,
    /// By chunk of the last launched step: the row that it sampled.
    sampled: Vec<Option<u32>>,
    weights: Weights,
    frequencies: Buffer<f32>,
    gemm: Gemm,
    shape: AttentionShape,
    scratch: DecodeScratch,
    inputs: Inputs,
    packing: Packing,
    activations: Activations,
    sampler: DeviceSampler,
    scoring: Scoring,
    results: Results,
    cache: Option<Cache>,
    widened: Option<Widened>,
    stream: Stream,
}

impl GpuModel {
    /// The configuration that the model was loaded with.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of the device that nobody has, less what graphs will take.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn free_bytes(&self) -> Result<usize, DeviceError> {
        Ok(self.stream.device().memory()?.free_bytes.saturating_sub(self.graph_bytes))
    }

    /// What was done before the first request.
    #[must_use]
    pub fn warm_up(&self) -> &WarmUp {
        &self.warm_up
    }

    /// Tokens that end a sequence, from `generation_config.json` or else `config.json`.
    #[must_use]
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }
}
