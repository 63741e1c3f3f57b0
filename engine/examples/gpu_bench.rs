//! Speed of a model on a GPU, through the engine, as a node drives it:
//! `cargo run --release -p baton-engine --example gpu_bench -- [--json] [--fp8] [--cold] [FOLDER]`.
//!
//! Without a folder the model has the shape of Qwen3-8B and made-up weights. With `--fp8` weights and
//! KV cache are e4m3, and figures' names begin with `fp8.`. With `--cold` it ends with the first
//! token, and tells when that came. Prints, beside tokens
//! per second, what matters to the device: operations per second of prefill, and the bytes of
//! weights and KV cache that a decode step must read, per second.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use baton_engine::config::ModelConfig;
use baton_engine::gpu::{self, GpuModel, GpuOptions, WeightDtype};
use baton_engine::model::LoadFormat;
use baton_engine::{Engine, EngineConfig, EngineEvent, Kind, Submission};
use baton_kernels::cuda::Device;
use baton_proto::geometry::KvDtype;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::Job;
use baton_proto::sampling::SamplingParams;

type Failure = Box<dyn Error>;

const QWEN3_8B: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
 "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
 "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
 "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
 "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

const BLOCK_TOKENS: usize = 64;
/// Tokens of the prompt whose prefill is measured.
const PROMPT: usize = 8192;
/// Tokens before a decode, and those that it generates.
const CONTEXT: usize = 4096;
const OUTPUT: usize = 512;
const BATCHES: [usize; 4] = [1, 8, 32, MAX_BATCH];
const MAX_BATCH: usize = 64;
/// As a node allows for.
const WARM_UP: Duration = Duration::from_secs(10);
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Failure> {
    let began = Instant::now();
    let (flags, folders): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let has = |flag: &str| flags.iter().any(|given| given == flag);
    let (json, fp8, cold) = (has("--json"), has("--fp8"), has("--cold"));
    let device = match gpu::open(0, &[]) {
        Ok(device) => device,
        Err(reason) => {
            println!("no device to measure: {reason}");
            return Ok(());
        }
    };
    let model = match folders.first() {
        Some(folder) => load(&device, Path::new(folder), LoadFormat::Safetensors, fp8)?,
        None => made_up(&device, fp8)?,
    };
    let warm_up = model.warm_up().took.as_secs_f64();
    let mut bench = Bench::start(model, json, fp8)?;
    if cold {
        bench.say("cold_start.load", began.elapsed().as_secs_f64(), "s");
        bench.say("cold_start.warm_up", warm_up, "s");
        bench.run(&[0], 1, 1)?;
        bench.say("cold_start", began.elapsed().as_secs_f64(), "s");
        return Ok(());
    }
    bench.prefill()?;
    BATCHES.iter().try_for_each(|&batch| bench.decode(batch))
}

