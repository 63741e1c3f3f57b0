//! The exponential function, by one polynomial on every instruction set.
#![expect(unsafe_code, reason = "vector constants")]

use super::F32x16;

/// Beyond these, n would leave what an exponent can hold.
const LEAST: f32 = -88.1;
const MOST: f32 = 88.3;

/// ln 2 in two parts; the first has so few bits that its product with n is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// From Cephes' `expf`, for |r| <= ln 2 / 2.
const COEFFICIENTS: [f32; 8] =
    [0.000_198_756_91, 0.001_398_2, 0.008_333_452, 0.041_665_796, 0.166_666_66, 0.5, 1.0, 1.0];

/// `e^x` within two units in the last place; 0 below -87.7 (no denormal numbers), and as at 88.3
/// above it.
#[inline(always)]
pub(crate) fn exp<V: F32x16>(x: V) -> V {
    // SAFETY: `x` exists, so its instructions do.
    let constant = |c| unsafe { V::splat(c) };
    let x = x.max(constant(LEAST)).min(constant(MOST));
    // e^x = 2^n e^r
    let n = x.mul(constant(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(constant(-LN_2[0]), x);
    let r = n.mul_add(constant(-LN_2[1]), r);
    let mut p = constant(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = p.mul_add(r, constant(*c));
    }
    p.mul(n.exp2_integer())
}
