//! The exponential function, by one polynomial on every instruction set.
#![expect(unsafe_code, reason = "vector constants")]

use super::F32x16;

/// Beyond these, n would leave what an exponent can hold.
const LEAST: f32 = -88.1;
const MOST: f32 = 88.3;

/// ln 2 in two parts; the first has so few bits that its product with n is exact.
const LN_2: [f32; 2] = [0.693_359_375, -2.121_944_4e-4];

/// From Cephes' `expf`, for |r| <= ln 2 / 2.
const COEFFICIENTS: [f32; 8] = [
    1.987_569_2e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    5.000_000_1e-1,
    1.0,
    1.0,
];

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
