//! The model on a GPU, real or emulated, against the model on the CPU.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "gpu/embedding.rs"]
mod embedding;
#[path = "gpu/fp8.rs"]
mod fp8;
#[path = "gpu/parallel.rs"]
mod parallel;
#[path = "gpu/serving.rs"]
mod serving;
#[path = "gpu/support.rs"]
mod support;
#[path = "gpu/waits.rs"]
mod waits;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use baton_engine::Wanted;
use baton_engine::gpu::{GpuModel, GpuOptions, WarmUp};
use baton_engine::model::LoadFormat;
use baton_kernels::cuda::testing;
use baton_proto::geometry::KvDtype;
use safetensors::Dtype;
use serde_json::json;

use common::tiny::{PLAIN, Shape, Tensors, write_config, write_typed};
use common::{Expected, Numbers, Part, Runner, load, log_probabilities};
use support::{Asked, Gpu, Types, device};

/// Log-probabilities of bf16 activations differ from those of single precision by so much.
const TOLERANCE: f64 = 0.15;
const MEAN_TOLERANCE: f64 = 0.03;

/// More time than preparing takes.
const AMPLE: Duration = Duration::from_secs(3600);

const BASE: Shape = Shape { hidden: 64, ffn: 96, head_dim: 64, vocab: 101, ..PLAIN };

/// A bf16 checkpoint with layers that see `window` tokens, if any.
fn checkpoint(shape: &Shape, window: Option<usize>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config = shape.config();
    if let Some(window) = window {
        config["model_type"] = json!("mistral");
        config["architectures"] = json!(["MistralForCausalLM"]);
        config["sliding_window"] = json!(window);
        for key in ["attention_bias", "mlp_bias"] {
            config.as_object_mut().unwrap().remove(key);
        }
    }
    write_config(dir.path(), &config);
    let file = dir.path().join("model.safetensors");
    write_typed(&file, &tensors_of(shape), |_| Dtype::BF16);
    dir
}

fn tensors_of(shape: &Shape) -> Tensors {
    let mut tensors = shape.tensors(7);
    for (_, (shape, values)) in
        tensors.iter_mut().filter(|(name, _)| name.ends_with("_proj.weight"))
    {
        // As in trained models, activations keep their size; else rounding errors grow without end.
        let scale = 1.0 / (0.3 * (shape[1] as f32).sqrt());
        values.iter_mut().for_each(|value| *value *= scale);
    }
    tensors
}

fn tokens(count: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut numbers = Numbers(seed);
    (0..count).map(|_| numbers.below(vocab) as u32).collect()
}

/// By position from 1 on: the log-probability of the token there.
fn by_cpu(dir: &Path, tokens: &[u32]) -> Vec<f64> {
    let model = load(dir, LoadFormat::Safetensors, 2, Some(KvDtype::Bf16));
    let mut run = Runner::new(model, 16, tokens.len(), 1);
    let part = Part { sequence: 0, tokens, start: 0, wanted: Wanted::All };
    let rows = run.step(&[part]);
    let next = rows.iter().zip(&tokens[1..]);
    next.map(|(row, token)| log_probabilities(row)[*token as usize]).collect()
}

/// Panics unless each of `output` is, to the CPU, about as likely as the likeliest token there.
fn assert_greedy(dir: &tempfile::TempDir, prompt: &[u32], output: &[u32]) {
    let model = load(dir.path(), LoadFormat::Safetensors, 2, Some(KvDtype::Bf16));
    let all = [prompt, output].concat();
    let mut run = Runner::new(model, 16, all.len(), 1);
    let part = Part { sequence: 0, tokens: &all, start: 0, wanted: Wanted::All };
    let rows = run.step(&[part]);
    for (i, token) in output.iter().enumerate() {
        let logprobs = log_probabilities(&rows[prompt.len() - 1 + i]);
        let best = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let off = best - logprobs[*token as usize];
        assert!(off < 2.0 * TOLERANCE, "output {i} is {token}, less likely than others by {off}");
    }
}

