//! e4m3 weights and e4m3 caches, against the naive model that rounds where the device does.

use baton_engine::gpu::{GpuLoadError, WeightDtype};
use baton_proto::geometry::KvDtype;
use baton_proto::hash::ModelRoot;

use crate::common::log_probabilities;
use crate::common::naive::{Naive, Rounding};
use crate::common::tiny::Shape;
use crate::serving::{Node, alone, hand_over};
use crate::support::{Asked, Gpu, Types, device, devices};
use crate::{BASE, TOLERANCE, assert_close, checkpoint, distance, tensors_of, tokens};

const WEIGHTS: Types = Types { weights: WeightDtype::Fp8, kv: None };
const KV: Types = Types { weights: WeightDtype::Bf16, kv: Some(KvDtype::Fp8) };
pub(crate) const BOTH: Types = Types { weights: WeightDtype::Fp8, kv: Some(KvDtype::Fp8) };

/// Something of everything, in whole units of 16 elements for each of two devices.
const WIDE: Shape = Shape { heads: 8, kv_heads: 4, biases: true, ..BASE };

fn rounding(types: Types) -> Rounding {
    Rounding {
        bf16: true,
        fp8_weights: types.weights == WeightDtype::Fp8,
        fp8_kv: types.kv == Some(KvDtype::Fp8),
    }
}

fn logprobs(logits: &[f64]) -> Vec<f64> {
    log_probabilities(&logits.iter().map(|x| *x as f32).collect::<Vec<_>>())
}

/// By position from 1 on: the log-probability of the token there.
fn naive(shape: &Shape, rounding: Rounding, tokens: &[u32]) -> Vec<f64> {
    let tensors = tensors_of(shape);
    let rows = Naive::rounded(shape, &tensors, rounding).logits(tokens);
    let next = rows.iter().zip(&tokens[1..]);
    next.map(|(row, token)| logprobs(row)[*token as usize]).collect()
}

/// They are within the tolerance of bf16 of who rounds too, and nearer to that than to who does not.
/// Not much nearer: what differs by the last bit of a bf16 number may be rounded to another e4m3
/// number, a 16th of it away; with every layer that happens to more of them.
fn check(ours: &[f32], shape: &Shape, types: Types, tokens: &[u32]) {
    let theirs = naive(shape, rounding(types), tokens);
    assert_close(ours, &theirs);
    let plain = naive(shape, Rounding { bf16: true, ..Rounding::default() }, tokens);
    let (near, far) = (distance(ours, &theirs).0, distance(ours, &plain).0);
    println!("{types:?}: {near:.4} from who rounds, {far:.4} from who does not");
    assert!(far > 1.5 * near, "{types:?}: {near} from who rounds, {far} from who does not");
}

/// Panics unless each of `output` is, to who rounds too, about as likely as the likeliest token
/// there.
fn assert_greedy(shape: &Shape, types: Types, prompt: &[u32], output: &[u32]) {
    let tensors = tensors_of(shape);
    let model = Naive::rounded(shape, &tensors, rounding(types));
    let rows = model.logits(&[prompt, output].concat());
    for (row, token) in rows[prompt.len() - 1..].iter().zip(output) {
        let found = logprobs(row);
        let best = found.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let off = best - found[*token as usize];
        assert!(off < 2.0 * TOLERANCE, "{token} is less likely than others by {off}");
    }
}

#[test]
fn log_probabilities_are_those_of_who_rounds_too() {
    let Some(device) = device() else { return };
    let one = Shape { layers: 1, ..BASE };
    let shapes = [
        (one, 16, WEIGHTS),
        (one, 16, KV),
        (Shape { qwen3: true, tied: true, vocab: 64, ..one }, 32, BOTH),
        (Shape { biases: true, heads: 6, kv_heads: 1, head_dim: 128, ..one }, 64, BOTH),
    ];
    for (shape, block_tokens, types) in shapes {
        let dir = checkpoint(&shape, None);
        let tokens = tokens(70, shape.vocab, 3);
        // By the kernel for long chunks, and for short ones.
        for chunk in [70, 9] {
            let devices = std::slice::from_ref(device);
            let mut gpu = Gpu::load_as(devices, dir.path(), block_tokens, 1, types).unwrap();
            check(&gpu.prompt_logprobs(&tokens, chunk), &shape, types, &tokens);
        }
    }
}

