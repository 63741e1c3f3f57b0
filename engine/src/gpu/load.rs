//! From a checkpoint to a model on a device.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_kernels::cuda::{
    self, DecodePlan, DecodeScratch, Device, DeviceError, DeviceSampler, Gemm, HeadShape, Stream,
    Target,
};

use baton_proto::geometry::KvDtype;

use super::activations::Activations;
use super::cache::Widened;
use super::flight::{Results, Slot};
use super::group::Member;
use super::packing::{Inputs, Packing};
use super::places::{AttentionShape, WidenedShape};
use super::scoring::Scoring;
use super::shard::Shard;
use super::upload::upload;
use super::warm_up::{WarmUp, warm_up};
use super::weights::Weights;
use super::{DEPTH, GpuModel, MAX_GRAPH_ROWS, Sizes, WeightDtype};
use crate::config::ModelConfig;
use crate::executor::DeviceFailure;
use crate::model::{LoadError, LoadFormat, LoadProgress, Opened};

/// What to load, and for what steps.
pub struct GpuOptions<'a> {
    /// The checkpoint's folder.
    pub dir: &'a Path,
    /// Where the weights come from.
    pub format: LoadFormat,
    /// Threads that read.
    pub threads: usize,
    /// Most tokens of a sequence; the checkpoint's `max_position_embeddings` if not given.
    pub max_model_len: Option<usize>,
    /// What matrices are multiplied as.
    pub weight_dtype: WeightDtype,
    /// Element type of the KV cache: bf16 (if not given) or fp8.
    pub kv_dtype: Option<KvDtype>,
    /// Tokens of one KV block: 16, 32 or 64.
    pub block_tokens: usize,
    /// Most tokens of a step.
    pub max_batch_tokens: usize,
    /// Most sequences of a step.
    pub max_sequences: usize,
    /// How long to prepare for the first steps at most: to choose algorithms of matrix products by
    /// trying them, to load kernels, and to capture graphs. What there is no time for is done as
    /// steps come, and with no time at all nothing is tried.
    pub warm_up: Duration,
    /// Called as weights are read.
    pub on_progress: &'a mut dyn FnMut(LoadProgress),
}

/// A model cannot be loaded to a device.
#[derive(Debug, thiserror::Error)]
pub enum GpuLoadError {
    /// Its checkpoint is at fault.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The device is at fault.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It failed at the first steps.
    #[error(transparent)]
    Failed(#[from] DeviceFailure),
    /// There is no kernel for such a model. It can be served by the CPU.
    #[error("{0}")]
    Unsupported(String),
}

/// Raised by every change of a kernel or of the order of operations here that changes results.
const RESULT_REVISION: u32 = 1;

impl GpuModel {
    /// Loads the model of a folder. Nothing may write to the folder's files meanwhile.
    ///
    /// # Errors
    /// If the folder cannot be served, by this device, or its memory is not enough.
    pub fn load(device: &Arc<Device>, options: GpuOptions<'_>) -> Result<Self, GpuLoadError> {
        let opened = Opened::open(options.dir, options.format, options.max_model_len)?;
        let (block_tokens, tokens) = (options.block_tokens, options.max_batch_tokens);
        let budget = options.warm_up;
        let mut model = Self::load_shard(device, &opened, options, None)?;
        warm_up(&mut model, block_tokens, tokens, budget)?;
        Ok(model)
    }

