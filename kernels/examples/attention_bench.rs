//! Speed of attention, and what an operation of the thread pool costs by itself:
//! `cargo run --release -p baton-kernels --example attention_bench -- [threads]`.
//! The shape is that of Qwen3-0.6B: 16 heads, 8 key/value heads of 128 elements.
#![expect(unsafe_code, reason = "the cache is shared memory")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_kernels::Dtype;
use baton_kernels::cpu::{AttentionRow, Heads, KvLayout, KvRow, KvStore, Queries, ThreadPool};
use baton_kernels::cpu::{attention, write_kv};

const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const BLOCK_TOKENS: usize = 16;
const STRIDE: usize = (HEADS + 2 * KV_HEADS) * DIM;
const TIME: Duration = Duration::from_millis(400);

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(cores);
    let pool = ThreadPool::new(threads);
    println!("{threads} threads; an empty operation takes {:.2} us", best(|| empty(&pool)) * 1e6);
    println!("type  batch  chunk  context  GFLOP/s   GB/s of keys and values");
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for (batch, chunk, context) in
            [(1, 512, 512), (1, 256, 4096), (1, 1, 1024), (1, 1, 16384), (16, 1, 1024)]
        {
            let case = Case::new(&pool, dtype, batch, chunk, context);
            let seconds = best(|| case.run(&pool));
            let keys: usize = (context - chunk + 1..=context).sum();
            let work = (batch * keys * HEADS * DIM * 4) as f64;
            let bytes = (batch * context * KV_HEADS * DIM * 2 * dtype.bytes()) as f64;
            println!(
                "{dtype:<5?} {batch:>5} {chunk:>6} {context:>8} {:>8.1} {:>6.1}",
                work / seconds / 1e9,
                bytes / seconds / 1e9
            );
        }
    }
}

fn empty(pool: &ThreadPool) {
    pool.for_each(pool.threads(), &|i| {
        black_box(i);
    });
}

/// The best of many: whatever else runs on the machine only slows it down.
fn best(mut work: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < TIME {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// The last `chunk` tokens of `batch` sequences of `context` tokens.
struct Case {
    store: KvStore,
    tables: Vec<Vec<u32>>,
    chunk: usize,
    context: usize,
    qkv: Vec<f32>,
}

impl Case {
    fn new(pool: &ThreadPool, dtype: Dtype, batch: usize, chunk: usize, context: usize) -> Self {
        let per_sequence = context.div_ceil(BLOCK_TOKENS);
        let blocks = batch * per_sequence;
        let (kv_heads, head_dim, block_tokens) = (KV_HEADS, DIM, BLOCK_TOKENS);
        let layout = KvLayout { layers: 1, kv_heads, head_dim, block_tokens, dtype };
        let store = KvStore::new(layout, blocks);
        let row: Vec<f32> = (0..STRIDE).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        for block in 0..blocks as u32 {
            for slot in 0..BLOCK_TOKENS as u32 {
                let heads = (heads(HEADS, KV_HEADS), heads(HEADS + KV_HEADS, KV_HEADS));
                // SAFETY: nothing else uses the store.
                unsafe { write_kv(pool, &store, 0, &[KvRow { block, slot }], &row, heads) };
            }
        }
        let table = |s: usize| (s * per_sequence..(s + 1) * per_sequence).rev();
        let tables = (0..batch).map(|s| table(s).map(|b| b as u32).collect()).collect();
        Self { store, tables, chunk, context, qkv: row.repeat(batch * chunk) }
    }

    fn run(&self, pool: &ThreadPool) {
        let positions = self.context - self.chunk..self.context;
        let rows: Vec<_> = self
            .tables
            .iter()
            .flat_map(|blocks| {
                positions.clone().map(|position| AttentionRow { position, first_key: 0, blocks })
            })
            .collect();
        let queries = Queries { matrix: &self.qkv, heads: heads(0, HEADS), scale: 0.088 };
        let mut out = vec![0.0; rows.len() * HEADS * DIM];
        // SAFETY: nothing writes to the store.
        unsafe { attention(pool, &self.store, 0, &rows, queries, &mut out) };
        black_box(out);
    }
}

fn heads(first: usize, count: usize) -> Heads {
    Heads { stride: STRIDE, offset: first * DIM, count, dim: DIM }
}
