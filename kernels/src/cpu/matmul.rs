//! Products of activations with packed weights.
//!
//! A task takes a group of panels and all rows. Few rows: the weights stream from memory once,
//! several panels at a time, and each sum runs over all inputs at once. More rows: the inputs are
//! taken [`DEPTH`] at a time, so that what is being multiplied stays in the nearest caches, and sums
//! wait in `y` in between, which is exact. In both every sum adds its products in the same order.
#![expect(unsafe_code, reason = "raw memory and vector instructions")]

use std::marker::PhantomData;

use super::element::{Bf16Pairs, Element, F16, F32, LINE};
use super::packed::PackedMatrix;
use super::pool::{SendPtr, ThreadPool};
use super::simd::{F32x16, Kernel, run};
use super::tile::{DEPTH, Left, MAX_ROWS, ROW_STRIDE, Right, RowsTile, Sums, for_tiles, tile};
use crate::Dtype;

/// Up to here rows are "few".
const FEW_ROWS: usize = 4;
/// Most panels of a task.
const GROUP: usize = 8;
/// Panels that one row takes at a time: so many streams fill the memory's queues.
const PANELS: usize = 4;

/// `y[m][o] = sum over i of x[m][i] * w[o][i]`, for `x: [m, inputs]` and `y: [m, outputs]`.
///
/// The sum starts at 0 and runs over `i` ascending, one fused multiply-add in single precision at
/// a time.
///
/// # Panics
/// If `x` and `y` have not the same whole number of rows.
pub fn matmul(pool: &ThreadPool, x: &[f32], w: &PackedMatrix, y: &mut [f32]) {
    let (inputs, outputs) = (w.inputs(), w.outputs());
    let rows = y.len().checked_div(outputs).unwrap_or(0);
    assert!(y.len() == rows * outputs && x.len() == rows * inputs, "the same number of rows");
    let group = w.panels().div_ceil(4 * pool.threads()).next_multiple_of(PANELS).min(GROUP);
    let target = SendPtr(y.as_mut_ptr());
    pool.for_each(w.panels().div_ceil(group.max(1)), &|task| {
        let panels = task * group..((task + 1) * group).min(w.panels());
        let (first, end) = (panels.start, panels.end);
        let block = Block { x, rows, w, y: target.get(), first, end };
        // SAFETY: the pool's instructions exist. The block lies inside `x`, `w` and `y`, as their
        // sizes were checked, and no other task writes to its columns.
        unsafe {
            match w.dtype() {
                Dtype::F32 => run(pool.isa(), Product::<F32>(block, PhantomData)),
                Dtype::Bf16 => run(pool.isa(), Product::<Bf16Pairs>(block, PhantomData)),
                Dtype::F16 => run(pool.isa(), Product::<F16>(block, PhantomData)),
            }
        }
    });
}

/// All rows of some panels.
struct Block<'a> {
    x: &'a [f32],
    rows: usize,
    w: &'a PackedMatrix,
    y: *mut f32,
    /// Panels `first..end`.
    first: usize,
    end: usize,
}

struct Product<'a, E>(Block<'a>, PhantomData<E>);

impl<E: Element> Kernel for Product<'_, E> {
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let block = &self.0;
        // SAFETY: as the caller promises.
        unsafe {
            if block.rows <= FEW_ROWS {
                block.few_rows::<V, E>();
            } else {
                block.many_rows::<V, E>();
            }
        }
    }
}

impl Block<'_> {
    /// The weights of `panel` from `input` on.
    #[inline(always)]
    fn right(&self, panel: usize, input: usize) -> Right {
        let start = self.w.line(panel, input);
        Right { start, line: self.w.line_bytes(), panel: self.w.panel_bytes() }
    }

    /// The sums of `panel` and of those after it, from `row` on.
    #[inline(always)]
    unsafe fn sums(&self, row: usize, panel: usize, fresh: bool) -> Sums {
        let stride = self.w.outputs();
        // SAFETY: the row and the panel exist.
        let start = unsafe { self.y.add(row * stride + panel * LINE) };
        Sums { start, stride, columns: stride - panel * LINE, fresh }
    }

    #[inline(always)]
    unsafe fn few_rows<V: F32x16, E: Element>(&self) {
        // SAFETY: rows and panels exist.
        unsafe {
            match self.rows {
                0 => {}
                1 => self.whole::<V, E, 1, PANELS>(),
                2 => self.whole::<V, E, 2, 2>(),
                3 => self.whole::<V, E, 3, 2>(),
                _ => self.whole::<V, E, 4, 2>(),
            }
        }
    }

    /// `M` rows over all inputs, `P` panels at a time.
    #[inline(always)]
    unsafe fn whole<V: F32x16, E: Element, const M: usize, const P: usize>(&self) {
        let inputs = self.w.inputs();
        let left = Left { start: self.x.as_ptr(), stride: inputs };
        let mut panel = self.first;
        // SAFETY: rows and panels exist.
        unsafe {
            while panel + P <= self.end {
                let sums = self.sums(0, panel, true);
                tile::<V, E, M, P, true>(left, self.right(panel, 0), inputs, sums);
                panel += P;
            }
            for panel in panel..self.end {
                let sums = self.sums(0, panel, true);
                tile::<V, E, M, 1, true>(left, self.right(panel, 0), inputs, sums);
            }
        }
    }

    #[inline(always)]
    unsafe fn many_rows<V: F32x16, E: Element>(&self) {
        let mut left = [0.0; MAX_ROWS * ROW_STRIDE];
        for input in (0..self.w.inputs()).step_by(DEPTH) {
            let depth = DEPTH.min(self.w.inputs() - input);
            for_tiles::<V>(self.rows, |row, count| {
                self.copy_left(row, count, input, depth, &mut left);
                for panel in self.first..self.end {
                    // SAFETY: rows and panels exist, and `left` holds the rows.
                    unsafe {
                        let (right, sums) =
                            (self.right(panel, input), self.sums(row, panel, input == 0));
                        V::call(RowsTile::<E, true>::new(count, left.as_ptr(), right, depth, sums));
                    }
                }
            });
        }
    }

    /// Copies inputs `input..input + depth` of `count` rows to `left`.
    #[inline(always)]
    fn copy_left(&self, row: usize, count: usize, input: usize, depth: usize, left: &mut [f32]) {
        for (m, left) in left.chunks_exact_mut(ROW_STRIDE).take(count).enumerate() {
            let start = (row + m) * self.w.inputs() + input;
            left[..depth].copy_from_slice(&self.x[start..start + depth]);
        }
    }
}
