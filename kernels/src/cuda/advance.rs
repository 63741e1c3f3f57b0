//! One step on for sequences that decode, without the host. Over `advance.cu`.

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::shape::check_lengths;
use super::stream::Stream;

/// What the device knows of each row of a batch that decodes, `[rows]` each.
#[derive(Clone, Copy)]
pub struct RowProgress<'a> {
    /// Position of the token that is computed next; [`NO_POSITION`](super::NO_POSITION) for rows of length 0.
    pub positions: Slice<'a, u32>,
    /// Tokens of prompt and output; 0 for a row that pads the batch.
    pub lengths: Slice<'a, u32>,
    /// Where the tokens are written down for penalties, if they are.
    pub histories: Option<Histories<'a>>,
}

/// Tokens of prompt and output of sequences: `[any, stride]`.
#[derive(Clone, Copy)]
pub struct Histories<'a> {
    /// The tokens.
    pub tokens: Slice<'a, u32>,
    /// Tokens that a history has room for; later ones are dropped.
    pub stride: usize,
    /// The history of each row.
    pub rows: Slice<'a, u32>,
}

/// After sampling: each row's token joins its history, its length grows by one, and its position
/// becomes that of the token. `tokens` stay: the next step's embedding looks them up.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If the slices do not fit each other. The numbers of histories are not checked.
pub fn advance(
    stream: &Stream,
    progress: &RowProgress<'_>,
    tokens: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    let RowProgress { positions, lengths, histories } = *progress;
    let rows = tokens.len();
    check_lengths(rows, &[positions.len(), lengths.len()]);
    if rows == 0 {
        return Ok(());
    }
    let (history, history_rows, stride) = histories.map_or((0, 0, 0), |histories| {
        check_lengths(rows, &[histories.rows.len()]);
        (histories.tokens.address(), histories.rows.address(), histories.stride as u32)
    });
    let grid = Grid::new(rows.div_ceil(256), 256);
    let count = rows as u32;
    stream.launch(
        "advance_rows",
        grid,
        &[&positions, &lengths, &history, &history_rows, &tokens, &stride, &count],
    )
}
