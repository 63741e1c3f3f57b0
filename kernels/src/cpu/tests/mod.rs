//! The operations against naive ones in double precision, and against themselves: bits must not
//! depend on batch, chunks, threads, block size or instruction set.

mod attention;
mod elementwise;
mod matmul;
mod pool;

use proptest::test_runner::Config;

use super::pool::ThreadPool;
use super::simd::Isa;
use crate::Dtype;

pub(super) const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

pub(super) fn cases(cases: u32) -> Config {
    Config { cases, failure_persistence: None, ..Config::default() }
}

/// Pools of each instruction set with 1, 2 and 3 threads.
pub(super) fn pools() -> Vec<ThreadPool> {
    let threads = |isa| (1..=3).map(move |threads| ThreadPool::with_isa(threads, isa));
    Isa::available().into_iter().flat_map(threads).collect()
}

/// Numbers in -1..1 that look random.
pub(super) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// `values` rounded to `dtype`: their bytes, and what they mean.
pub(super) fn rounded(dtype: Dtype, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    dtype.narrow(values, &mut bytes);
    let mut wide = vec![0.0; values.len()];
    dtype.widen(&bytes, &mut wide);
    (bytes, wide)
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
pub(super) fn assert_near(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - expected).abs();
        assert!(error <= tolerance * expected.abs().max(1.0), "{i}: {got} is not {expected}");
    }
}
