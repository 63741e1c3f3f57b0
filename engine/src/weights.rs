//! The tensors of a model, from files or made up. All are checked against the configuration
//! before the first one is read, so that a checkpoint is refused at once and reading cannot fail.

mod checkpoint;
mod dummy;
mod expected;

use std::borrow::Cow;
use std::path::Path;

use baton_kernels::Dtype;
use baton_kernels::cpu::ThreadPool;

use self::checkpoint::Checkpoint;
use self::dummy::Dummy;
pub(crate) use self::expected::Expected;
use self::expected::ignored;
use crate::config::ModelConfig;

/// The weights of a checkpoint cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file cannot be opened or mapped.
    #[error("{file}: {source}")]
    Io {
        /// Its name in the folder.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// The folder has neither form of weights.
    #[error("neither model.safetensors nor model.safetensors.index.json is in the folder")]
    NoWeights,
    /// A file is cut short, or no safetensors file or index at all.
    #[error("{file}: {reason}")]
    Malformed {
        /// Its name in the folder.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The index names something that is not a file of the folder.
    #[error(
        "model.safetensors.index.json: weight_map names {0:?}; it must name files of its folder"
    )]
    Escapes(String),
    /// A tensor that the configuration calls for is in no file.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor that this model has no use for: it is of another architecture than it says.
    #[error("{file}: tensor {name} is not part of this model")]
    UnknownTensor {
        /// The tensor.
        name: String,
        /// The file that holds it.
        file: String,
    },
    /// A tensor is not of the shape or of a type that the model has.
    #[error("{file}: tensor {name} is {found}; expected {expected}")]
    WrongTensor {
        /// The tensor.
        name: String,
        /// The file that holds it.
        file: String,
        /// Its shape or type.
        found: String,
        /// What it must be.
        expected: String,
    },
}

/// A tensor as it lies in a file: row-major, little endian.
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) bytes: Cow<'a, [u8]>,
}

impl Tensor<'_> {
    /// Its elements in single precision, which holds every value exactly.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.bytes.len() / self.dtype.bytes()];
        self.dtype.widen(&self.bytes, &mut values);
        values
    }

    /// The same values as a tensor of single precision.
    pub(crate) fn widened(&self) -> Tensor<'static> {
        let bytes = self.to_f32().into_iter().flat_map(f32::to_le_bytes).collect();
        Tensor { dtype: Dtype::F32, bytes }
    }
}

/// Where the weights come from.
pub(crate) enum Weights {
    Checkpoint(Checkpoint),
    Dummy(Dummy),
}

impl Weights {
    /// Opens the safetensors files of `dir` and checks them. As in transformers 5, an output layer
    /// that differs from the embedding is not tied to it, whatever the configuration says.
    pub(crate) fn open(dir: &Path, config: &mut ModelConfig) -> Result<Self, WeightsError> {
        let checkpoint = Checkpoint::open(dir)?;
        config.tied &= !checkpoint.differ("lm_head.weight", "model.embed_tokens.weight");
        checkpoint.check(&Expected::of(config), |name| ignored(name, config))?;
        Ok(Self::Checkpoint(checkpoint))
    }

    /// Random weights for `config`; see [`Dummy`].
    pub(crate) fn dummy(config: &ModelConfig, seed: u64) -> Self {
        Self::Dummy(Dummy::new(config, seed))
    }

    /// The tensor `name`, one of [`Expected`].
    pub(crate) fn tensor(&self, pool: &ThreadPool, name: &str) -> Tensor<'_> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.tensor(name),
            Self::Dummy(dummy) => dummy.tensor(pool, name),
        }
    }

    /// The type of the tensor `name`.
    pub(crate) fn dtype(&self, name: &str) -> Dtype {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.dtype(name),
            Self::Dummy(dummy) => dummy.dtype(),
        }
    }

    /// The shape of the tensor `name`.
    pub(crate) fn shape(&self, name: &str) -> &[usize] {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.shape(name),
            Self::Dummy(dummy) => dummy.shape(name),
        }
    }

    /// Bytes of all tensors that a model reads.
    pub(crate) fn total_bytes(&self, config: &ModelConfig) -> usize {
        let expected = Expected::of(config);
        let bytes = |(name, shape): (&str, &[usize])| {
            shape.iter().product::<usize>() * self.dtype(name).bytes()
        };
        expected.iter().map(bytes).sum()
    }

    /// Feeds `hasher` what tells these weights from others.
    pub(crate) fn identify(&self, hasher: &mut blake3::Hasher) {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.identify(hasher),
            Self::Dummy(dummy) => dummy.identify(hasher),
        }
    }
}