/// Each scales the parts of rows that it has, so it rounds otherwise than one that has all of them,
/// but not worse.
#[test]
fn devices_share_fp8_weights_and_caches() {
    let Some(devices) = devices(2) else { return };
    let (dir, tokens) = (checkpoint(&WIDE, None), tokens(50, WIDE.vocab, 3));
    let mut gpus = Gpu::load_as(&devices, dir.path(), 16, 1, BOTH).unwrap();
    let ours = gpus.prompt_logprobs(&tokens, 40);
    assert_close(&ours, &naive(&WIDE, rounding(BOTH), &tokens));
}

/// More blocks than are widened at once, and steps that are graphs.
#[test]
fn sequences_beside_each_other_go_on_as_alone() {
    let Some(device) = device() else { return };
    let dir = checkpoint(&BASE, None);
    let prompts = [tokens(70, 101, 1), tokens(50, 101, 2), tokens(3, 101, 3)];
    let asked: Vec<_> = prompts.iter().map(|prompt| Asked::greedy(prompt)).collect();
    let devices = std::slice::from_ref(device);
    let mut gpu = Gpu::load_as(devices, dir.path(), 16, 3, BOTH).unwrap();
    let outputs = gpu.generate(&asked, 7, true, false);
    for (prompt, output) in prompts.iter().zip(&outputs) {
        assert_greedy(&BASE, BOTH, prompt, output);
    }
}

#[test]
fn sequences_go_on_on_another_node_and_on_other_devices() {
    let shape = Shape { biases: false, ..WIDE };
    let dir = checkpoint(&shape, None);
    for (ranks, types) in [([1, 1], BOTH), ([2, 1], KV), ([1, 2], KV)] {
        let start = |ranks| Node::start_as(dir.path(), ranks, types);
        let [Some(from), Some(to)] = ranks.map(start) else { return };
        let (job, output) = hand_over(&from, &to);
        if ranks[0] == ranks[1] {
            assert_eq!(output, alone(&from, &job), "the same steps");
        }
        assert_greedy(&shape, types, &job.tokens, &output);
    }
}

/// Nodes of unlike types have no block in common, as the roots of their blocks' names differ.
#[test]
fn types_are_part_of_what_a_model_is() {
    let Some(device) = device() else { return };
    let dir = checkpoint(&BASE, None);
    let model = |types| {
        let devices = std::slice::from_ref(device);
        let gpu = Gpu::load_as(devices, dir.path(), 16, 1, types).unwrap();
        let geometry = gpu.model().geometry(16);
        (ModelRoot::new(&gpu.model().revision(), &geometry), geometry.token_bytes())
    };
    let [plain, weights, kv, both] = [Types::default(), WEIGHTS, KV, BOTH].map(model);
    let roots = [plain.0, weights.0, kv.0, both.0];
    assert!((0..4).all(|i| (0..i).all(|j| roots[i] != roots[j])));
    assert_eq!((kv.1, both.1), (plain.1 / 2, weights.1 / 2));
}

#[test]
fn what_has_no_fp8_kernels_is_refused() {
    let Some(device) = device() else { return };
    let refused = |shape: &Shape, types| {
        let dir = checkpoint(shape, None);
        let devices = std::slice::from_ref(device);
        match Gpu::load_as(devices, dir.path(), 16, 1, types).err() {
            Some(GpuLoadError::Unsupported(reason)) => reason,
            other => panic!("{other:?}"),
        }
    };
    let odd = Shape { ffn: 104, ..BASE };
    assert_eq!(
        refused(&odd, WEIGHTS),
        "fp8 weights with intermediate_size, of each device, of 104 elements: multiples of 16 up \
         to 32768"
    );
    let half = Types { kv: Some(KvDtype::F16), ..Types::default() };
    assert_eq!(refused(&BASE, half), "a KV cache of f16: there are kernels for bf16 and fp8");
}
