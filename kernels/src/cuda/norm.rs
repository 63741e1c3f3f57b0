//! Root mean square norms, over `norm.cu`.

use half::bf16;

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::stream::Stream;

/// Elements that a thread takes at once.
const VECTOR: usize = 8;

/// `y = x / sqrt(mean(x²) + epsilon) * weight` for each row of `x`, as many elements as `weight`.
/// `y` may be `x`.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If `x` is not of whole rows, `y` not as long, or rows not of a multiple of 8 elements.
pub fn rms_norm(
    stream: &Stream,
    y: Slice<'_, bf16>,
    x: Slice<'_, bf16>,
    weight: Slice<'_, bf16>,
    epsilon: f32,
) -> Result<(), DeviceError> {
    let width = weight.len();
    assert!(width > 0 && width.is_multiple_of(VECTOR), "rows of {width} elements");
    assert!(x.len().is_multiple_of(width) && y.len() == x.len(), "whole rows");
    if x.is_empty() {
        return Ok(());
    }
    let threads = (width / VECTOR).next_multiple_of(32).min(1024) as u32;
    let grid = Grid::new(x.len() / width, threads);
    stream.launch("rms_norm", grid, &[&y, &x, &weight, &(width as i32), &epsilon])
}
