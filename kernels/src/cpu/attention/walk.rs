//! One task of attention: some queries walk over the keys of one head, partition by partition.
#![expect(unsafe_code, reason = "raw memory and vector instructions")]

use std::marker::PhantomData;
use std::ops::Range;

use super::super::element::{Element, F32, LINE};
use super::super::kv::KvStore;
use super::super::simd::{F32x16, Kernel, LANES, exp};
use super::super::tile::{ROW_STRIDE, Right, RowsTile, Sums, for_tiles};
use super::{AttentionRow, Queries};

/// Keys of a partition: a line of scores.
const PARTITION: usize = LINE;

/// What a task computes: all query heads of one key/value head, for rows of one sequence.
pub(super) struct Tile<'a> {
    pub(super) store: &'a KvStore,
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    /// Query heads of a key/value head.
    pub(super) group: usize,
    /// Index of `rows[0]` in the batch.
    pub(super) first_row: usize,
    pub(super) rows: &'a [AttentionRow<'a>],
    pub(super) queries: Queries<'a>,
    /// `[batch rows, heads, dim]`.
    pub(super) out: *mut f32,
}

/// Numbers that [`Walk::new`] needs.
pub(super) fn scratch_len(queries: usize, dim: usize) -> usize {
    queries * (3 * ROW_STRIDE + 2) + dim * PARTITION
}

/// A task under way. Query `i` is head `i % group` of row `i / group`.
pub(super) struct Walk<'a, E> {
    tile: Tile<'a>,
    /// The queries, scaled: rows [`ROW_STRIDE`] apart, as in the next two.
    queries: &'a mut [f32],
    /// Scores, then weights, of the partition's keys.
    scores: &'a mut [f32],
    /// Weighted sums of values.
    sums: &'a mut [f32],
    /// Keys of the partition: `[dim][PARTITION]`.
    keys: &'a mut [f32],
    /// Greatest score of each query so far.
    greatest: &'a mut [f32],
    /// Sum of weights of each query so far.
    totals: &'a mut [f32],
    element: PhantomData<E>,
}

impl<'a, E: Element> Walk<'a, E> {
    pub(super) fn new(tile: Tile<'a>, scratch: &'a mut [f32]) -> Self {
        let queries = tile.rows.len() * tile.group;
        let dim = tile.queries.heads.dim;
        let (queries_scaled, rest) = scratch.split_at_mut(queries * ROW_STRIDE);
        let (scores, rest) = rest.split_at_mut(queries * ROW_STRIDE);
        let (sums, rest) = rest.split_at_mut(queries * ROW_STRIDE);
        let (keys, rest) = rest.split_at_mut(dim * PARTITION);
        let (greatest, totals) = rest.split_at_mut(queries);
        sums.fill(0.0);
        greatest.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        Self {
            tile,
            queries: queries_scaled,
            scores,
            sums,
            keys,
            greatest,
            totals,
            element: PhantomData,
        }
    }

    fn dim(&self) -> usize {
        self.tile.queries.heads.dim
    }

    fn count(&self) -> usize {
        self.tile.rows.len() * self.tile.group
    }

    fn load_queries(&mut self) {
        let Queries { matrix, heads, scale } = self.tile.queries;
        for (i, scaled) in self.queries.chunks_exact_mut(ROW_STRIDE).enumerate() {
            let (row, head) = (self.tile.first_row + i / self.tile.group, i % self.tile.group);
            let head = self.tile.kv_head * self.tile.group + head;
            let query = &heads.of(matrix, row)[head * heads.dim..][..heads.dim];
            for (scaled, x) in scaled.iter_mut().zip(query) {
                *scaled = x * scale;
            }
        }
    }

    /// Where the head's key (or value, after the keys of all heads) of a position lies.
    #[inline(always)]
    fn address(&self, position: usize, value: bool) -> *const u8 {
        let layout = self.tile.store.layout();
        let block = self.tile.rows[0].blocks[position / layout.block_tokens];
        let head = self.tile.kv_head + if value { layout.kv_heads } else { 0 };
        let offset =
            head * layout.head_bytes() + position % layout.block_tokens * layout.row_bytes();
        // SAFETY: the head and the slot are inside the piece.
        unsafe { self.tile.store.piece_ptr(self.tile.layer, block).add(offset) }
    }

