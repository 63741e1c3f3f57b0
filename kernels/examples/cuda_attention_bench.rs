//! Speed of attention on a GPU:
//! `cargo run --release -p baton-kernels --example cuda_attention_bench -- [heads [kv_heads]]`.
//!
//! Chunks in TFLOP/s, of the products that a causal mask leaves. Single rows in GB/s of keys and
//! values, beside what copying memory reaches in the same run. Caches are used in turn, of more
//! bytes than the device has L2, as the layers of a model are.

use std::error::Error;
use std::sync::Arc;

use baton_kernels::cuda::{
    AttentionInput, Buffer, DecodePlan, DecodeScratch, Device, DeviceError, Event, HeadShape,
    KvElements, Libraries, LibraryPaths, PagedKv, QueryRows, Slice, Stream, decode_attention,
    decode_workers, prefill_attention, prefill_tiles,
};
use half::bf16;

type Failure = Box<dyn Error>;

const HEAD_DIM: usize = 128;
/// Bytes that all caches together must exceed.
const COLD_BYTES: usize = 512 << 20;
const REPETITIONS: usize = 20;
const E4M3: KvElements = KvElements::E4m3 { k_scale: 1.0, v_scale: 1.0 };

fn main() -> Result<(), Failure> {
    let stream = match open() {
        Ok(stream) => stream,
        Err(reason) => {
            println!("no device to measure: {reason}");
            return Ok(());
        }
    };
    let mut arguments = std::env::args().skip(1).map(|text| text.parse());
    let heads = arguments.next().transpose()?.unwrap_or(32);
    let kv_heads = arguments.next().transpose()?.unwrap_or(8);
    let shape = HeadShape { heads, kv_heads, head_dim: HEAD_DIM };
    println!("{}; {heads} heads, {kv_heads} KV heads of {HEAD_DIM}", stream.device().name());
    prefill(&stream, shape)?;
    decode(&stream, shape)
}

fn open() -> Result<Stream, Failure> {
    let libraries = Libraries::find(&LibraryPaths::from_environment())?;
    let device = Device::open(&libraries, 0)?;
    Ok(Stream::new(&device)?)
}

fn prefill(stream: &Stream, shape: HeadShape) -> Result<(), Failure> {
    let mut figures = String::new();
    println!("\nchunks   tokens  after  block  window   us     TFLOP/s");
    for (chunks, tokens, after, block_tokens, window) in [
        (1, 1024, 0, 16, 0),
        (1, 2048, 0, 16, 0),
        (1, 4096, 0, 16, 0),
        (1, 8192, 0, 16, 0),
        (1, 8192, 0, 32, 0),
        (1, 8192, 0, 64, 0),
        (1, 16384, 0, 64, 0),
        (1, 32768, 0, 64, 0),
        (16, 512, 0, 16, 0),
        (1, 512, 8192, 16, 0),
        (1, 2048, 30720, 16, 0),
        (1, 32, 8192, 16, 0),
        (1, 8192, 0, 16, 1024),
    ] {
        let runs = runs(chunks, tokens, after);
        let case = Case::new(stream, shape, KvElements::Bf16, block_tokens, &runs)?;
        let tiles = stream.buffer(&prefill_tiles(&runs, &shape))?;
        let ms = time(stream, |i| {
            prefill_attention(stream, case.out.all(), &case.input(i, window), tiles.all())
        })?;
        let seen = |position: usize| if window == 0 { position } else { position.min(window) };
        let keys: usize = (after + 1..=after + tokens).map(seen).sum();
        let flop = (4 * chunks * keys * shape.heads * HEAD_DIM) as f64;
        let speed = flop / f64::from(ms) / 1e9;
        println!(
            "{chunks:>6} {tokens:>8} {after:>6} {block_tokens:>6} {window:>7} {:>8.1} {speed:>8.1}",
            ms * 1e3
        );
        if (chunks, after, block_tokens, window) == (1, 0, 64, 0) {
            figures += &figure(&format!("prefill.{tokens}"), speed, "TFLOP/s");
        }
    }
    print!("{figures}");
    Ok(())
}

/// What scripts/gpu-check reads.
fn figure(name: &str, value: f64, unit: &str) -> String {
    format!("{{\"name\": \"attention.{name}\", \"value\": {value:.1}, \"unit\": \"{unit}\"}}\n")
}