#[test]
fn greedy_tokens_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    let dir = checkpoint(&BASE, None);
    let prompts = [tokens(37, 101, 1), tokens(5, 101, 2), tokens(16, 101, 3)];
    let asked: Vec<_> = prompts.iter().map(|prompt| Asked::greedy(prompt)).collect();
    let outputs = Gpu::load(device, dir.path(), 16, 3).generate(&asked, 9, true, false);
    for (prompt, output) in prompts.iter().zip(&outputs) {
        assert_greedy(&dir, prompt, output);
    }
}

#[test]
fn steps_queued_ahead_and_graphs_change_no_token() {
    let Some(device) = device() else { return };
    let dir = checkpoint(&Shape { qwen3: true, ..BASE }, None);
    let prompts = [tokens(19, 101, 1), tokens(6, 101, 2), tokens(1, 101, 3), tokens(30, 101, 4)];
    // Numbers of rows that graphs need not pad, as matrix products of other sizes round differently.
    for sequences in [1, 2, 4] {
        let asked: Vec<_> = prompts[..sequences].iter().map(|p| Asked::sampled(p)).collect();
        let run = |ahead, watched| {
            Gpu::load(device, dir.path(), 16, sequences).generate(&asked, 8, ahead, watched)
        };
        let one_by_one = run(false, true);
        assert_eq!(run(true, true), one_by_one, "queued ahead");
        assert_eq!(run(false, false), one_by_one, "from graphs");
        assert_eq!(run(true, false), one_by_one, "from graphs, queued ahead");
        assert!(one_by_one.iter().all(|output| output.len() == 8));
    }
}

/// The numbers of a step move to other memory when they need more room.
#[test]
fn graphs_follow_their_inputs_to_another_place() {
    let Some(device) = device() else { return };
    let dir = checkpoint(&BASE, None);
    let prompts = [tokens(19, 101, 1), tokens(6, 101, 2)];
    let few: Vec<_> = prompts.iter().map(|prompt| Asked::greedy(prompt)).collect();
    let many: Vec<_> = prompts.iter().map(|prompt| Asked::biased(prompt, 5000)).collect();
    let mut gpu = Gpu::load(device, dir.path(), 16, 2);
    let before = gpu.generate(&few, 5, true, false);
    assert_eq!(gpu.generate(&many, 5, true, false), before, "biases of 0 change nothing");
    assert_eq!(gpu.generate(&few, 5, true, false), before);
}

/// With time to prepare a model has its graphs and its algorithms before it is asked for anything.
#[test]
fn a_prepared_model_computes_the_same() {
    let Some(device) = device() else { return };
    let dir = checkpoint(&Shape { qwen3: true, ..BASE }, None);
    let prompts = [tokens(37, 101, 1), tokens(5, 101, 2), tokens(16, 101, 3)];
    let asked: Vec<_> = prompts.iter().map(|prompt| Asked::greedy(prompt)).collect();
    let mut gpu =
        Gpu::load_within(std::slice::from_ref(device), dir.path(), (16, 3), AMPLE).unwrap();
    let outputs = gpu.generate(&asked, 6, true, false);
    for (prompt, output) in prompts.iter().zip(&outputs) {
        assert_greedy(&dir, prompt, output);
    }
}

#[test]
fn preparing_captures_steps_of_all_sizes() {
    let Some(device) = device() else { return };
    let dir = checkpoint(&BASE, None);
    let load = |types: Types, warm_up| {
        let options = GpuOptions {
            dir: dir.path(),
            format: LoadFormat::Safetensors,
            threads: 1,
            max_model_len: None,
            weight_dtype: types.weights,
            kv_dtype: types.kv,
            block_tokens: 16,
            max_batch_tokens: 8,
            max_sequences: 3,
            warm_up,
            on_progress: &mut |_| {},
        };
        GpuModel::load(device, options).unwrap()
    };
    for types in [Types::default(), fp8::BOTH] {
        let ready = load(types, AMPLE);
        // Of 1, 2 and 4 rows; a layer's four products, and logits, of each, and four of 8 rows.
        assert_eq!((ready.warm_up().graphs, ready.warm_up().tuned.len()), (3, 3 * 5 + 4));
        assert!(ready.free_bytes().unwrap() > 0);
    }
    assert_eq!(load(Types::default(), Duration::ZERO).warm_up(), &WarmUp::default());
}