    /// Turns the keys at `keys` into lines of one element of 32 keys. Lanes of keys outside the
    /// range hold any numbers.
    #[inline(always)]
    unsafe fn gather_keys<V: F32x16>(&mut self, base: usize, keys: &Range<usize>) {
        for half in [0, LANES] {
            let first = base + half;
            if first >= keys.end || first + LANES <= keys.start {
                continue;
            }
            let mut rows = [std::ptr::null(); LANES];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = self.address((first + i).clamp(keys.start, keys.end - 1), false);
            }
            for d in (0..self.dim()).step_by(LANES) {
                // SAFETY: whole vectors of a key may be read (the store has slack at its end), and
                // `keys` holds `dim` lines.
                unsafe {
                    let mut columns = [V::splat(0.0); LANES];
                    for (column, row) in columns.iter_mut().zip(&rows) {
                        *column = E::load(row.add(d * E::BYTES));
                    }
                    let lines = V::transpose(columns);
                    for (j, line) in lines.into_iter().enumerate().take(self.dim() - d) {
                        line.store(self.keys.as_mut_ptr().add((d + j) * PARTITION + half));
                    }
                }
            }
        }
    }

    /// Scores of all queries for the partition's keys.
    #[inline(always)]
    unsafe fn score<V: F32x16>(&mut self) {
        for_tiles::<V>(self.count(), |first, count| {
            // SAFETY: queries, keys and scores are in scratch memory.
            unsafe {
                let left = self.queries.as_ptr().add(first * ROW_STRIDE);
                let right =
                    Right { start: self.keys.as_ptr().cast(), line: PARTITION * 4, panel: 0 };
                let start = self.scores.as_mut_ptr().add(first * ROW_STRIDE);
                let sums = Sums { start, stride: ROW_STRIDE, columns: PARTITION, fresh: true };
                V::call(RowsTile::<F32, false>::new(count, left, right, self.dim(), sums));
            }
        });
    }

    /// Turns a query's scores of the keys `seen` (in the partition) into weights.
    #[inline(always)]
    unsafe fn weigh<V: F32x16>(&mut self, query: usize, seen: &Range<usize>) {
        let scores = &mut self.scores[query * ROW_STRIDE..][..PARTITION];
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        // SAFETY: a partition is two vectors, and sums have room for whole vectors.
        unsafe {
            let at = scores.as_mut_ptr();
            let (a, b) = (V::load(at), V::load(at.add(LANES)));
            let before = self.greatest[query];
            let greatest = before.max(a.max(b).greatest());
            let (a, b) = (exp(a.sub(V::splat(greatest))), exp(b.sub(V::splat(greatest))));
            a.store(at);
            b.store(at.add(LANES));
            let total = a.add(b).sum();
            if greatest == before {
                self.totals[query] += total;
                return;
            }
            // What was weighed relative to the greatest score before shrinks.
            let shrink = exp(V::splat(before - greatest));
            let mut factor = [0.0; LANES];
            shrink.store(factor.as_mut_ptr());
            self.greatest[query] = greatest;
            self.totals[query] = self.totals[query] * factor[0] + total;
            for d in (0..self.dim()).step_by(LANES) {
                let sum = self.sums.as_mut_ptr().add(query * ROW_STRIDE + d);
                V::load(sum).mul(shrink).store(sum);
            }
        }
    }

    /// Adds the weighted values of `keys` to the sums of `queries`.
    #[inline(always)]
    unsafe fn add_values<V: F32x16>(
        &mut self,
        queries: Range<usize>,
        base: usize,
        keys: Range<usize>,
    ) {
        let layout = self.tile.store.layout();
        let mut key = keys.start;
        while key < keys.end {
            let depth = (keys.end - key).min(layout.block_tokens - key % layout.block_tokens);
            let values = self.address(key, true);
            for_tiles::<V>(queries.len(), |first, count| {
                let query = queries.start + first;
                for d in (0..self.dim()).step_by(LINE) {
                    // SAFETY: weights and sums are in scratch memory; whole lines of values may
                    // be read.
                    unsafe {
                        let left = self.scores.as_ptr().add(query * ROW_STRIDE + key - base);
                        let start = values.add(d * E::BYTES);
                        let right = Right { start, line: layout.row_bytes(), panel: 0 };
                        let start = self.sums.as_mut_ptr().add(query * ROW_STRIDE + d);
                        let columns = self.dim() - d;
                        let sums = Sums { start, stride: ROW_STRIDE, columns, fresh: false };
                        V::call(RowsTile::<E, false>::new(count, left, right, depth, sums));
                    }
                }
            });
            key += depth;
        }
    }

    /// The keys of a partition that `row` sees.
    #[inline(always)]
    fn seen(&self, row: usize, base: usize) -> Range<usize> {
        let row = &self.tile.rows[row];
        base.max(row.first_key)..(base + PARTITION).min(row.position + 1)
    }

    #[inline(always)]
    unsafe fn partition<V: F32x16>(&mut self, base: usize, keys: &Range<usize>) {
        let group = self.tile.group;
        // SAFETY: as the caller promises.
        unsafe {
            self.gather_keys::<V>(base, keys);
            self.score::<V>();
            let mut row = 0;
            while row < self.tile.rows.len() {
                // Rows that see the same keys share the work.
                let seen = self.seen(row, base);
                let first = row;
                while row < self.tile.rows.len() && self.seen(row, base) == seen {
                    row += 1;
                }
                if seen.is_empty() {
                    continue;
                }
                let queries = first * group..row * group;
                for query in queries.clone() {
                    self.weigh::<V>(query, &(seen.start - base..seen.end - base));
                }
                self.add_values::<V>(queries, base, seen);
            }
        }
    }

    /// Divides the sums by the sums of weights.
    #[inline(always)]
    unsafe fn finish<V: F32x16>(&mut self) {
        let heads = self.tile.queries.heads;
        for query in 0..self.count() {
            let row = self.tile.first_row + query / self.tile.group;
            let head = self.tile.kv_head * self.tile.group + query % self.tile.group;
            for d in (0..heads.dim).step_by(LANES) {
                // SAFETY: this row's head is this task's.
                unsafe {
                    let sum = V::load(self.sums.as_ptr().add(query * ROW_STRIDE + d));
                    let out = self.tile.out.add((row * heads.count + head) * heads.dim + d);
                    sum.div(V::splat(self.totals[query])).store_up_to(out, heads.dim - d);
                }
            }
        }
    }
}

impl<E: Element> Kernel for Walk<'_, E> {
    /// # Safety
    /// As of [`attention`](super::attention).
    #[inline(always)]
    unsafe fn run<V: F32x16>(mut self) {
        self.load_queries();
        let rows = self.tile.rows;
        let start = rows.iter().map(|row| row.first_key).min().unwrap_or(0);
        let end = rows.iter().map(|row| row.position + 1).max().unwrap_or(0);
        for base in (start / PARTITION * PARTITION..end).step_by(PARTITION) {
            let keys = start.max(base)..end.min(base + PARTITION);
            // SAFETY: as the caller promises.
            unsafe { self.partition::<V>(base, &keys) };
        }
        // SAFETY: as the caller promises.
        unsafe { self.finish::<V>() };
    }
}
