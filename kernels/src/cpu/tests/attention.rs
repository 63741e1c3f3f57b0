use proptest::prelude::*;

use super::{DTYPES, assert_near, bits, cases, numbers, pools, rounded};
use crate::Dtype;
use crate::cpu::{AttentionRow, Heads, KvLayout, KvRow, KvStore, Queries, ThreadPool};
use crate::cpu::{attention, write_kv};

/// One sequence: its queries, keys and values at every position, in one matrix as a fused
/// projection writes them.
#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    dtype: Dtype,
    window: usize,
    qkv: Vec<f32>,
}

impl Case {
    fn new(shape: (usize, usize, usize, usize), dtype: Dtype, window: usize) -> Self {
        let (tokens, kv_heads, group, dim) = shape;
        let heads = kv_heads * group;
        let qkv = numbers(tokens as u64, tokens * (heads + 2 * kv_heads) * dim);
        let qkv = qkv.into_iter().map(|x| x * 2.0).collect();
        Self { tokens, heads, kv_heads, dim, dtype, window, qkv }
    }

    fn heads(&self, first: usize, count: usize) -> Heads {
        let stride = (self.heads + 2 * self.kv_heads) * self.dim;
        Heads { stride, offset: first * self.dim, count, dim: self.dim }
    }

    fn first_key(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    fn store(&self, block_tokens: usize) -> KvStore {
        let (kv_heads, head_dim, dtype) = (self.kv_heads, self.dim, self.dtype);
        let layout = KvLayout { layers: 2, kv_heads, head_dim, block_tokens, dtype };
        let store = KvStore::new(layout, self.tokens.div_ceil(block_tokens) + 2);
        // What was there before must not matter.
        for block in 0..store.blocks() as u32 {
            // SAFETY: nothing else uses the store.
            #[expect(unsafe_code, reason = "test of unsafe interface")]
            unsafe { store.piece_mut(1, block) }.fill(0xff);
        }
        store
    }

    /// Attention computed chunk by chunk; the blocks are in no order.
    fn run(&self, pool: &ThreadPool, block_tokens: usize, chunks: &[usize]) -> Vec<f32> {
        let store = self.store(block_tokens);
        let blocks: Vec<u32> = (0..self.tokens.div_ceil(block_tokens) as u32).rev().collect();
        let row_len = self.heads(0, 0).stride;
        let mut out = vec![f32::NAN; self.tokens * self.heads * self.dim];
        let mut start = 0;
        for end in chunks.iter().copied().chain([self.tokens]) {
            let end = end.clamp(start, self.tokens);
            let matrix = &self.qkv[start * row_len..end * row_len];
            let kv_row = |p: usize| KvRow {
                block: blocks[p / block_tokens],
                slot: (p % block_tokens) as u32,
            };
            let kv_rows: Vec<_> = (start..end).map(kv_row).collect();
            let (k, v) = (self.heads(self.heads, self.kv_heads), self.heads + self.kv_heads);
            let heads = (k, self.heads(v, self.kv_heads));
            let row = |position| {
                let first_key = self.first_key(position);
                AttentionRow { position, first_key, blocks: &blocks }
            };
            let rows: Vec<_> = (start..end).map(row).collect();
            let queries = Queries { matrix, heads: self.heads(0, self.heads), scale: self.scale() };
            let width = self.heads * self.dim;
            // SAFETY: nothing else uses the store.
            #[expect(unsafe_code, reason = "test of unsafe interface")]
            unsafe {
                write_kv(pool, &store, 1, &kv_rows, matrix, heads);
                let out = &mut out[start * width..end * width];
                attention(pool, &store, 1, &rows, queries, out);
            }
            start = end;
        }
        out
    }

    /// In double precision, keys and values rounded as in the cache.
    fn naive(&self) -> Vec<f64> {
        let (_, cached) = rounded(self.dtype, &self.qkv);
        let row_len = self.heads(0, 0).stride;
        let mut out = Vec::new();
        for position in 0..self.tokens {
            for head in 0..self.heads {
                let query = &self.qkv[position * row_len + head * self.dim..][..self.dim];
                let kv_head = head / (self.heads / self.kv_heads);
                let of = |p: usize, h: usize| &cached[p * row_len + h * self.dim..][..self.dim];
                let keys = self.first_key(position)..position + 1;
                let dot = |p| -> f64 {
                    let key = of(p, self.heads + kv_head);
                    query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
                };
                let weights: Vec<f64> =
                    keys.clone().map(|p| (dot(p) * f64::from(self.scale())).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..self.dim {
                    let value = |p| f64::from(of(p, self.heads + self.kv_heads + kv_head)[d]);
                    let sum: f64 = keys.clone().zip(&weights).map(|(p, w)| w * value(p)).sum();
                    out.push(sum / total);
                }
            }
        }
        out
    }

    fn check(&self, block_tokens: usize, chunks: &[usize]) {
        let pool = ThreadPool::new(1);
        let whole = self.run(&pool, 32, &[]);
        assert_near(&whole, &self.naive(), 3e-6);
        for pool in pools() {
            let parts = self.run(&pool, block_tokens, chunks);
            assert_eq!(bits(&parts), bits(&whole), "{:?} x {}", pool.isa(), pool.threads());
        }
    }
}

prop_compose! {
    fn any_case()(
        tokens in 1_usize..90,
        kv_heads in 1_usize..4,
        group in 1_usize..5,
        dim in prop::sample::select(vec![2_usize, 8, 16, 20, 32, 48, 64, 80, 128]),
        dtype in prop::sample::select(&DTYPES),
        window in prop_oneof![Just(usize::MAX), 1_usize..80],
    ) -> Case {
        Case::new((tokens, kv_heads, group, dim), dtype, window)
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn right_and_the_same_bits_however_it_is_cut(
        case in any_case(),
        block_tokens in prop::sample::select(vec![1_usize, 5, 16, 32, 64]),
        mut chunks in prop::collection::vec(0_usize..90, 0..4),
    ) {
        chunks.sort_unstable();
        case.check(block_tokens, &chunks);
    }
}

#[test]
fn one_token_at_a_time() {
    let case = Case::new((70, 2, 2, 64), Dtype::Bf16, usize::MAX);
    case.check(16, &(0..70).collect::<Vec<_>>());
}

#[test]
fn a_context_of_many_partitions() {
    Case::new((700, 1, 2, 64), Dtype::F16, usize::MAX).check(16, &[1, 300, 640, 699]);
    Case::new((300, 1, 40, 16), Dtype::F32, 100).check(64, &[150]);
}

#[test]
fn sequences_of_a_batch_do_not_meet() {
    let pool = ThreadPool::new(2);
    let case = Case::new((40, 2, 2, 32), Dtype::F32, usize::MAX);
    let alone = case.run(&pool, 16, &[]);
    // The same sequence twice in one batch, in the same blocks but with tables of their own.
    let store = case.store(16);
    let tables = [vec![2, 0, 1], vec![2, 0, 1]];
    let kv_row = |p: usize| KvRow { block: tables[0][p / 16], slot: (p % 16) as u32 };
    let kv_rows: Vec<_> = (0..40).map(kv_row).collect();
    let rows = (0..80).map(|i| {
        let (position, blocks) = (i % 40, &tables[i / 40][..]);
        AttentionRow { position, first_key: 0, blocks }
    });
    let rows: Vec<_> = rows.collect();
    let matrix = [case.qkv.clone(), case.qkv.clone()].concat();
    let queries = Queries { matrix: &matrix, heads: case.heads(0, 4), scale: case.scale() };
    let mut out = vec![f32::NAN; 2 * alone.len()];
    // SAFETY: nothing else uses the store.
    #[expect(unsafe_code, reason = "test of unsafe interface")]
    unsafe {
        write_kv(&pool, &store, 1, &kv_rows, &case.qkv, (case.heads(4, 2), case.heads(6, 2)));
        attention(&pool, &store, 1, &rows, queries, &mut out);
    }
    assert_eq!(bits(&out), bits(&[alone.clone(), alone].concat()));
}

#[test]
fn pieces_hold_what_was_written_rounded() {
    let pool = ThreadPool::new(1);
    for dtype in DTYPES {
        let case = Case::new((3, 2, 1, 8), dtype, usize::MAX);
        let store = case.store(4);
        let rows: Vec<_> = (0..3).map(|slot| KvRow { block: 1, slot }).collect();
        let heads = (case.heads(2, 2), case.heads(4, 2));
        // SAFETY: nothing else uses the store.
        #[expect(unsafe_code, reason = "test of unsafe interface")]
        let piece = unsafe {
            write_kv(&pool, &store, 1, &rows, &case.qkv, heads);
            store.piece(1, 1)
        };
        let row_bytes = 8 * dtype.bytes();
        for (i, row) in piece.chunks_exact(row_bytes).enumerate() {
            // [k|v][kv_heads][block_tokens]
            let (head, slot) = (i / 4, i % 4);
            if slot == 3 {
                assert!(row.iter().all(|b| *b == 0xff), "slot 3 was not written");
                continue;
            }
            let values = &case.qkv[slot * case.heads(0, 0).stride + (2 + head) * 8..][..8];
            assert_eq!(row, rounded(dtype, values).0);
        }
    }
}