#[test]
fn models_without_kernels_are_refused() {
    let Some(device) = device() else { return };
    let cases = [
        (
            Shape { head_dim: 32, ..BASE },
            16,
            "heads of 32 elements: there are kernels for 64 and 128",
        ),
        (BASE, 8, "blocks of 8 tokens: there are kernels for 16, 32 and 64"),
        (Shape { ffn: 77, ..BASE }, 16, "intermediate_size of 77: multiples of 8 up to 32768"),
    ];
    for (shape, block_tokens, reason) in cases {
        let dir = checkpoint(&shape, None);
        let refused = Gpu::try_load(device, dir.path(), block_tokens, 1).err();
        assert_eq!(refused.map(|error| error.to_string()).as_deref(), Some(reason));
    }
}

#[test]
fn log_probabilities_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    let shapes = [
        (BASE, None, 16),
        (Shape { qwen3: true, tied: true, vocab: 64, ..BASE }, None, 32),
        (Shape { biases: true, heads: 6, kv_heads: 1, head_dim: 128, ..BASE }, None, 64),
        (BASE, Some(20), 16),
    ];
    for (shape, window, block_tokens) in shapes {
        let dir = checkpoint(&shape, window);
        let tokens = tokens(70, shape.vocab, 3);
        let theirs = by_cpu(dir.path(), &tokens);
        for chunk in [70, 23] {
            let mut gpu = Gpu::load(device, dir.path(), block_tokens, 1);
            assert_close(&gpu.prompt_logprobs(&tokens, chunk), &theirs);
        }
    }
}

#[test]
fn trained_models_agree_too() {
    let Some(device) = device() else { return };
    let Some(dir) = carried("models/demo") else { return };
    let tokens = tokens(60, 2048, 9);
    let ours = Gpu::load(device, &dir, 32, 1).prompt_logprobs(&tokens, 40);
    assert_close(&ours, &by_cpu(&dir, &tokens));
}

/// With the one fixture whose heads have as many elements as there are kernels for.
#[test]
fn log_probabilities_are_those_of_transformers() {
    let Some(device) = device() else { return };
    let Some(dir) = carried("tests/golden/f16") else { return };
    let Expected { prompt, logprobs, .. } = Expected::read(&dir);
    let vocab = logprobs.len() / prompt.len();
    let rows = logprobs.chunks(vocab).zip(&prompt[1..]);
    let theirs: Vec<_> = rows.map(|(row, token)| f64::from(row[*token as usize])).collect();
    let ours = Gpu::load(device, &dir, 32, 1).prompt_logprobs(&prompt, 40);
    assert_close(&ours, &theirs);
}

/// A folder of the repository: below the folder that the tests run in, if they were carried to
/// another machine, else where they were built.
fn carried(folder: &str) -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let found = [PathBuf::from(folder), built].into_iter().find(|dir| dir.exists());
    if found.is_none() {
        println!("skipped: there is no {folder}");
    }
    found
}

/// On devices without Hopper's instructions the kernels for decoding compute prompts, too.
#[test]
fn older_devices_compute_the_same() {
    if testing::test_device().is_none_or(|device| device.emulator.is_none()) {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "greedy_tokens_are_those_of_the_cpu"]);
    command.args([
        "log_probabilities_are_those_of_the_cpu",
        "serving::jobs_of_all_lengths_are_served_together",
    ]);
    let output = command.env("BATON_EMULATOR_CAPABILITY", "80").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("3 passed"), "{text}");
}

#[track_caller]
fn assert_close(ours: &[f32], theirs: &[f64]) {
    let (mean, most) = distance(ours, theirs);
    assert!(mean < MEAN_TOLERANCE && most < TOLERANCE, "off by {mean:.3}, and {most:.2} at most");
}

/// By how much log-probabilities are off: on average, and at most.
fn distance(ours: &[f32], theirs: &[f64]) -> (f64, f64) {
    assert_eq!(ours.len(), theirs.len());
    let off = ours.iter().zip(theirs).map(|(ours, theirs)| {
        // What is very unlikely is known less well.
        (f64::from(*ours) - theirs).abs() / theirs.abs().max(1.0)
    });
    let off: Vec<f64> = off.collect();
    (off.iter().sum::<f64>() / off.len() as f64, off.iter().copied().fold(0.0, f64::max))
}
