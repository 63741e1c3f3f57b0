//! Element by element: the gated activation, residuals, biases.
#![expect(unsafe_code, reason = "raw memory and vector instructions")]

use super::pool::{ThreadPool, grain};
use super::simd::{F32x16, Kernel, LANES, exp, run};

/// `y = silu(gate) * up`, where a row of `gate_up: [rows, 2 width]` is gate, then up, and
/// `y: [rows, width]`; `silu(g) = g / (1 + e^-g)`.
///
/// # Panics
/// If the sizes do not fit.
pub fn silu_mul(pool: &ThreadPool, gate_up: &[f32], width: usize, y: &mut [f32]) {
    assert!(gate_up.len() == 2 * y.len() && y.len().is_multiple_of(width), "rows of the width");
    let rows = grain(width);
    pool.for_each_chunk(y, rows * width, &|task, y| {
        for (row, y) in y.chunks_exact_mut(width).enumerate() {
            let (gate, up) =
                gate_up[(task * rows + row) * 2 * width..][..2 * width].split_at(width);
            // SAFETY: the pool's instructions exist.
            unsafe { run(pool.isa(), Gated { gate, up, y }) };
        }
    });
}

/// All three of one length.
struct Gated<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let width = self.y.len();
        for i in (0..width).step_by(LANES) {
            let count = width - i;
            // SAFETY: all are `width` long.
            unsafe {
                let gate = V::load_up_to(self.gate.as_ptr().add(i), count);
                let up = V::load_up_to(self.up.as_ptr().add(i), count);
                let one = V::splat(1.0);
                let silu = gate.div(one.add(exp(V::splat(0.0).sub(gate))));
                silu.mul(up).store_up_to(self.y.as_mut_ptr().add(i), count);
            }
        }
    }
}

/// `x += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &ThreadPool, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "as many to add");
    let size = grain(1);
    pool.for_each_chunk(x, size, &|task, x| {
        for (x, y) in x.iter_mut().zip(&y[task * size..]) {
            *x += y;
        }
    });
}

/// Adds `bias` to every row of `y: [rows, bias.len()]`.
///
/// # Panics
/// If `y` has no whole number of rows.
pub fn add_bias(y: &mut [f32], bias: &[f32]) {
    assert!(y.len().is_multiple_of(bias.len()), "rows of the bias's length");
    for row in y.chunks_exact_mut(bias.len()) {
        for (y, bias) in row.iter_mut().zip(bias) {
            *y += bias;
        }
    }
}
