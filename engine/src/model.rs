//! A model in memory and its forward pass: one program for every family, over the operations of
//! `kernels`; what differs between families is in [`ModelConfig`].

mod layer;
mod load;
mod pass;
mod rows;

use baton_kernels::cpu::{PackedMatrix, ThreadPool};
use baton_proto::geometry::KvDtype;

use self::layer::Layer;
use self::pass::Scratch;
use crate::config::ModelConfig;

pub(crate) use self::load::Opened;
pub use self::load::{LoadError, LoadFormat, LoadOptions, LoadProgress};
pub use crate::weights::WeightsError;

/// A loaded model. Its weights keep the checkpoint's precision; activations are single precision.
///
/// Every result is the same bits whatever the batch, the chunks of the prompt, the block size and
/// the number of threads.
pub struct Model {
    config: ModelConfig,
    max_model_len: usize,
    kv_dtype: KvDtype,
    revision: [u8; 32],
    eos_token_ids: Vec<u32>,
    pool: ThreadPool,
    /// The table of token embeddings; if none, it is `head`.
    embedding: Option<PackedMatrix>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: PackedMatrix,
    scratch: Scratch,
}

impl Model {
    /// The configuration that the model was loaded with.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens that end a sequence, from `generation_config.json` or else `config.json`.
    #[must_use]
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }
}