fn made_up(device: &Arc<Device>, fp8: bool) -> Result<GpuModel, Failure> {
    let dir: PathBuf = std::env::temp_dir().join(format!("baton-gpu-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("config.json"), QWEN3_8B)?;
    let model = load(device, &dir, LoadFormat::Dummy { seed: 0 }, fp8);
    std::fs::remove_dir_all(&dir)?;
    model
}

fn load(
    device: &Arc<Device>,
    dir: &Path,
    format: LoadFormat,
    fp8: bool,
) -> Result<GpuModel, Failure> {
    let options = GpuOptions {
        dir,
        format,
        threads: std::thread::available_parallelism()?.get(),
        max_model_len: None,
        weight_dtype: if fp8 { WeightDtype::Fp8 } else { WeightDtype::Bf16 },
        kv_dtype: fp8.then_some(KvDtype::Fp8),
        block_tokens: BLOCK_TOKENS,
        max_batch_tokens: PROMPT,
        max_sequences: MAX_BATCH,
        warm_up: WARM_UP,
        on_progress: &mut |_| {},
    };
    Ok(GpuModel::load(device, options)?)
}

/// What a model's shape asks of a device.
struct Work {
    /// Matrix elements that every token is multiplied with, but for those that give its logits.
    elements: f64,
    /// Operations of attention per pair of a query and a key, in all layers.
    pair_operations: f64,
    kv_token_bytes: f64,
    /// Of the weights that a step reads.
    weight_bytes: f64,
}

impl Work {
    fn of(c: &ModelConfig, fp8: bool) -> Self {
        let element_bytes = if fp8 { 1.0 } else { 2.0 };
        let (hidden, layers) = (c.hidden as f64, c.layers() as f64);
        let (q, kv) = ((c.heads * c.head_dim) as f64, (c.kv_heads * c.head_dim) as f64);
        let elements = layers * hidden * (2.0 * q + 2.0 * kv + 3.0 * c.ffn as f64);
        Self {
            elements,
            pair_operations: layers * 4.0 * q,
            kv_token_bytes: layers * 2.0 * kv * element_bytes,
            weight_bytes: element_bytes * elements + 2.0 * c.vocab_size as f64 * hidden,
        }
    }
}

struct Bench {
    engine: Engine,
    events: Receiver<EngineEvent>,
    work: Work,
    vocab: u32,
    jobs: u128,
    json: bool,
    fp8: bool,
}

impl Bench {
    fn start(model: GpuModel, json: bool, fp8: bool) -> Result<Self, Failure> {
        let work = Work::of(model.config(), fp8);
        let vocab = model.config().vocab_size as u32;
        let block_bytes = work.kv_token_bytes as usize * BLOCK_TOKENS;
        let wanted = MAX_BATCH * (CONTEXT + OUTPUT + BLOCK_TOKENS) / BLOCK_TOKENS;
        let config = EngineConfig {
            block_tokens: BLOCK_TOKENS,
            kv_blocks: wanted.min(model.free_bytes()? / 10 * 9 / block_bytes),
            max_batch_tokens: PROMPT,
            max_sequences: MAX_BATCH,
            max_waiting: MAX_BATCH,
        };
        let (sink, events) = channel();
        let sink = Box::new(move |event| drop(sink.send(event)));
        let engine = Engine::start(config, Box::new(model), None, sink);
        Ok(Self { engine, events, work, vocab, jobs: 0, json, fp8 })
    }

    fn say(&self, name: &str, value: f64, unit: &str) {
        let name = &if self.fp8 { format!("fp8.{name}") } else { name.to_owned() };
        if self.json {
            println!(r#"{{"name": "{name}", "value": {value:.4}, "unit": "{unit}"}}"#);
        } else {
            println!("{name:<28} {value:>12.2} {unit}");
        }
    }

    /// Runs a job per seed; returns the times of each job's tokens.
    fn run(
        &mut self,
        seeds: &[u32],
        prompt: usize,
        output: usize,
    ) -> Result<Vec<Vec<Instant>>, Failure> {
        let first = self.jobs + 1;
        for seed in seeds {
            let tokens = (0..prompt as u32).map(|at| mix(*seed, at) % self.vocab).collect();
            let max_tokens = output as u32;
            let sampling =
                SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() };
            self.jobs += 1;
            let job = Job {
                id: TransferId { request: RequestId(self.jobs), attempt: 1 },
                tokens,
                prompt_tokens: prompt,
                sampling,
                salt: CacheSalt::default(),
                deadline: None,
                trace: None,
            };
            self.engine.submit(Submission { job, kind: Kind::Local, held: false })?;
        }
        let mut times = vec![Vec::with_capacity(output); seeds.len()];
        let mut ended = 0;
        while ended < seeds.len() {
            match self.events.recv_timeout(PATIENCE)? {
                EngineEvent::Tokens(tokens) => {
                    let now = Instant::now();
                    for token in tokens {
                        times[(token.id.request.0 - first) as usize].push(now);
                    }
                }
                EngineEvent::Ended { .. } => ended += 1,
                EngineEvent::Failed { reason, .. } => return Err(reason.into()),
                _ => {}
            }
        }
        Ok(times)
    }

    /// Time to first token of a prompt, the best of a few.
    fn prefill(&mut self) -> Result<(), Failure> {
        let mut best = f64::INFINITY;
        for seed in 1..=4 {
            let began = Instant::now();
            let times = self.run(&[seed], PROMPT, 1)?;
            best = best.min((times[0][0] - began).as_secs_f64());
        }
        let (length, pairs) = (PROMPT as f64, (PROMPT * (PROMPT + 1) / 2) as f64);
        let operations = 2.0 * self.work.elements * length + self.work.pair_operations * pairs;
        self.say(&format!("prefill.{PROMPT}.tokens"), length / best, "token/s");
        self.say(&format!("prefill.{PROMPT}.tflops"), operations / best / 1e12, "TFLOP/s");
        Ok(())
    }

    /// Tokens per second while all of a batch generate.
    fn decode(&mut self, batch: usize) -> Result<(), Failure> {
        let seeds: Vec<u32> = (0..batch as u32).map(|seed| 1000 * batch as u32 + seed).collect();
        let times = self.run(&seeds, CONTEXT, OUTPUT)?;
        let began = times.iter().filter_map(|times| times.first()).max().ok_or("no tokens")?;
        let ended = times.iter().filter_map(|times| times.last()).min().ok_or("no tokens")?;
        let steps = times[0].iter().filter(|&time| began < time && time <= ended).count();
        if steps == 0 {
            return Err(format!("{batch} sequences do not fit beside each other").into());
        }
        let step = (*ended - *began).as_secs_f64() / steps as f64;
        // The first sequence has read so many on average.
        let context = (CONTEXT + OUTPUT - steps / 2) as f64;
        let bytes = self.work.weight_bytes + batch as f64 * context * self.work.kv_token_bytes;
        self.say(&format!("decode.{batch}.tokens"), batch as f64 / step, "token/s");
        self.say(&format!("decode.{batch}.step"), 1e3 * step, "ms");
        self.say(&format!("decode.{batch}.bandwidth"), bytes / step / 1e9, "GB/s");
        Ok(())
    }
}

/// Numbers without a pattern, so that prompts share no prefix.
fn mix(seed: u32, at: u32) -> u32 {
    let mut z = ((u64::from(seed) << 32) | u64::from(at)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((z ^ (z >> 31)) >> 32) as u32
}
