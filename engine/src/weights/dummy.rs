//! Random weights for a configuration without a checkpoint: for benchmarks, and for tests of
//! everything but the text. The same seed gives the same weights on every machine.

use std::borrow::Cow;

use baton_kernels::Dtype;
use baton_kernels::cpu::ThreadPool;

use super::Tensor;
use super::expected::Expected;
use crate::config::ModelConfig;

/// Elements that a thread makes at a time.
const STRETCH: usize = 1 << 16;

/// A source of random weights.
pub(crate) struct Dummy {
    expected: Expected,
    dtype: Dtype,
    seed: u64,
}

impl Dummy {
    /// Weights in the type that `config` names, or else in single precision.
    pub(crate) fn new(config: &ModelConfig, seed: u64) -> Self {
        let dtype = config.dtype.unwrap_or(Dtype::F32);
        Self { expected: Expected::of(config), dtype, seed }
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(crate) fn shape(&self, name: &str) -> &[usize] {
        self.expected.shape(name).expect("only expected tensors are asked for")
    }

    pub(crate) fn identify(&self, hasher: &mut blake3::Hasher) {
        hasher.update(b"dummy").update(&self.seed.to_le_bytes()).update(&[self.dtype as u8]);
    }

    /// Matrices keep the size of what they multiply (variance 1 / inputs), norms are 1, biases
    /// are small.
    pub(crate) fn tensor(&self, pool: &ThreadPool, name: &str) -> Tensor<'static> {
        let shape = self.shape(name);
        let (centre, spread) = match shape {
            [_, inputs] => (0.0, (3.0 / *inputs as f32).sqrt()),
            _ if name.ends_with("bias") => (0.0, 0.1),
            _ => (1.0, 0.0),
        };
        let stream = stream(name, self.seed);
        let mut bytes = vec![0; shape.iter().product::<usize>() * self.dtype.bytes()];
        pool.for_each_chunk(&mut bytes, STRETCH * self.dtype.bytes(), &|i, bytes| {
            let mut values = vec![0.0; bytes.len() / self.dtype.bytes()];
            for (j, value) in values.iter_mut().enumerate() {
                *value = centre + spread * uniform(stream, (i * STRETCH + j) as u64);
            }
            self.dtype.narrow(&values, bytes);
        });
        Tensor { dtype: self.dtype, bytes: Cow::Owned(bytes) }
    }
}

/// Every tensor draws from a stream of its own.
fn stream(name: &str, seed: u64) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
    u64::from_le_bytes(*first) ^ seed
}

/// Uniform in [-1, 1): number `index` of `stream`, by the SplitMix64 finaliser.
fn uniform(stream: u64, index: u64) -> f32 {
    let mut z = stream.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as i64 as f32 / (1u64 << 63) as f32
}
