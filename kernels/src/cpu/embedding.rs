//! Looking tokens up in the table of embeddings.

use crate::Dtype;

/// Copies row `tokens[i]` of `table`, row-major little-endian rows of `dtype`, to row `i` of
/// `out: [tokens.len(), width]`, widened.
///
/// # Panics
/// If `out` has no whole number of elements per token, or a token is not in the table.
pub fn embed(dtype: Dtype, table: &[u8], tokens: &[u32], out: &mut [f32]) {
    if tokens.is_empty() {
        return;
    }
    assert!(out.len().is_multiple_of(tokens.len()), "a row for each token");
    let width = out.len() / tokens.len();
    let row_bytes = width * dtype.bytes();
    for (token, row) in tokens.iter().zip(out.chunks_exact_mut(width)) {
        let start = *token as usize * row_bytes;
        dtype.widen(&table[start..start + row_bytes], row);
    }
}
