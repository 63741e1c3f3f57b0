//! Root-mean-square normalisation (<https://arxiv.org/abs/1910.07467>).
#![expect(unsafe_code, reason = "raw memory and vector instructions")]

use super::heads::Heads;
use super::pool::{ThreadPool, grain};
use super::simd::{F32x16, Kernel, LANES, run};

/// `y = x / sqrt(mean(x^2) + eps) * weight` for each row of `x` and `y: [rows, weight.len()]`.
///
/// # Panics
/// If `x` and `y` are not of the same whole number of rows.
pub fn rms_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let width = weight.len();
    assert!(x.len() == y.len() && x.len().is_multiple_of(width), "rows of the weight's length");
    let rows = grain(width);
    pool.for_each_chunk(y, rows * width, &|task, y| {
        let x = &x[task * rows * width..][..y.len()];
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let (from, to) = (x.as_ptr(), y.as_mut_ptr());
            // SAFETY: all three are `width` long.
            unsafe { run(pool.isa(), Norm { from, weight, eps, to }) };
        }
    });
}

/// Normalises each of `heads` of each row of `matrix`, in place, with the same `weight`.
///
/// # Panics
/// If the heads do not fit the matrix, or `weight` is not one head long.
pub fn rms_norm_heads(
    pool: &ThreadPool,
    matrix: &mut [f32],
    heads: Heads,
    weight: &[f32],
    eps: f32,
) {
    heads.rows(matrix.len());
    assert_eq!(weight.len(), heads.dim, "a weight for each element of a head");
    pool.for_each_chunk(matrix, grain(heads.width()) * heads.stride, &|_, rows| {
        for row in rows.chunks_exact_mut(heads.stride) {
            for head in row[heads.offset..][..heads.width()].chunks_exact_mut(heads.dim) {
                let to = head.as_mut_ptr();
                // SAFETY: head and weight are `dim` long. Each element is written after it was
                // read for the last time.
                unsafe { run(pool.isa(), Norm { from: to, weight, eps, to }) };
            }
        }
    });
}

struct Norm<'a> {
    from: *const f32,
    weight: &'a [f32],
    eps: f32,
    to: *mut f32,
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let width = self.weight.len();
        // SAFETY: `from` and `to` are as long as the weight.
        unsafe {
            let mut squares = V::splat(0.0);
            for i in (0..width).step_by(LANES) {
                let x = V::load_up_to(self.from.add(i), width - i);
                squares = x.mul_add(x, squares);
            }
            let mean = squares.sum() / width as f32;
            let factor = V::splat(1.0 / (mean + self.eps).sqrt());
            for i in (0..width).step_by(LANES) {
                let x = V::load_up_to(self.from.add(i), width - i);
                let weight = V::load_up_to(self.weight.as_ptr().add(i), width - i);
                x.mul(factor).mul(weight).store_up_to(self.to.add(i), width - i);
            }
        }
    }
}
