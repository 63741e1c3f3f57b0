//! Rows in e4m3 with a scale each (<https://arxiv.org/abs/2209.05433>), over `quantize.cu`.

use half::bf16;

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::shape::{check_lengths, rows_of, threads_of_row};
use super::stream::Stream;

/// The greatest e4m3 number.
pub const E4M3_MAX: f32 = 448.0;

/// `y = x / scale`, rounded to the nearest e4m3 number, for each row of `x` and `y: [rows, width]`;
/// `scales: [rows]` take each row's greatest magnitude to [`E4M3_MAX`]. Rows are activations, or
/// the output channels of a weight matrix.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If the slices are not of as many whole rows, or rows are not of a multiple of 8 elements or of
/// more than [`MAX_WIDTH`](super::MAX_WIDTH).
pub fn quantize_rows(
    stream: &Stream,
    y: Slice<'_, u8>,
    scales: Slice<'_, f32>,
    x: Slice<'_, bf16>,
) -> Result<(), DeviceError> {
    check_lengths(x.len(), &[y.len()]);
    let Some(width) = width_of(x.len(), scales.len()) else { return Ok(()) };
    let grid = Grid::new(scales.len(), threads_of_row(width));
    stream.launch("quantize_rows", grid, &[&y, &scales, &x, &(width as i32)])
}

/// `x = y * scale` for each row: what [`quantize_rows`] left of it.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// As [`quantize_rows`].
pub fn dequantize_rows(
    stream: &Stream,
    x: Slice<'_, bf16>,
    y: Slice<'_, u8>,
    scales: Slice<'_, f32>,
) -> Result<(), DeviceError> {
    check_lengths(x.len(), &[y.len()]);
    let Some(width) = width_of(x.len(), scales.len()) else { return Ok(()) };
    let grid = Grid::of([scales.len(), width.div_ceil(256), 1], 256);
    stream.launch("dequantize_rows", grid, &[&x, &y, &scales, &(width as i32)])
}

/// Elements of each of `rows` rows; none if there are no rows.
fn width_of(elements: usize, rows: usize) -> Option<usize> {
    if rows == 0 {
        return None;
    }
    assert_eq!(rows_of(elements, elements / rows), rows, "a scale for each row");
    Some(elements / rows)
}
