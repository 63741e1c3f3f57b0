//! Tokens that the host may not know yet.

use super::error::DeviceError;
use super::kernel::Grid;
use super::memory::Slice;
use super::stream::Stream;

/// Set in a token's source if it is the number of a sampled token.
pub const SAMPLED: u32 = 1 << 31;

const THREADS: usize = 256;

/// `tokens[i] = sources[i]`, or, where that has [`SAMPLED`] set, `sampled[sources[i] - SAMPLED]`:
/// so a step can be queued before the host has read what the last one sampled.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If there are not as many tokens as sources. The numbers of sampled tokens are not checked.
pub fn resolve_tokens(
    stream: &Stream,
    tokens: Slice<'_, u32>,
    sources: Slice<'_, u32>,
    sampled: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    assert_eq!(tokens.len(), sources.len(), "a source for each token");
    if tokens.is_empty() {
        return Ok(());
    }
    let grid = Grid::new(tokens.len().div_ceil(THREADS), THREADS as u32);
    stream.launch("resolve_tokens", grid, &[&tokens, &sources, &sampled, &(tokens.len() as u32)])
}
