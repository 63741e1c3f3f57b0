//! What the tests of a model share: a model with a KV cache, and where the fixtures are.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]
#![allow(unsafe_code, reason = "runs the model on a cache of its own")]

pub mod naive;
pub mod tiny;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use baton_engine::model::{LoadFormat, LoadOptions, Model};
use baton_engine::{Chunk, Forward, Wanted};
use baton_kernels::Dtype;
use baton_kernels::cpu::{KvLayout, KvStore};
use baton_proto::geometry::{KvDtype, KvGeometry};
use safetensors::SafeTensors;

/// Folders of `tests/golden` that hold a checkpoint and what transformers computes from it.
pub fn golden() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut found: Vec<_> = std::fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join("expected.safetensors").exists())
        .collect();
    found.sort();
    assert!(found.len() >= 14, "only {} fixtures in {}", found.len(), root.display());
    found
}

/// What transformers computes, in single precision and without a KV cache.
pub struct Expected {
    pub prompt: Vec<u32>,
    /// `[prompt, vocab]`
    pub logprobs: Vec<f32>,
    pub greedy: Vec<u32>,
}

impl Expected {
    pub fn read(dir: &Path) -> Self {
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = |name| {
            let ids = file.tensor(name).unwrap().data().as_chunks().0;
            ids.iter().map(|id| i64::from_le_bytes(*id) as u32).collect()
        };
        let logprobs = file.tensor("logprobs").unwrap().data().as_chunks().0;
        Self {
            prompt: ids("prompt"),
            logprobs: logprobs.iter().copied().map(f32::from_le_bytes).collect(),
            greedy: ids("greedy"),
        }
    }

    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.greedy.len()
    }
}

/// Loads a folder; `kv_dtype` none: that of the weights.
pub fn load(dir: &Path, format: LoadFormat, threads: usize, kv_dtype: Option<KvDtype>) -> Model {
    Model::load(LoadOptions {
        dir,
        format,
        threads,
        max_model_len: None,
        kv_dtype,
        on_progress: &mut |_| {},
    })
    .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

fn kv_store(geometry: &KvGeometry, blocks: usize) -> KvStore {
    let layout = KvLayout {
        layers: geometry.layers as usize,
        kv_heads: geometry.kv_heads as usize,
        head_dim: geometry.head_dim as usize,
        block_tokens: geometry.block_tokens as usize,
        dtype: match geometry.dtype {
            KvDtype::F32 => Dtype::F32,
            KvDtype::Bf16 => Dtype::Bf16,
            KvDtype::F16 => Dtype::F16,
            KvDtype::Fp8 => unreachable!("the CPU has none"),
        },
    };
    KvStore::new(layout, blocks)
}

/// A model with room for some sequences.
pub struct Runner {
    pub model: Model,
    pub kv: KvStore,
    pub block_tokens: usize,
    pub blocks_per_sequence: usize,
    /// Sequence `i` has blocks `i, i + sequences, ...`, so that no sequence's blocks adjoin.
    pub sequences: usize,
}

/// A part of sequence `sequence` to run.
pub struct Part<'a> {
    pub sequence: usize,
    pub tokens: &'a [u32],
    pub start: usize,
    pub wanted: Wanted,
}

impl Runner {
    pub fn new(model: Model, block_tokens: usize, tokens: usize, sequences: usize) -> Self {
        let blocks_per_sequence = tokens.div_ceil(block_tokens);
        let kv = kv_store(&model.geometry(block_tokens as u32), blocks_per_sequence * sequences);
        Self { model, kv, block_tokens, blocks_per_sequence, sequences }
    }

    pub fn vocab(&self) -> usize {
        self.model.vocab_size()
    }

    fn blocks(&self, sequence: usize) -> Vec<u32> {
        (0..self.blocks_per_sequence).map(|i| (i * self.sequences + sequence) as u32).collect()
    }

    /// Runs one step; the wanted rows' logits or hidden states, in order.
    pub fn step(&mut self, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
        let blocks: Vec<_> = parts.iter().map(|part| self.blocks(part.sequence)).collect();
        let chunks: Vec<_> = std::iter::zip(parts, &blocks)
            .map(|(part, blocks)| Chunk {
                tokens: part.tokens,
                start: part.start,
                blocks,
                wanted: part.wanted,
            })
            .collect();
        let (mut layers, mut rows) = (Vec::new(), Vec::new());
        let mut keep = |row: usize, logits: &mut [f32]| {
            assert_eq!(row, rows.len());
            rows.push(logits.to_vec());
        };
        let mut note = |layer: usize| {
            layers.push(layer);
            ControlFlow::Continue(())
        };
        // SAFETY: nobody else has the cache, and every part is of its own sequence.
        let done = unsafe { self.model.forward(&chunks, &self.kv, &mut note, &mut keep) };
        assert!(done.is_continue());
        assert!(layers.into_iter().eq(0..self.model.config().layers()), "every layer once");
        rows
    }

    /// Runs a whole sequence in chunks of `sizes`; the logits of every token.
    pub fn all_logits(
        &mut self,
        tokens: &[u32],
        sizes: &mut dyn FnMut() -> usize,
    ) -> Vec<Vec<f32>> {
        let (mut start, mut rows) = (0, Vec::new());
        while start < tokens.len() {
            let end = tokens.len().min(start + sizes());
            let part =
                Part { sequence: 0, tokens: &tokens[start..end], start, wanted: Wanted::All };
            rows.extend(self.step(&[part]));
            start = end;
        }
        rows
    }

    /// Runs `prompt`, then `count` steps of always taking the best token.
    pub fn greedy(&mut self, prompt: &[u32], count: usize) -> Vec<u32> {
        let (mut tokens, mut start) = (prompt.to_vec(), 0);
        for _ in 0..count {
            let part = Part { sequence: 0, tokens: &tokens[start..], start, wanted: Wanted::Last };
            let rows = self.step(&[part]);
            start = tokens.len();
            tokens.push(best(&rows[0]));
        }
        tokens.split_off(prompt.len())
    }
}

/// Index of the largest.
pub fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

/// `log softmax`, in double precision.
pub fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    logits.iter().map(|x| f64::from(x - most) - sum.ln()).collect()
}

/// The bit patterns, for comparison without tolerance.
pub fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// A small generator of numbers for tests, the same on every run.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, most: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }

    /// Roughly normal, of variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| self.below(1 << 20) as f32 / (1 << 20) as f32).sum();
        sum - 6.0
    }
}
