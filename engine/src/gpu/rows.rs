//! [`Rows`]: the tokens of a step, one chunk after the other.

use baton_kernels::cuda::SAMPLED;

use crate::executor::{Input, Step};

/// Rows of a step.
#[derive(Default)]
pub(super) struct Rows {
    /// By chunk: its first row.
    pub(super) first: Vec<usize>,
    /// How many rows there are.
    pub(super) count: usize,
    /// Chunks that sample.
    pub(super) sampling: Vec<usize>,
    /// Chunks whose hidden states are summed, and of how many rows at their ends.
    pub(super) pooling: Vec<(usize, usize)>,
}

impl Rows {
    pub(super) fn of(step: &Step<'_>) -> Self {
        let mut rows = Self::default();
        for (index, chunk) in step.chunks.iter().enumerate() {
            rows.first.push(rows.count);
            rows.count += chunk.input.rows();
            rows.pooling.extend(chunk.pool_from.map(|first| (index, chunk.input.rows() - first)));
            if chunk.sample.is_some() {
                rows.sampling.push(index);
            }
        }
        rows
    }
}

/// The row that a chunk's next token is sampled from.
pub(super) fn last(rows: &Rows, step: &Step<'_>, index: usize) -> usize {
    rows.first[index] + step.chunks[index].input.rows() - 1
}

/// Of each row: its token, or with [`SAMPLED`] which of those that the step before sampled it is;
/// `sampled` says that by chunk.
pub(super) fn sources(step: &Step<'_>, sampled: &[Option<u32>]) -> impl Iterator<Item = u32> {
    step.chunks.iter().flat_map(|chunk| {
        let (known, pending) = match chunk.input {
            Input::Tokens(tokens) => (tokens, None),
            Input::Pending(before) => {
                (&[][..], Some(sampled[before].expect("what is pending was sampled")))
            }
        };
        known.iter().copied().chain(pending.map(|row| SAMPLED | row))
    })
}

/// Of each row: its position.
pub(super) fn positions(step: &Step<'_>) -> impl Iterator<Item = u32> {
    step.chunks.iter().flat_map(|chunk| {
        let end = chunk.start + chunk.input.rows();
        (chunk.start..end).map(|position| position as u32)
    })
}
