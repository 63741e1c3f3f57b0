//! Loading the model to what computes it, with progress for people on standard error and for
//! systemd.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_engine::gpu::{
    self, GpuLoadError, GpuModel, GpuOptions, ParallelModel, Unavailable, WeightDtype,
};
use baton_engine::model::{LoadError, LoadFormat, LoadOptions, LoadProgress, Model};
use baton_engine::{EngineConfig, Executor, HostExecutor};
use baton_grammar::{Grammars, Vocabulary};

use crate::config::{self, Config, DeviceChoice, KvSize};
use crate::supervisor;

/// The seed of made-up weights: equal on all nodes, which then can exchange KV.
const DUMMY_SEED: u64 = 0;

/// How long a GPU may be prepared for its first steps, beside reading the weights: a node is to serve
/// within 30 s of its start.
const WARM_UP: Duration = Duration::from_secs(10);

/// Least time between two lines of progress.
const PROGRESS_PAUSE: Duration = Duration::from_millis(500);

/// What is ready to compute.
pub(crate) struct Loaded {
    pub(crate) executor: Box<dyn Executor>,
    pub(crate) engine: EngineConfig,
    pub(crate) grammars: Option<Arc<Grammars>>,
}

/// Why there is nothing to compute with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadFailure {
    #[error(transparent)]
    Model(#[from] LoadError),
    #[error(transparent)]
    Gpu(#[from] GpuLoadError),
    #[error("no GPU: {0}")]
    NoGpu(#[from] Unavailable),
    #[error("weight_dtype is fp8, which takes a GPU; a CPU multiplies as the checkpoint is")]
    Fp8Weights,
    #[error(
        "the KV cache of {needed} bytes is larger than the memory of {memory}; set kv_blocks or kv_memory lower"
    )]
    KvMemory { needed: u64, memory: u64 },
}

/// What depends on the device, where the configuration says nothing.
struct Defaults {
    max_batch_tokens: usize,
    max_sequences: usize,
    kv_size: KvSize,
}

const ON_CPU: Defaults =
    Defaults { max_batch_tokens: 512, max_sequences: 64, kv_size: KvSize::Bytes(1 << 30) };
const ON_GPU: Defaults =
    Defaults { max_batch_tokens: 8192, max_sequences: 256, kv_size: KvSize::Percent(90) };

/// Loads the configured model. Blocks for as long as that takes.
pub(crate) fn load(config: &Config) -> Result<Loaded, LoadFailure> {
    match &config.device {
        DeviceChoice::Cpu => on_cpu(config),
        DeviceChoice::Cuda(ordinals) => on_gpus(config, ordinals),
        DeviceChoice::Auto => match on_gpus(config, &[0]) {
            Err(LoadFailure::NoGpu(reason)) => {
                tracing::info!("computing on the CPU: {reason}");
                on_cpu(config)
            }
            Err(LoadFailure::Gpu(GpuLoadError::Unsupported(reason))) => {
                tracing::info!("computing on the CPU: the GPU has no kernels for {reason}");
                on_cpu(config)
            }
            other => other,
        },
    }
}

fn on_cpu(config: &Config) -> Result<Loaded, LoadFailure> {
    if config.weight_dtype == WeightDtype::Fp8 {
        return Err(LoadFailure::Fp8Weights);
    }
    let model = Model::load(LoadOptions {
        dir: &config.model,
        format: format(config),
        threads: config.threads,
        max_model_len: config.max_model_len,
        kv_dtype: config.kv_dtype,
        on_progress: &mut progress(),
    })?;
    let executor = Box::new(HostExecutor::new(model));
    let memory = machine_memory().unwrap_or(u64::MAX);
    loaded(config, &ON_CPU, executor, memory)
}