fn decode(stream: &Stream, shape: HeadShape) -> Result<(), Failure> {
    let copied = copy_speed(stream)?;
    let mut figures = String::new();
    println!("\ncopying reads and writes {copied:.0} GB/s together");
    println!("rows    keys   block  cache         us      GB/s  of copying");
    for elements in [KvElements::Bf16, E4M3] {
        for (rows, keys, block_tokens) in [
            (1, 1024, 16),
            (1, 8192, 16),
            (1, 32768, 16),
            (8, 2048, 16),
            (32, 1024, 16),
            (32, 4096, 16),
            (32, 4096, 64),
            (128, 2048, 16),
            (256, 1024, 16),
        ] {
            let ms = decode_time(stream, shape, elements, &runs(rows, 1, keys - 1), block_tokens)?;
            let bytes = rows * keys * 2 * shape.kv_heads * HEAD_DIM * elements.bytes();
            report(rows, keys, block_tokens, elements, ms, bytes, copied);
            if (rows, keys, block_tokens) == (32, 4096, 64) {
                figures += &figure(
                    &format!("decode.{}", name(elements)),
                    bytes as f64 / f64::from(ms) / 1e6,
                    "GB/s",
                );
            }
        }
    }
    print!("{figures}");
    // Lengths that differ: one long sequence among short ones.
    let mut mixed = runs(64, 1, 511);
    mixed[17].position = 32767;
    let keys: usize = mixed.iter().map(|run| run.position + 1).sum();
    let ms = decode_time(stream, shape, KvElements::Bf16, &mixed, 16)?;
    let bytes = keys * 4 * shape.kv_heads * HEAD_DIM;
    report(64, keys / 64, 16, KvElements::Bf16, ms, bytes, copied);
    Ok(())
}

fn name(elements: KvElements) -> &'static str {
    if elements == KvElements::Bf16 { "bf16" } else { "e4m3" }
}

fn report(
    rows: usize,
    keys: usize,
    block_tokens: usize,
    elements: KvElements,
    ms: f32,
    bytes: usize,
    copied: f64,
) {
    let speed = bytes as f64 / f64::from(ms) / 1e6;
    let cache = name(elements);
    println!(
        "{rows:>4} {keys:>7} {block_tokens:>7}  {cache:<6} {:>10.1} {speed:>9.0} {:>8.0} %",
        ms * 1e3,
        100.0 * speed / copied
    );
}

fn decode_time(
    stream: &Stream,
    shape: HeadShape,
    elements: KvElements,
    runs: &[QueryRows],
    block_tokens: usize,
) -> Result<f32, Failure> {
    let case = Case::new(stream, shape, elements, block_tokens, runs)?;
    let plan = DecodePlan::new(runs, &shape, 0, decode_workers(stream.device(), &shape));
    let items = stream.buffer(plan.items())?;
    let shares = stream.buffer(plan.shares())?;
    let scratch = DecodeScratch::new(stream, plan.items().len() / 8, &shape)?;
    let there = (items.all(), shares.all());
    let ms = time(stream, |i| {
        decode_attention(stream, case.out.all(), &case.input(i, 0), there, &scratch)
    })?;
    Ok(ms)
}

/// So many sequences, of so many rows each, after so many tokens.
fn runs(sequences: usize, rows: usize, position: usize) -> Vec<QueryRows> {
    let run = |sequence| QueryRows { row: sequence * rows, rows, position, sequence };
    (0..sequences).map(run).collect()
}

/// GB/s that copying device memory reads and writes.
fn copy_speed(stream: &Stream) -> Result<f64, Failure> {
    let buffer = Buffer::<u8>::new(stream.device(), 4 * COLD_BYTES)?;
    let (from, to) =
        (buffer.slice(0..2 * COLD_BYTES), buffer.slice(2 * COLD_BYTES..4 * COLD_BYTES));
    let ms = time(stream, |_| stream.copy(from, to))?;
    Ok(4.0 * COLD_BYTES as f64 / f64::from(ms) / 1e6)
}

