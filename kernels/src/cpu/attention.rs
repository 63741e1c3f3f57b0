//! Causal attention over the paged KV cache.
//!
//! A task takes one key/value head and a few rows of one sequence, with all query heads that share
//! the head: its *queries*. It walks over the keys in partitions of 32 that begin at multiples of 32,
//! and keeps for each query the greatest score, the sum of the weights and the weighted sum of the
//! values (online softmax, <https://arxiv.org/abs/1805.02867>). A query's keys and their order depend on its own
//! position only, so its result is the same bits whatever else is in the task.
#![expect(unsafe_code, reason = "raw memory and vector instructions")]

mod walk;

use self::walk::{Tile, Walk, scratch_len};
use super::element::{Bf16, F16, F32};
use super::heads::Heads;
use super::kv::KvStore;
use super::pool::{SendPtr, ThreadPool};
use super::scratch::with_scratch;
use super::simd::run;
use crate::Dtype;

/// Queries of a task, about: so many share the work of reading a key.
const QUERIES: usize = 32;

/// What a row of a batch attends to: the keys `first_key..=position` of its sequence.
#[derive(Clone, Copy, Debug)]
pub struct AttentionRow<'a> {
    /// The row's own position.
    pub position: usize,
    /// The first key that it sees: 0, or the begin of a sliding window.
    pub first_key: usize,
    /// The sequence's blocks, in order.
    pub blocks: &'a [u32],
}

/// Where queries are, and how their scores are scaled.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// The matrix that holds them.
    pub matrix: &'a [f32],
    /// Which heads of it.
    pub heads: Heads,
    /// Factor on each product of query and key.
    pub scale: f32,
}

/// `out[row][head] = softmax(scale * q · K) V` over the row's keys, for `out: [rows, heads * dim]`.
/// Query head `h` uses key/value head `h / (heads / kv_heads)`.
///
/// Rows of one sequence that follow each other and have the same `blocks` slice share work.
///
/// # Safety
/// Nothing may write to the keys and values that the rows see meanwhile.
///
/// # Panics
/// If shapes do not fit, or a row's blocks do not hold its keys.
pub unsafe fn attention(
    pool: &ThreadPool,
    store: &KvStore,
    layer: usize,
    rows: &[AttentionRow<'_>],
    queries: Queries<'_>,
    out: &mut [f32],
) {
    let (layout, heads) = (store.layout(), queries.heads);
    assert_eq!(heads.rows(queries.matrix.len()), rows.len(), "a query for each row");
    assert_eq!(heads.dim, layout.head_dim, "the cache's head dimension");
    assert!(heads.count.is_multiple_of(layout.kv_heads), "equal groups of query heads");
    assert_eq!(out.len(), rows.len() * heads.width(), "room for each row");
    for row in rows {
        assert!(row.first_key <= row.position, "a row sees at least its own key");
        assert!(row.position < row.blocks.len() * layout.block_tokens, "blocks for all keys");
    }
    let group = heads.count / layout.kv_heads;
    let tiles = cut(rows, (QUERIES / group).max(1));
    let out = SendPtr(out.as_mut_ptr());
    pool.for_each(tiles.len() * layout.kv_heads, &|task| {
        let (first_row, count) = tiles[task / layout.kv_heads];
        let tile = Tile {
            store,
            layer,
            kv_head: task % layout.kv_heads,
            group,
            first_row,
            rows: &rows[first_row..first_row + count],
            queries,
            out: out.get(),
        };
        let len = scratch_len(count * group, heads.dim);
        // SAFETY: the pool's instructions exist; all indices were checked; only this task writes
        // to these heads of these rows.
        with_scratch(len, |scratch| unsafe {
            match layout.dtype {
                Dtype::F32 => run(pool.isa(), Walk::<F32>::new(tile, scratch)),
                Dtype::Bf16 => run(pool.isa(), Walk::<Bf16>::new(tile, scratch)),
                Dtype::F16 => run(pool.isa(), Walk::<F16>::new(tile, scratch)),
            }
        });
    });
}

/// Cuts rows into tiles of one sequence and at most `most` rows: (first, count).
fn cut(rows: &[AttentionRow<'_>], most: usize) -> Vec<(usize, usize)> {
    let mut tiles: Vec<(usize, usize)> = Vec::with_capacity(rows.len());
    for (index, row) in rows.iter().enumerate() {
        match tiles.last_mut() {
            Some((first, count))
                if *count < most && std::ptr::eq(rows[*first].blocks, row.blocks) =>
            {
                *count += 1;
            }
            _ => tiles.push((index, 1)),
        }
    }
    tiles
}
