//! Hidden states of the device against those of the CPU.

use std::iter::zip;

use baton_engine::model::LoadFormat;
use baton_engine::{Input, Sample, Step, StepChunk, Wanted};
use baton_proto::geometry::KvDtype;
use baton_proto::sampling::SamplingParams;

use crate::common::{Part, Runner, load};
use crate::support::{Gpu, device, devices};
use crate::{BASE, checkpoint, tokens};

/// Share of a vector by which bf16 activations change it.
const TOLERANCE: f64 = 0.03;

/// The sum over the hidden states from row `first` on.
fn by_cpu(dir: &tempfile::TempDir, tokens: &[u32], first: usize) -> Vec<f64> {
    let model = load(dir.path(), LoadFormat::Safetensors, 2, Some(KvDtype::Bf16));
    let mut run = Runner::new(model, 16, tokens.len(), 1);
    let part = Part { sequence: 0, tokens, start: 0, wanted: Wanted::Hidden(first) };
    let rows = run.step(&[part]);
    assert_eq!(rows.len(), tokens.len() - first);
    (0..BASE.hidden).map(|i| rows.iter().map(|row| f64::from(row[i])).sum()).collect()
}

fn assert_near(ours: &[f64], theirs: &[f64]) {
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    assert_eq!(ours.len(), theirs.len());
    let off = length(&mut zip(ours, theirs).map(|(x, y)| x - y));
    let off = off / length(&mut theirs.iter().copied());
    assert!(off < TOLERANCE, "off by {off} of its length");
}

fn chunk<'a>(tokens: &'a [u32], start: usize, blocks: &'a [u32]) -> StepChunk<'a> {
    StepChunk {
        input: Input::Tokens(tokens),
        start,
        blocks,
        prompt_logprobs: None,
        sample: None,
        pool_from: None,
    }
}

/// Three sequences over two steps, the second queued before the first is read: one is summed
/// whole, one has its last row pooled, and one samples beside them.
fn check(mut gpu: Gpu) {
    let dir = checkpoint(&BASE, None);
    let (mean, last, other) = (tokens(37, 101, 1), tokens(25, 101, 2), tokens(9, 101, 3));
    let blocks: Vec<_> = (0..3).map(|sequence| gpu.blocks(sequence)).collect();
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let sample = Sample { params: &params, prompt: &other, output: &[], pending: 0, allowed: None };
    let first = vec![
        chunk(&last[..24], 0, &blocks[1]),
        StepChunk { sample: Some(sample), ..chunk(&other, 0, &blocks[2]) },
        StepChunk { pool_from: Some(0), ..chunk(&mean[..20], 0, &blocks[0]) },
    ];
    let second = vec![
        StepChunk { pool_from: Some(0), ..chunk(&mean[20..], 20, &blocks[0]) },
        StepChunk { pool_from: Some(0), ..chunk(&last[24..], 24, &blocks[1]) },
    ];
    gpu.launch(&Step { chunks: first, watched: false });
    gpu.launch(&Step { chunks: second, watched: false });
    let (first, second) = (gpu.finish(), gpu.finish());
    assert!(first.sampled[1].is_some() && first.pooled[0].is_empty() && first.pooled[1].is_empty());
    let sum: Vec<f64> = zip(&first.pooled[2], &second.pooled[0]).map(|(x, y)| x + y).collect();
    assert_near(&sum, &by_cpu(&dir, &mean, 0));
    assert_near(&second.pooled[1], &by_cpu(&dir, &last, 24));
}

#[test]
fn hidden_states_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    check(Gpu::load(device, checkpoint(&BASE, None).path(), 16, 3));
}

#[test]
fn hidden_states_of_a_shared_model_are_those_of_the_cpu() {
    let Some(devices) = devices(2) else { return };
    check(Gpu::load_to(&devices, checkpoint(&BASE, None).path(), 16, 3).unwrap());
}