    /// Loads what a device has of an opened model.
    pub(super) fn load_shard(
        device: &Arc<Device>,
        opened: &Opened,
        options: GpuOptions<'_>,
        member: Option<Member>,
    ) -> Result<Self, GpuLoadError> {
        let shard = member.as_ref().map_or(Shard::WHOLE, |member| member.shard);
        let config = &shard.config(&opened.config);
        let heads = supported(config, options.block_tokens, options.kv_dtype)?;
        let weight_dtype = options.weight_dtype;
        if weight_dtype == WeightDtype::Fp8 {
            check_fp8_products(device, config)?;
        }
        let stream = Stream::new(device)?;
        let weights = Weights::reserve(&stream, config, weight_dtype, shard)?;
        let source = (&opened.weights, shard);
        upload(device, source, &weights.parts(), options.threads, options.on_progress)?;

        let rows = options.max_sequences.max(1);
        let sizes = sizes(rows, options.max_batch_tokens);
        let kv_dtype = options.kv_dtype.unwrap_or(KvDtype::Bf16);
        // Only Hopper has the kernel that reads it.
        let widens = kv_dtype == KvDtype::Fp8 && device.target() == Target::Hopper;
        let tokens = opened.max_model_len.max(options.max_batch_tokens);
        let blocks = tokens.div_ceil(options.block_tokens);
        let room = || Widened::new(&stream, heads, options.block_tokens, blocks);
        let widened = widens.then(room).transpose()?;
        let shape = attention_shape(device, config, heads, widened.as_ref().map(Widened::shape));
        let units = rows + DecodePlan::units_of(sizes.rows, &heads) + MAX_GRAPH_ROWS;
        let items = DecodePlan::most_items(units, shape.workers);
        let slot = || Slot::new(device, config.layers(), rows);
        Ok(Self {
            revision: opened.revision(&revision(device, weight_dtype)),
            max_model_len: opened.max_model_len,
            eos_token_ids: opened.eos_token_ids.clone(),
            gemm: Gemm::new(device)?,
            frequencies: stream.buffer(&config.rope.frequencies)?,
            scratch: DecodeScratch::new(&stream, items, &heads)?,
            inputs: Inputs::new(device)?,
            packing: Packing::default(),
            activations: Activations::new(device, config, weight_dtype, &sizes)?,
            sampler: DeviceSampler::new(&stream, rows, config.vocab_size)?,
            scoring: Scoring::default(),
            results: Results::new(device, rows)?,
            slots: [slot()?, slot()?],
            flights: VecDeque::with_capacity(DEPTH),
            launched: 0,
            sampled: Vec::new(),
            graphs: HashMap::new(),
            warm: BTreeSet::new(),
            graph_bytes: 0,
            warm_up: WarmUp::default(),
            cache: None,
            kv_dtype,
            widened,
            config: config.clone(),
            member,
            shape,
            weights,
            stream,
        })
    }
}

/// Of steps of so many sequences and tokens.
fn sizes(sequences: usize, tokens: usize) -> Sizes {
    let padded = sequences.next_power_of_two();
    Sizes {
        rows: tokens.max(padded.min(MAX_GRAPH_ROWS)).max(1),
        logit_rows: padded.max(Scoring::ROWS),
    }
}

/// What, beside the checkpoint, the results depend on.
fn revision(device: &Device, weight_dtype: WeightDtype) -> Vec<u8> {
    let mut revision = b"cuda".to_vec();
    revision.extend(RESULT_REVISION.to_le_bytes());
    revision.extend(device.capability().0.to_le_bytes());
    if weight_dtype == WeightDtype::Fp8 {
        revision.extend(b"fp8");
    }
    revision
}

fn attention_shape(
    device: &Arc<Device>,
    config: &ModelConfig,
    heads: HeadShape,
    widened: Option<WidenedShape>,
) -> AttentionShape {
    let windows: BTreeSet<usize> = config.windows.iter().map(|w| w.unwrap_or(0)).collect();
    AttentionShape {
        heads,
        windows: windows.into_iter().collect(),
        workers: cuda::decode_workers(device, &heads),
        device: device.clone(),
        widened,
    }
}

/// What the library has products of e4m3 rows for.
fn check_fp8_products(device: &Device, c: &ModelConfig) -> Result<(), GpuLoadError> {
    let refuse = |text: String| Err(GpuLoadError::Unsupported(text));
    if device.target() != Target::Hopper {
        let (major, minor) = device.capability();
        return refuse(format!(
            "fp8 weights on compute capability {major}.{minor}: there are products for 9.0"
        ));
    }
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let widths = [
        ("hidden_size", c.hidden),
        ("intermediate_size, of each device,", c.ffn),
        ("query heads, of each device,", q),
        ("key/value heads, of each device,", kv),
    ];
    for (what, width) in widths {
        if !width.is_multiple_of(16) || width > cuda::MAX_WIDTH {
            return refuse(format!(
                "fp8 weights with {what} of {width} elements: multiples of 16 up to {}",
                cuda::MAX_WIDTH
            ));
        }
    }
    Ok(())
}

/// What there are kernels for.
fn supported(
    c: &ModelConfig,
    block_tokens: usize,
    kv_dtype: Option<KvDtype>,
) -> Result<HeadShape, GpuLoadError> {
    let heads = HeadShape { heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim };
    let refuse = |text: String| Err(GpuLoadError::Unsupported(text));
    if !matches!(c.head_dim, 64 | 128) {
        return refuse(format!(
            "heads of {} elements: there are kernels for 64 and 128",
            c.head_dim
        ));
    }
    if let Some(other) = kv_dtype.filter(|dtype| !matches!(dtype, KvDtype::Bf16 | KvDtype::Fp8)) {
        let text = format!("a KV cache of {}: there are kernels for bf16 and fp8", other.as_str());
        return refuse(text);
    }
    if heads.group() > 16 {
        return refuse(format!("{} query heads for a KV head: 16 at most", heads.group()));
    }
    if !matches!(block_tokens, 16 | 32 | 64) {
        return refuse(format!(
            "blocks of {block_tokens} tokens: there are kernels for 16, 32 and 64"
        ));
    }
    for (what, width) in [("hidden_size", c.hidden), ("intermediate_size", c.ffn)] {
        if !width.is_multiple_of(8) || width > cuda::MAX_WIDTH {
            return refuse(format!("{what} of {width}: multiples of 8 up to {}", cuda::MAX_WIDTH));
        }
    }
    if c.vocab_size > cuda::MAX_VOCAB {
        return refuse(format!("{} tokens: {} at most", c.vocab_size, cuda::MAX_VOCAB));
    }
    Ok(heads)
}
