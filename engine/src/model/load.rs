//! Reading a model from a Hugging Face checkpoint folder.

use std::io::ErrorKind;
use std::path::Path;

use baton_kernels::Dtype;
use baton_kernels::cpu::{PackedMatrix, ThreadPool};
use baton_proto::geometry::KvDtype;
use serde_json::Value;

use super::Model;
use super::layer::{Layer, Linear};
use super::pass::Scratch;
use crate::config::{ConfigError, ModelConfig};
use crate::generation;
use crate::weights::{Tensor, Weights, WeightsError};

/// Where the weights come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadFormat {
    /// `model.safetensors`, or the files of `model.safetensors.index.json`.
    Safetensors,
    /// Made up at random; the folder needs to hold `config.json` only.
    Dummy {
        /// Equal seeds give equal weights.
        seed: u64,
    },
}

/// What to load, and how.
pub struct LoadOptions<'a> {
    /// The checkpoint's folder.
    pub dir: &'a Path,
    /// Where the weights come from.
    pub format: LoadFormat,
    /// Threads of the forward pass, the caller's included.
    pub threads: usize,
    /// Most tokens of a sequence; the checkpoint's `max_position_embeddings` if not given.
    pub max_model_len: Option<usize>,
    /// Element type of the KV cache, not fp8; the weights' type if not given.
    pub kv_dtype: Option<KvDtype>,
    /// Called as weights are read.
    pub on_progress: &'a mut dyn FnMut(LoadProgress),
}

/// How much of the weights has been read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoadProgress {
    /// Bytes read.
    pub done_bytes: usize,
    /// Bytes to read in all.
    pub total_bytes: usize,
}

/// A model cannot be loaded. The text is one line; loading again will fail again, unless the cause
/// is [`LoadError::Io`].
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Io {
        /// Its name in the folder.
        file: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not JSON.
    #[error("{file}: {source}")]
    Json {
        /// Its name in the folder.
        file: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A configuration that is not served.
    #[error("{file}: {source}")]
    Config {
        /// Its name in the folder.
        file: &'static str,
        /// Which key, and why.
        source: ConfigError,
    },
    /// Weights that are not served.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// `kv_dtype` is one that the CPU has no operations for.
    #[error("kv_dtype is fp8, which takes a GPU; a CPU has f32, bf16 and f16")]
    KvDtype,
    /// `max_model_len` is not what the model was made for.
    #[error("max_model_len is {asked}; max_position_embeddings in config.json allows 1 to {most}")]
    BadLength {
        /// What was asked for.
        asked: usize,
        /// What the checkpoint allows.
        most: usize,
    },
}

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// A checkpoint whose weights were checked and not read yet.
pub(crate) struct Opened {
    pub(crate) config: ModelConfig,
    pub(crate) max_model_len: usize,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) weights: Weights,
    /// The text of `config.json`.
    text: Vec<u8>,
}

impl Opened {
    pub(crate) fn open(
        dir: &Path,
        format: LoadFormat,
        asked_model_len: Option<usize>,
    ) -> Result<Self, LoadError> {
        let text = read(dir, CONFIG)?
            .ok_or(LoadError::Io { file: CONFIG, source: ErrorKind::NotFound.into() })?;
        let mut config = ModelConfig::parse(&json(CONFIG, &text)?)
            .map_err(|source| LoadError::Config { file: CONFIG, source })?;
        let max_model_len = max_model_len(asked_model_len, &config)?;
        let eos_token_ids = eos_token_ids(dir, &config)?;
        let weights = match format {
            LoadFormat::Safetensors => Weights::open(dir, &mut config)?,
            LoadFormat::Dummy { seed } => Weights::dummy(&config, seed),
        };
        Ok(Self { config, max_model_len, eos_token_ids, weights, text })
    }

    /// Names configuration, weights and the arithmetic of `kernels`, whatever that is.
    pub(crate) fn revision(&self, kernels: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("baton 1 model revision");
        hasher.update(kernels);
        hasher.update(&(self.text.len() as u64).to_le_bytes()).update(&self.text);
        self.weights.identify(&mut hasher);
        *hasher.finalize().as_bytes()
    }
}

