//! Rows of a table by their numbers, over `embedding.cu`.

use half::bf16;

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::shape::{VECTOR, rows_of};
use super::stream::Stream;

/// Copies rows of a table: `y[i] = table[ids[i] - first]`, for each of `ids` and of
/// `y: [ids, width]`. For embeddings `ids` are tokens, which may come from the sampler without the
/// host; to pick the rows of a batch whose logits are wanted they are row numbers.
///
/// Where the table has no such row, `y` becomes 0: so the sum over the parts of a vocabulary that
/// begin at different `first` is the embedding.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If `y` or the table is not of whole rows, or rows not of a multiple of 8 elements.
pub fn take_rows(
    stream: &Stream,
    y: Slice<'_, bf16>,
    table: Slice<'_, bf16>,
    ids: Slice<'_, u32>,
    first: u32,
) -> Result<(), DeviceError> {
    if ids.is_empty() {
        return Ok(());
    }
    assert!(y.len().is_multiple_of(ids.len()), "a row for each id");
    let width = y.len() / ids.len();
    let count = rows_of(table.len(), width) as u32;
    let threads = (width / VECTOR).next_multiple_of(32).min(256) as u32;
    let grid = Grid::new(ids.len(), threads);
    stream.launch("take_rows", grid, &[&y, &table, &ids, &first, &count, &(width as i32)])
}
