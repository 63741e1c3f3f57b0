//! Rotary position embedding (<https://arxiv.org/abs/2104.09864>).
#![expect(unsafe_code, reason = "raw memory and vector instructions")]

use super::heads::Heads;
use super::pool::{ThreadPool, grain};
use super::simd::{F32x16, Kernel, LANES, run};

/// Rotates each of `heads` of each row of `matrix`, in place: element `i` of a head's first half
/// with element `i` of its second half (transformers' `rotate_half`), by the angle whose cosine
/// and sine are at `[row][i]` of `cos` and `sin: [rows, dim / 2]`.
///
/// # Panics
/// If the heads do not fit the matrix, or the tables are not of its rows.
pub fn rotate_heads(pool: &ThreadPool, matrix: &mut [f32], heads: Heads, cos: &[f32], sin: &[f32]) {
    let rows = heads.rows(matrix.len());
    let half = heads.dim / 2;
    assert!(heads.dim.is_multiple_of(2), "a head has two halves");
    assert!(cos.len() == rows * half && sin.len() == rows * half, "an angle for each pair");
    let rows = grain(heads.width());
    pool.for_each_chunk(matrix, rows * heads.stride, &|task, matrix| {
        for (row, matrix) in matrix.chunks_exact_mut(heads.stride).enumerate() {
            let angles = (task * rows + row) * half;
            let heads = &mut matrix[heads.offset..][..heads.width()];
            let (cos, sin) = (&cos[angles..][..half], &sin[angles..][..half]);
            // SAFETY: the pool's instructions exist.
            unsafe { run(pool.isa(), Rotation { heads, cos, sin }) };
        }
    });
}

/// The heads of one row.
struct Rotation<'a> {
    heads: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rotation<'_> {
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(2 * half) {
            for i in (0..half).step_by(LANES) {
                let count = half - i;
                let first = head.as_mut_ptr();
                // SAFETY: both halves, `cos` and `sin` are `half` long.
                unsafe {
                    let (first, second) = (first.add(i), first.add(half + i));
                    let cos = V::load_up_to(self.cos.as_ptr().add(i), count);
                    let sin = V::load_up_to(self.sin.as_ptr().add(i), count);
                    let (a, b) = (V::load_up_to(first, count), V::load_up_to(second, count));
                    a.mul(cos).sub(b.mul(sin)).store_up_to(first, count);
                    b.mul(cos).add(a.mul(sin)).store_up_to(second, count);
                }
            }
        }
    }
}
