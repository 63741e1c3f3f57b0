//! Random inputs, and comparison with references.

use baton_kernels::cuda::{Buffer, Element, Stream};
use half::bf16;

/// Numbers that look random, the same in every run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// SplitMix64 (Steele et al. 2014).
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Of zero mean and unit variance, between about -3.5 and 3.5.
    pub(crate) fn number(&mut self) -> f32 {
        let sum: f64 = (0..4).map(|_| (self.bits() >> 11) as f64 / (1_u64 << 53) as f64).sum();
        ((sum - 2.0) * 3.0_f64.sqrt()) as f32
    }

    /// Of zero mean and standard deviation `size`.
    pub(crate) fn sized(&mut self, len: usize, size: f32) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.number() * size)).collect()
    }

    /// All numbers below `end`, in no order.
    pub(crate) fn permutation(&mut self, end: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..end as u32).collect();
        for i in (1..end).rev() {
            all.swap(i, self.below(i + 1));
        }
        all
    }

    /// A few pairs of a number of rows and a width that is a multiple of 8, up to these.
    pub(crate) fn shapes(&mut self, most_rows: usize, most_width: usize) -> Vec<(usize, usize)> {
        let mut shape = || (1 + self.below(most_rows), 8 * (1 + self.below(most_width / 8)));
        [(); 4].map(|()| shape()).into()
    }

    pub(crate) fn bf16s(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.number())).collect()
    }
}

pub(crate) fn f64s(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|value| f64::from(value.to_f32())).collect()
}

/// Panics unless every value is within `tolerance` of the expected one, relative to its size or, for
/// small ones, to one.
#[track_caller]
pub(crate) fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs() / expected.abs().max(1.0);
        // So that NaN fails.
        assert!(error <= tolerance, "element {i}: {found} instead of {expected}");
    }
}

/// Relative error of a value rounded to bf16.
pub(crate) const BF16: f64 = 1.0 / 256.0;

/// e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones is NaN.
pub(crate) fn e4m3_to_f64(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match exponent {
        15 if mantissa == 7.0 => f64::NAN,
        0 => mantissa / 8.0 * 2_f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2_f64.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Panics unless `found` is `expected` rounded to bf16, but for an error of `slack` before that.
#[track_caller]
pub(crate) fn assert_rounded(found: bf16, expected: f64, slack: f64, what: impl Fn() -> String) {
    let found = f64::from(found.to_f32());
    // Half of the last of 8 bits of significand.
    let limit = 2_f64.powf(expected.abs().log2().floor() - 8.0) + slack;
    assert!((found - expected).abs() <= limit, "{}: {found} instead of {expected}", what());
}

/// Panics unless no other e4m3 number is nearer to `expected`, but for a relative error of `slack`.
#[track_caller]
pub(crate) fn assert_nearest_e4m3(found: u8, expected: f64, slack: f64, what: impl Fn() -> String) {
    let distance = |byte: u8| (e4m3_to_f64(byte) - expected).abs();
    let least = (0..=255).map(distance).fold(f64::INFINITY, f64::min);
    let limit = least + slack * expected.abs();
    assert!(distance(found) <= limit, "{}: {found:#x} is not nearest to {expected}", what());
}

/// Device memory with these contents.
pub(crate) fn upload<T: Element>(stream: &Stream, contents: &[T]) -> Buffer<T> {
    stream.buffer(contents).unwrap()
}

/// What is in device memory.
pub(crate) fn read<T: Element>(stream: &Stream, buffer: &Buffer<T>) -> Vec<T> {
    stream.read(buffer.all()).unwrap()
}