/// Milliseconds of one of many launches, the number of which is passed; the least of three tries.
fn time(
    stream: &Stream,
    launch: impl Fn(usize) -> Result<(), DeviceError>,
) -> Result<f32, DeviceError> {
    let device: &Arc<Device> = stream.device();
    let mut least = f32::INFINITY;
    for _ in 0..3 {
        launch(0)?;
        let (start, end) = (Event::timed(device)?, Event::timed(device)?);
        start.record(stream)?;
        for i in 0..REPETITIONS {
            launch(i)?;
        }
        end.record(stream)?;
        end.synchronize()?;
        least = least.min(end.ms_since(&start)? / REPETITIONS as f32);
    }
    Ok(least)
}

/// A batch, and as many caches for it as it takes to keep them out of L2.
struct Case {
    shape: HeadShape,
    elements: KvElements,
    block_tokens: usize,
    layers: usize,
    pieces: Buffer<u8>,
    tables: Buffer<u32>,
    max_blocks: usize,
    qkv: Buffer<bf16>,
    out: Buffer<bf16>,
}

impl Case {
    fn new(
        stream: &Stream,
        shape: HeadShape,
        elements: KvElements,
        block_tokens: usize,
        runs: &[QueryRows],
    ) -> Result<Self, Failure> {
        let blocks_of = |run: &QueryRows| (run.position + run.rows).div_ceil(block_tokens);
        let max_blocks = runs.iter().map(blocks_of).max().unwrap_or(1);
        let blocks: usize = runs.iter().map(blocks_of).sum();
        let rows: usize = runs.iter().map(|run| run.rows).sum();
        let layer = blocks * 2 * shape.kv_heads * block_tokens * HEAD_DIM * elements.bytes();
        let layers = COLD_BYTES.div_ceil(layer);
        // A permutation, as the multiplier is prime and greater than any number of blocks here.
        let mut free = (0..blocks).map(|i| (i * 1_000_003 % blocks) as u32);
        let mut tables = vec![0; runs.len() * max_blocks];
        for run in runs {
            let first = run.sequence * max_blocks;
            tables[first..first + blocks_of(run)].fill_with(|| free.next().unwrap_or_default());
        }
        Ok(Self {
            shape,
            elements,
            block_tokens,
            layers,
            pieces: numbers(stream, layers * layer, elements)?,
            tables: stream.buffer(&tables)?,
            max_blocks,
            qkv: stream.buffer(&bf16s(rows * shape.row()))?,
            out: Buffer::new(stream.device(), rows * shape.heads * HEAD_DIM)?,
        })
    }

    fn input(&self, launch: usize, window: usize) -> AttentionInput<'_> {
        let layer = self.pieces.len() / self.layers;
        let first = launch % self.layers * layer;
        let pieces: Slice<'_, u8> = self.pieces.slice(first..first + layer);
        let kv = PagedKv {
            pieces,
            elements: self.elements,
            block_tokens: self.block_tokens,
            block_tables: self.tables.all(),
            max_blocks: self.max_blocks,
        };
        let scale = (HEAD_DIM as f32).powf(-0.5);
        AttentionInput { qkv: self.qkv.all(), shape: self.shape, kv, scale, window }
    }
}

/// Small numbers that look random: the power that a device draws, and so its clock, depends on them.
fn bf16s(len: usize) -> Vec<bf16> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(&mut next).take(len).collect()
}

/// So many bytes of small numbers, on the device; they repeat.
fn numbers(stream: &Stream, bytes: usize, elements: KvElements) -> Result<Buffer<u8>, Failure> {
    let some: Vec<u8> = match elements {
        KvElements::Bf16 => bf16s(1 << 20).iter().flat_map(|number| number.to_le_bytes()).collect(),
        // e4m3 below 1 in size, of either sign.
        KvElements::E4m3 { .. } => {
            bf16s(1 << 20).iter().map(|number| (number.to_bits() >> 3 & 0xb7) as u8).collect()
        }
    };
    let buffer = Buffer::new(stream.device(), bytes)?;
    let mut filled = some.len().min(bytes);
    stream.write(&some[..filled], buffer.slice(0..filled))?;
    while filled < bytes {
        let more = filled.min(bytes - filled);
        stream.copy(buffer.slice(0..more), buffer.slice(filled..filled + more))?;
        filled += more;
    }
    Ok(buffer)
}
