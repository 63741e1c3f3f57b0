//! Embeddings of every fixture of `tests/golden` against what transformers computes from it.
//!
//! The fixtures hold log-probabilities, which are the output layer times the hidden states after
//! the last norm, but for a constant of each row. The output layer has more rows than columns, so
//! no other hidden states would give the same.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use baton_engine::model::LoadFormat;
use baton_engine::{Engine, EngineConfig, EngineEvent, HostExecutor, Kind, Submission};
use baton_proto::embedding::Pooling;
use baton_proto::geometry::KvDtype;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::Job;
use baton_proto::sampling::SamplingParams;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use common::{golden, load};

const TOLERANCE: f64 = 2e-3;
/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

struct Node {
    engine: Engine,
    events: Receiver<EngineEvent>,
    jobs: u128,
}

impl Node {
    fn start(dir: &Path, max_batch_tokens: usize) -> Self {
        let config = EngineConfig {
            block_tokens: 16,
            kv_blocks: 40,
            max_batch_tokens,
            max_sequences: 4,
            max_waiting: 16,
        };
        let model = load(dir, LoadFormat::Safetensors, 2, Some(KvDtype::F32));
        let (sink, events) = channel();
        let sink = Box::new(move |event| drop(sink.send(event)));
        let engine = Engine::start(config, Box::new(HostExecutor::new(model)), None, sink);
        Self { engine, events, jobs: 0 }
    }

    fn submit(&mut self, tokens: &[u32], kind: Kind) -> TransferId {
        self.jobs += 1;
        let id = TransferId { request: RequestId(self.jobs), attempt: 1 };
        let sampling = SamplingParams { max_tokens: 20, ..SamplingParams::default() };
        let job = Job {
            id,
            tokens: tokens.into(),
            prompt_tokens: tokens.len(),
            sampling,
            salt: CacheSalt::default(),
            deadline: None,
            trace: None,
        };
        self.engine.submit(Submission { job, kind, held: false }).unwrap();
        id
    }

    /// The embedding of a job, and how many of its tokens were cached.
    fn embedding(&mut self, tokens: &[u32], pooling: Pooling) -> (Vec<f32>, u32) {
        let own = self.submit(tokens, Kind::Embed(pooling));
        let (mut found, mut cached) = (None, 0);
        loop {
            match self.events.recv_timeout(PATIENCE).unwrap() {
                EngineEvent::Admitted { id, cached_tokens, .. } if id == own => {
                    cached = cached_tokens;
                }
                EngineEvent::Embedded { id, values, .. } if id == own => found = Some(values),
                EngineEvent::Ended { id } if id == own => return (found.unwrap(), cached),
                EngineEvent::Failed { id, reason, .. } => panic!("{id} failed: {reason}"),
                _ => {}
            }
        }
    }
}

/// What transformers computes: the prompt, and `[prompt, vocab]` log-probabilities.
fn expected(dir: &Path) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let prompt = file.tensor("prompt").unwrap().data().as_chunks().0.iter();
    let logprobs = file.tensor("logprobs").unwrap().data().as_chunks().0.iter();
    let prompt = prompt.map(|id| i64::from_le_bytes(*id) as u32).collect();
    (prompt, logprobs.copied().map(f32::from_le_bytes).collect())
}

/// `[vocab, hidden]`: the output layer, which may be the table of token embeddings.
fn output_layer(dir: &Path) -> Vec<f64> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let weights: Vec<_> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .filter(|path| path.file_name().unwrap() != "expected.safetensors")
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let files: Vec<_> =
        weights.iter().map(|file| SafeTensors::deserialize(file).unwrap()).collect();
    let named = |name: &str| files.iter().find_map(|file| file.tensor(name).ok());
    let tensor = named("lm_head.weight").or_else(|| named("model.embed_tokens.weight")).unwrap();
    let data = tensor.data();
    let halves = || data.as_chunks().0.iter().copied();
    match tensor.dtype() {
        Dtype::F32 => {
            data.as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect()
        }
        Dtype::BF16 => halves().map(|bytes| bf16::from_le_bytes(bytes).to_f64()).collect(),
        Dtype::F16 => halves().map(|bytes| f16::from_le_bytes(bytes).to_f64()).collect(),
        other => panic!("{other:?}"),
    }
}

/// The same without what is common to all.
fn centred(values: impl ExactSizeIterator<Item = f64> + Clone) -> Vec<f64> {
    let mean = values.clone().sum::<f64>() / values.len() as f64;
    values.map(|value| value - mean).collect()
}

fn score(layer: &[f64], hidden: &[f32]) -> Vec<f64> {
    let row = |row: &[f64]| row.iter().zip(hidden).map(|(w, x)| w * f64::from(*x)).sum();
    let rows: Vec<f64> = layer.chunks(hidden.len()).map(row).collect();
    centred(rows.into_iter())
}

fn worst(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f64::max)
}

#[test]
fn embeddings_are_what_transformers_scores() {
    for dir in golden() {
        let (prompt, logprobs) = expected(&dir);
        let layer = output_layer(&dir);
        let rows: Vec<&[f32]> = logprobs.chunks(logprobs.len() / prompt.len()).collect();
        let mut node = Node::start(&dir, 64);
        for length in [1, 2, 17, prompt.len()] {
            let theirs = centred(rows[length - 1].iter().map(|x| f64::from(*x)));
            let (last, _) = node.embedding(&prompt[..length], Pooling::Last);
            let off = worst(&score(&layer, &last), &theirs);
            assert!(off < TOLERANCE, "{}: {length} tokens, off by {off}", dir.display());

            let columns = (0..rows[0].len()).map(|token| {
                rows[..length].iter().map(|row| f64::from(row[token])).sum::<f64>() / length as f64
            });
            let (mean, _) = node.embedding(&prompt[..length], Pooling::Mean);
            let off = worst(&score(&layer, &mean), &centred(columns));
            assert!(off < TOLERANCE, "{}: mean of {length}, off by {off}", dir.display());
            assert_eq!(last == mean, length == 1);
        }
    }
}

#[test]
fn the_same_bits_however_cut_beside_whatever_and_from_the_cache() {
    for dir in golden() {
        let (prompt, _) = expected(&dir);
        let whole = |pooling| Node::start(&dir, 512).embedding(&prompt, pooling).0;
        let (last, mean) = (whole(Pooling::Last), whole(Pooling::Mean));
        let mut node = Node::start(&dir, 7);
        assert_eq!(node.embedding(&prompt, Pooling::Mean), (mean.clone(), 0), "in chunks");
        let cached = (prompt.len() - 1) / 16 * 16;
        assert_eq!(node.embedding(&prompt, Pooling::Last), (last.clone(), cached as u32), "cached");
        assert_eq!(node.embedding(&prompt, Pooling::Mean), (mean.clone(), 0), "reads no cache");
        let mut node = Node::start(&dir, 13);
        for other in 1..3 {
            node.submit(&prompt[other..], Kind::Local);
        }
        assert_eq!(node.embedding(&prompt, Pooling::Last).0, last, "beside others");
        assert_eq!(node.embedding(&prompt, Pooling::Mean).0, mean, "beside others");
    }
}