fn on_gpus(config: &Config, ordinals: &[usize]) -> Result<Loaded, LoadFailure> {
    let folders = config.cuda_libraries.as_slice();
    let open = |ordinal: &usize| gpu::open(*ordinal, folders);
    let devices = ordinals.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    tracing::info!("computing on {devices:?}");
    let options = GpuOptions {
        dir: &config.model,
        format: format(config),
        threads: config.threads,
        max_model_len: config.max_model_len,
        weight_dtype: config.weight_dtype,
        kv_dtype: config.kv_dtype,
        block_tokens: config.block_tokens as usize,
        max_batch_tokens: config.max_batch_tokens.unwrap_or(ON_GPU.max_batch_tokens),
        max_sequences: config.max_sequences.unwrap_or(ON_GPU.max_sequences),
        warm_up: WARM_UP,
        on_progress: &mut progress(),
    };
    let (free_bytes, executor): (_, Box<dyn Executor>) = if let [device] = &devices[..] {
        let model = GpuModel::load(device, options)?;
        tracing::info!("{}", model.warm_up());
        (model.free_bytes(), Box::new(model))
    } else {
        let model = ParallelModel::load(&devices, &gpu::find_nccl(folders)?, options)?;
        tracing::info!("{}", model.warm_up());
        (model.free_bytes(), Box::new(model))
    };
    let memory = free_bytes.map_err(GpuLoadError::from)? as u64;
    loaded(config, &ON_GPU, executor, memory)
}

fn loaded(
    config: &Config,
    defaults: &Defaults,
    executor: Box<dyn Executor>,
    memory: u64,
) -> Result<Loaded, LoadFailure> {
    let engine = engine_config(config, defaults, &*executor, memory)?;
    Ok(Loaded { engine, grammars: grammars(&config.model, executor.vocab_size()), executor })
}

/// Without a tokenizer everything is served but structured output.
fn grammars(model: &Path, vocab_size: usize) -> Option<Arc<Grammars>> {
    let read = std::fs::read_to_string(model.join("tokenizer.json"));
    let parsed = read.map_err(|error| format!("tokenizer.json: {error}"));
    let parsed = parsed.and_then(|text| Vocabulary::parse(&text).map_err(|e| e.to_string()));
    match parsed {
        Ok(vocabulary) => Some(Arc::new(Grammars::new(&vocabulary, vocab_size))),
        Err(reason) => {
            tracing::warn!("structured output is not served: {reason}");
            None
        }
    }
}

fn format(config: &Config) -> LoadFormat {
    match config.load_format {
        config::LoadFormat::Safetensors => LoadFormat::Safetensors,
        config::LoadFormat::Dummy => LoadFormat::Dummy { seed: DUMMY_SEED },
    }
}

fn engine_config(
    config: &Config,
    defaults: &Defaults,
    executor: &dyn Executor,
    memory: u64,
) -> Result<EngineConfig, LoadFailure> {
    let geometry = executor.geometry(config.block_tokens);
    let size = config.kv_size.unwrap_or(defaults.kv_size);
    let kv_blocks = size.blocks(geometry.block_bytes(), memory);
    let needed = (kv_blocks as u64).saturating_mul(geometry.block_bytes() as u64);
    if needed > memory {
        return Err(LoadFailure::KvMemory { needed, memory });
    }
    Ok(EngineConfig {
        block_tokens: config.block_tokens as usize,
        kv_blocks,
        max_batch_tokens: config.max_batch_tokens.unwrap_or(defaults.max_batch_tokens),
        max_sequences: config.max_sequences.unwrap_or(defaults.max_sequences),
        max_waiting: config.max_waiting,
    })
}

/// Bytes of memory, if the system says.
fn machine_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Writes a line now and then.
fn progress() -> impl FnMut(LoadProgress) {
    let begun = Instant::now();
    let mut shown = begun;
    move |LoadProgress { done_bytes, total_bytes }| {
        if done_bytes == total_bytes || shown.elapsed() >= PROGRESS_PAUSE {
            shown = Instant::now();
            let percent = percent(done_bytes, total_bytes);
            let line = line(percent, done_bytes, begun.elapsed());
            // Nobody may be reading.
            let _ = writeln!(std::io::stderr(), "{line}");
            supervisor::loading(percent);
        }
    }
}

fn percent(done: usize, total: usize) -> usize {
    (done as u128 * 100 / total.max(1) as u128) as usize
}

/// For example `loading 42 %, 1.25 GB/s`.
fn line(percent: usize, done_bytes: usize, elapsed: Duration) -> String {
    let speed = done_bytes as f64 / elapsed.as_secs_f64().max(1e-9) / 1e9;
    format!("loading {percent} %, {speed:.2} GB/s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_share_and_speed() {
        assert_eq!(percent(usize::MAX / 2, usize::MAX), 49);
        assert_eq!(percent(0, 0), 0);
        assert_eq!(line(50, 5 << 30, Duration::from_secs(2)), "loading 50 %, 2.68 GB/s");
    }
}
