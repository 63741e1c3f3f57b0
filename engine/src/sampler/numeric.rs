//! The functions that decide tokens, made of IEEE operations alone: the same bits everywhere.

/// Below this, `exp` is 0; its true value is not representable as a normal number.
const LEAST: f32 = -87.0;

/// e^x for x of at most 0, to about one part in 10^7; 0 for less than -87 and for NaN.
///
/// Reduces x to n ln 2 + r and takes a polynomial of degree 7 in r (coefficients from `expf` of
/// the Cephes library, <https://www.netlib.org/cephes/>).
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting it rounds to an integer.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    let clamped = if x > LEAST { x } else { LEAST };
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    // ln 2 in two parts, so that n times the first one is exact.
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let fraction = (p * r * r + r) + 1.0;
    // n is from -126 to 0, so the exponent field stays in range.
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x > LEAST { fraction * power } else { 0.0 }
}

/// A number in [0, 1), uniform over seeds and positions: the output of the SplitMix64 generator
/// (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) whose state is
/// the mixed seed plus `position` steps.
pub(super) fn uniform(seed: u64, position: u64) -> f64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let state = mix(seed).wrapping_add(STEP.wrapping_mul(position.wrapping_add(1)));
    // 53 bits, as many as a double holds.
    (mix(state) >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
