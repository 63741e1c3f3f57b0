//! Root mean square norms (<https://arxiv.org/abs/1910.07467>), over `norm.cu`.

use half::bf16;

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::shape::{check_lengths, rows_of, threads_of_row};
use super::stream::Stream;

/// `y = x / sqrt(mean(x²) + epsilon) * weight` for each row of `x`, as many elements as `weight`.
/// `y` may be `x`.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If `x` is not of whole rows, `y` not as long, or rows are not of a multiple of 8 elements or of
/// more than [`MAX_WIDTH`](super::MAX_WIDTH).
pub fn rms_norm(
    stream: &Stream,
    y: Slice<'_, bf16>,
    x: Slice<'_, bf16>,
    weight: Slice<'_, bf16>,
    epsilon: f32,
) -> Result<(), DeviceError> {
    let width = weight.len();
    let rows = rows_of(x.len(), width);
    check_lengths(x.len(), &[y.len()]);
    if rows == 0 {
        return Ok(());
    }
    let grid = Grid::new(rows, threads_of_row(width));
    stream.launch("rms_norm", grid, &[&y, &x, &weight, &(width as i32), &epsilon])
}

/// `x += update`, rounded to bf16; then `y` is the norm of that, as by [`rms_norm`].
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// As [`rms_norm`].
pub fn add_rms_norm(
    stream: &Stream,
    y: Slice<'_, bf16>,
    x: Slice<'_, bf16>,
    update: Slice<'_, bf16>,
    weight: Slice<'_, bf16>,
    epsilon: f32,
) -> Result<(), DeviceError> {
    let width = weight.len();
    let rows = rows_of(x.len(), width);
    check_lengths(x.len(), &[y.len(), update.len()]);
    if rows == 0 {
        return Ok(());
    }
    let grid = Grid::new(rows, threads_of_row(width));
    stream.launch("add_rms_norm", grid, &[&y, &x, &update, &weight, &(width as i32), &epsilon])
}
