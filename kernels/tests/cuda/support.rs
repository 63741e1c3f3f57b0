//! Random inputs, and comparison with references.

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
