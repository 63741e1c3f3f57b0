//! The inner loop of matrix products and of attention: a tile of sums kept in registers.
#![expect(unsafe_code, reason = "raw memory and vector instructions")]

use std::marker::PhantomData;

use super::element::{Element, LINE};
use super::simd::{F32x16, Kernel, LANES, prefetch};

/// Distance between the rows of a left operand in scratch memory, in elements. A constant, so that
/// addresses need no registers; and no power of two, so that rows do not share cache sets.
pub(crate) const ROW_STRIDE: usize = DEPTH + LANES;

/// Inputs that a tile sums over at a time, when the left operand is copied to scratch memory.
pub(crate) const DEPTH: usize = 256;

/// How far ahead lines are asked for, in bytes.
const AHEAD: usize = 4096;

/// Most rows of any tile.
pub(crate) const MAX_ROWS: usize = 12;

/// Left operand: row `m` begins at `start + m * stride`.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) start: *const f32,
    pub(crate) stride: usize,
}

/// Right operand: columns `32 p ..` at depth `k` are the line at `start + p * panel + k * line`.
#[derive(Clone, Copy)]
pub(crate) struct Right {
    pub(crate) start: *const u8,
    /// Bytes.
    pub(crate) line: usize,
    /// Bytes.
    pub(crate) panel: usize,
}

/// Sums: row `m` begins at `start + m * stride`.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub(crate) start: *mut f32,
    pub(crate) stride: usize,
    /// Columns that exist.
    pub(crate) columns: usize,
    /// Whether the sums begin at 0, not at what is in memory.
    pub(crate) fresh: bool,
}

/// `sums[m][c] += left[m][k] * right[k][c]` for `k` ascending over `depth`, with one sum for each
/// output; `M` rows and `P` panels of 32 columns. `FAR`: lines follow each other through main memory, so
/// that asking for them early pays.
///
/// # Safety
/// All operands must exist; of the right one, whole lines. The instructions of `V` must exist.
#[inline(always)]
pub(crate) unsafe fn tile<
    V: F32x16,
    E: Element,
    const M: usize,
    const P: usize,
    const FAR: bool,
>(
    left: Left,
    right: Right,
    depth: usize,
    sums: Sums,
) {
    // SAFETY: all addresses are inside the operands, which the caller promises.
    unsafe {
        let mut acc = [[[V::splat(0.0); 2]; P]; M];
        if !sums.fresh {
            for_halves::<M, P>(sums, |m, p, h, at, count| {
                acc[m][p][h] = V::load_up_to(at, count);
            });
        }
        for k in 0..depth {
            let mut columns = [[V::splat(0.0); 2]; P];
            for (p, columns) in columns.iter_mut().enumerate() {
                let line = right.start.add(p * right.panel + k * right.line);
                if FAR {
                    for part in (0..LINE * E::BYTES).step_by(64) {
                        prefetch(line.wrapping_add(AHEAD + part));
                    }
                }
                *columns = E::load_line(line);
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*left.start.add(m * left.stride + k));
                for p in 0..P {
                    acc[p][0] = x.mul_add(columns[p][0], acc[p][0]);
                    acc[p][1] = x.mul_add(columns[p][1], acc[p][1]);
                }
            }
        }
        for_halves::<M, P>(sums, |m, p, h, at, count| {
            acc[m][p][h].store_up_to(at, count);
        });
    }
}

/// Calls `each(row, panel, half, address, columns)` for the 16-column parts of `sums` that exist.
#[inline(always)]
unsafe fn for_halves<const M: usize, const P: usize>(
    sums: Sums,
    mut each: impl FnMut(usize, usize, usize, *mut f32, usize),
) {
    for m in 0..M {
        for p in 0..P {
            for h in 0..2 {
                let column = p * LINE + h * LANES;
                if column < sums.columns {
                    // SAFETY: row and column exist.
                    let at = unsafe { sums.start.add(m * sums.stride + column) };
                    each(m, p, h, at, sums.columns - column);
                }
            }
        }
    }
}

/// A tile of one panel and up to `V::TILE_ROWS` rows, [`ROW_STRIDE`] apart.
pub(crate) struct RowsTile<E, const FAR: bool> {
    rows: usize,
    left: *const f32,
    right: Right,
    depth: usize,
    sums: Sums,
    element: PhantomData<E>,
}

impl<E: Element, const FAR: bool> RowsTile<E, FAR> {
    pub(crate) fn new(
        rows: usize,
        left: *const f32,
        right: Right,
        depth: usize,
        sums: Sums,
    ) -> Self {
        Self { rows, left, right, depth, sums, element: PhantomData }
    }
}

impl<E: Element, const FAR: bool> Kernel for RowsTile<E, FAR> {
    /// # Safety
    /// As of [`tile`].
    #[inline(always)]
    unsafe fn run<V: F32x16>(self) {
        let left = Left { start: self.left, stride: ROW_STRIDE };
        macro_rules! of {
            ($($rows:literal)*) => {
                match self.rows {
                    // Sizes that no vector type uses are not compiled for it.
                    $($rows if $rows <= V::TILE_ROWS => {
                        // SAFETY: as the caller promises.
                        unsafe { tile::<V, E, $rows, 1, FAR>(left, self.right, self.depth, self.sums) }
                    })*
                    _ => unreachable!("a tile has 1 to TILE_ROWS rows"),
                }
            };
        }
        of!(1 2 3 4 5 6 7 8 9 10 11 12)
    }
}

/// Cuts `rows` into the fewest tiles, as even as possible: calls `each(first, count)`.
#[inline(always)]
pub(crate) fn for_tiles<V: F32x16>(rows: usize, mut each: impl FnMut(usize, usize)) {
    let tiles = rows.div_ceil(V::TILE_ROWS);
    let mut first = 0;
    for tile in 0..tiles {
        let count = rows / tiles + usize::from(tile < rows % tiles);
        each(first, count);
        first += count;
    }
}
