//! The gated activation of the MLP, over `activation.cu`.

use half::bf16;

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::shape::{VECTOR, check_lengths, rows_of};
use super::stream::Stream;

const THREADS: usize = 256;

/// `y = silu(gate) * up`, where a row of `gate_up: [rows, 2 width]` is gate, then up, and
/// `y: [rows, width]`; `silu(g) = g / (1 + e^-g)`.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If the slices are not of as many whole rows, or rows not of a multiple of 8 elements.
pub fn silu_mul(
    stream: &Stream,
    y: Slice<'_, bf16>,
    gate_up: Slice<'_, bf16>,
    width: usize,
) -> Result<(), DeviceError> {
    let rows = rows_of(y.len(), width);
    check_lengths(2 * y.len(), &[gate_up.len()]);
    if rows == 0 {
        return Ok(());
    }
    let grid = Grid::of([rows, width.div_ceil(THREADS * VECTOR), 1], THREADS as u32);
    stream.launch("silu_mul", grid, &[&y, &gate_up, &(width as i32)])
}