impl Model {
    /// Loads the model of a folder. Nothing may write to the folder's files meanwhile.
    pub fn load(options: LoadOptions<'_>) -> Result<Self, LoadError> {
        if options.kv_dtype == Some(KvDtype::Fp8) {
            return Err(LoadError::KvDtype);
        }
        let opened = Opened::open(options.dir, options.format, options.max_model_len)?;
        let revision = opened.revision(&baton_kernels::RESULT_REVISION.to_le_bytes());
        let Opened { config, max_model_len, eos_token_ids, weights, .. } = opened;
        let pool = ThreadPool::new(options.threads);
        let mut loader = Loader {
            total_bytes: weights.total_bytes(&config),
            done_bytes: 0,
            weights: &weights,
            pool: &pool,
            on_progress: options.on_progress,
        };
        let table = loader.matrix(&["model.embed_tokens.weight".to_owned()], config.hidden);
        let kv_dtype = options.kv_dtype.unwrap_or(kv_dtype(table.dtype()));
        let layers = (0..config.layers()).map(|i| Layer::load(&mut loader, i, &config)).collect();
        let norm = loader.vector("model.norm.weight");
        let (embedding, head) = if config.tied {
            (None, table)
        } else {
            (Some(table), loader.matrix(&["lm_head.weight".to_owned()], config.hidden))
        };
        let scratch = Scratch::default();
        Ok(Self {
            config,
            max_model_len,
            kv_dtype,
            revision,
            eos_token_ids,
            pool,
            embedding,
            layers,
            norm,
            head,
            scratch,
        })
    }
}

/// Turns tensors into what kernels read, counting bytes.
pub(super) struct Loader<'a> {
    weights: &'a Weights,
    pool: &'a ThreadPool,
    done_bytes: usize,
    total_bytes: usize,
    on_progress: &'a mut dyn FnMut(LoadProgress),
}

impl Loader<'_> {
    /// A tensor in single precision.
    pub(super) fn vector(&mut self, name: &str) -> Vec<f32> {
        let tensor = self.weights.tensor(self.pool, name);
        self.advance(tensor.bytes.len());
        tensor.to_f32()
    }

    /// The matrices `names` of `inputs` columns, stacked.
    pub(super) fn matrix(&mut self, names: &[String], inputs: usize) -> PackedMatrix {
        let tensor = |name: &String| self.weights.tensor(self.pool, name);
        let mut parts: Vec<_> = names.iter().map(tensor).collect();
        let read_bytes = parts.iter().map(|part| part.bytes.len()).sum();
        if parts.iter().any(|part| part.dtype != parts[0].dtype) {
            parts = parts.iter().map(Tensor::widened).collect();
        }
        let dtype = parts[0].dtype;
        let bytes: Vec<&[u8]> = parts.iter().map(|part| &part.bytes[..]).collect();
        let outputs = bytes.iter().map(|b| b.len()).sum::<usize>() / (inputs * dtype.bytes());
        let packed = PackedMatrix::pack(self.pool, outputs, inputs, dtype, &bytes);
        self.advance(read_bytes);
        packed
    }

    fn advance(&mut self, bytes: usize) {
        self.done_bytes += bytes;
        let Self { done_bytes, total_bytes, .. } = *self;
        (self.on_progress)(LoadProgress { done_bytes, total_bytes });
    }

    /// The linear maps `names` of one input, stacked.
    pub(super) fn linear(&mut self, names: &[String], inputs: usize, bias: bool) -> Linear {
        let of = |kind: &str| -> Vec<_> { names.iter().map(|n| format!("{n}.{kind}")).collect() };
        let matrix = self.matrix(&of("weight"), inputs);
        let bias = bias.then(|| of("bias").iter().flat_map(|name| self.vector(name)).collect());
        Linear { matrix, bias }
    }
}

fn max_model_len(asked: Option<usize>, config: &ModelConfig) -> Result<usize, LoadError> {
    let most = config.max_positions;
    let asked = asked.unwrap_or(most);
    if (1..=most).contains(&asked) { Ok(asked) } else { Err(LoadError::BadLength { asked, most }) }
}

fn kv_dtype(weights: Dtype) -> KvDtype {
    match weights {
        Dtype::F32 => KvDtype::F32,
        Dtype::Bf16 => KvDtype::Bf16,
        Dtype::F16 => KvDtype::F16,
    }
}

fn eos_token_ids(dir: &Path, config: &ModelConfig) -> Result<Vec<u32>, LoadError> {
    let Some(text) = read(dir, GENERATION_CONFIG)? else {
        return Ok(config.eos_token_ids.clone());
    };
    let ids = generation::eos_token_ids(&json(GENERATION_CONFIG, &text)?)
        .map_err(|source| LoadError::Config { file: GENERATION_CONFIG, source })?;
    Ok(if ids.is_empty() { config.eos_token_ids.clone() } else { ids })
}

/// A file of the folder; none if there is no such file.
fn read(dir: &Path, file: &'static str) -> Result<Option<Vec<u8>>, LoadError> {
    match std::fs::read(dir.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LoadError::Io { file, source }),
    }
}

fn json(file: &'static str, text: &[u8]) -> Result<Value, LoadError> {
    serde_json::from_slice(text).map_err(|source| LoadError::Json { file, source })
}
