//! Speed of the kernels that memory limits, against a copy on the device in the same run:
//! `cargo run --release -p baton-kernels --example cuda_kernels_bench`. Needs a GPU.
//! Shapes are those of Llama 3.1 8B: 4096 wide, 14336 in the MLP, 32 heads and 8 key/value heads of
//! 128, 128,256 tokens.

use baton_kernels::cuda::{
    Buffer, Device, DeviceError, DeviceSampler, Element, Event, HeadShape, KvElements,
};
use baton_kernels::cuda::{
    Libraries, LibraryPaths, MAX_TOP, PagedKv, PieceShare, Pieces, RowPlaces,
};
use baton_kernels::cuda::{SamplingInputs, SamplingOutputs, SamplingRow, Stream, Turning};
use baton_kernels::cuda::{
    add_rms_norm, gather_blocks, quantize_rows, rms_norm, scatter_blocks, silu_mul, take_rows,
    turn_and_store,
};
use half::bf16;

const HIDDEN: usize = 4096;
const FFN: usize = 14_336;
const HEADS: HeadShape = HeadShape { heads: 32, kv_heads: 8, head_dim: 128 };
const VOCAB: usize = 128_256;
const BLOCK_TOKENS: usize = 64;
/// Rows of a step that decodes, and of one that computes a prompt.
const ROWS: [usize; 3] = [1, 64, 8192];
/// Rows (or blocks) of which `scripts/gpu-check` is told.
const TOLD: [usize; 3] = [64, 1024, 8192];
/// Runs of which the fastest counts, and launches in each.
const RUNS: usize = 10;
const LAUNCHES: usize = 20;

fn main() -> Result<(), DeviceError> {
    let libraries = match Libraries::find(&LibraryPaths::from_environment()) {
        Ok(libraries) => libraries,
        Err(missing) => {
            println!("no device to measure: {missing}");
            return Ok(());
        }
    };
    if Device::count(&libraries)? == 0 {
        println!("no device to measure: the driver finds none");
        return Ok(());
    }
    let device = Device::open(&libraries, 0)?;
    let bench = Bench::new(Stream::new(&device)?)?;
    println!("{}: copies move {:.0} GB/s, read and written", device.name(), bench.copy);
    println!("kernel                    rows        us      GB/s  of copy");
    for rows in ROWS {
        bench.layer(rows)?;
    }
    for blocks in [16, 1024] {
        bench.blocks(blocks)?;
    }
    for rows in [1, 64, 256] {
        bench.sampling(rows)?;
    }
    Ok(())
}

/// A device, and how fast it copies.
struct Bench {
    stream: Stream,
    events: (Event, Event),
    /// GB/s, read and written.
    copy: f64,
}

impl Bench {
    fn new(stream: Stream) -> Result<Self, DeviceError> {
        let events = (Event::timed(stream.device())?, Event::timed(stream.device())?);
        let mut bench = Self { stream, events, copy: 0.0 };
        let bytes = 512 << 20;
        let (from, to) = (bench.buffer::<u8>(bytes)?, bench.buffer::<u8>(bytes)?);
        let seconds = bench.seconds(|| bench.stream.copy(from.all(), to.all()))?;
        bench.copy = 2.0 * bytes as f64 / seconds / 1e9;
        Ok(bench)
    }

    /// Memory of zeros.
    fn buffer<T: Element>(&self, len: usize) -> Result<Buffer<T>, DeviceError> {
        let buffer = Buffer::new(self.stream.device(), len)?;
        self.stream.zero(buffer.all())?;
        Ok(buffer)
    }

    /// Seconds of one launch, in the fastest run.
    fn seconds(&self, launch: impl Fn() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
        let (start, end) = &self.events;
        let mut best = f64::INFINITY;
        for _ in 0..RUNS {
            start.record(&self.stream)?;
            for _ in 0..LAUNCHES {
                launch()?;
            }
            end.record(&self.stream)?;
            self.stream.synchronize()?;
            best = best.min(f64::from(end.ms_since(start)?) / 1e3 / LAUNCHES as f64);
        }
        Ok(best)
    }

    /// Times a kernel that has to move `bytes`.
    fn report(
        &self,
        name: &str,
        rows: usize,
        bytes: usize,
        launch: impl Fn() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let seconds = self.seconds(launch)?;
        let speed = bytes as f64 / seconds / 1e9;
        let share = 100.0 * speed / self.copy;
        println!("{name:<22} {rows:>7} {:>9.1} {speed:>9.0} {share:>6.0} %", seconds * 1e6);
        if TOLD.contains(&rows) {
            let name = name.replace(' ', ".");
            println!(
                r#"{{"name": "kernel.{name}.{rows}", "value": {speed:.0}, "unit": "GB/s, {share:.0} % of copying"}}"#
            );
        }
        Ok(())
    }

    /// What happens in a layer besides products and attention.
    fn layer(&self, rows: usize) -> Result<(), DeviceError> {
        let stream = &self.stream;
        let (x, y) = (self.buffer::<bf16>(rows * HIDDEN)?, self.buffer::<bf16>(rows * HIDDEN)?);
        let (update, weight) = (self.buffer::<bf16>(rows * HIDDEN)?, self.buffer::<bf16>(HIDDEN)?);
        let (x, y, update, weight) = (x.all(), y.all(), update.all(), weight.all());
        let row = rows * HIDDEN * 2;
        self.report("rms_norm", rows, 2 * row, || rms_norm(stream, y, x, weight, 1e-5))?;
        self.report("add_rms_norm", rows, 4 * row, || {
            add_rms_norm(stream, y, x, update, weight, 1e-5)
        })?;
        let (values, scales) = (self.buffer::<u8>(rows * HIDDEN)?, self.buffer::<f32>(rows)?);
        self.report("quantize_rows", rows, row + row / 2, || {
            quantize_rows(stream, values.all(), scales.all(), x)
        })?;
        let (table, ids) = (self.buffer::<bf16>(VOCAB * HIDDEN)?, scattered(stream, rows)?);
        self.report("take_rows", rows, 2 * row, || {
            take_rows(stream, y, table.all(), ids.all(), 0)
        })?;
        let (gate_up, inner) = (self.buffer(rows * 2 * FFN)?, self.buffer(rows * FFN)?);
        self.report("silu_mul", rows, rows * 3 * FFN * 2, || {
            silu_mul(stream, inner.all(), gate_up.all(), FFN)
        })?;
        for (name, elements) in [
            ("turn_and_store bf16", KvElements::Bf16),
            ("turn_and_store e4m3", KvElements::E4m3 { k_scale: 1.0, v_scale: 1.0 }),
        ] {
            self.turn(name, rows, elements)?;
        }
        Ok(())
    }

    /// One sequence per block of rows, so that rows go to places of their own.
    fn turn(&self, name: &str, rows: usize, elements: KvElements) -> Result<(), DeviceError> {
        let (dim, count) = (HEADS.head_dim, rows.div_ceil(BLOCK_TOKENS));
        let kv_row = 2 * HEADS.kv_heads * dim * elements.bytes();
        let qkv = self.buffer::<bf16>(rows * HEADS.row())?;
        let pieces = self.buffer::<u8>(count * BLOCK_TOKENS * kv_row)?;
        let angles = (self.buffer::<f32>(rows * dim / 2)?, self.buffer::<f32>(rows * dim / 2)?);
        let positions: Vec<u32> = (0..rows as u32).collect();
        let tables: Vec<u32> = (0..count as u32).rev().collect();
        let positions = self.stream.buffer(&positions)?;
        let (sequences, tables) = (self.buffer::<u32>(rows)?, self.stream.buffer(&tables)?);
        let angles = (angles.0.all(), angles.1.all());
        let turning = Turning { angles, norms: None, epsilon: 1e-6 };
        let places = RowPlaces { positions: positions.all(), sequences: sequences.all() };
        let kv = PagedKv {
            pieces: pieces.all(),
            elements,
            block_tokens: BLOCK_TOKENS,
            block_tables: tables.all(),
            max_blocks: count,
        };
        let bytes = (HEADS.row() + HEADS.heads * dim) * 2 + kv_row + dim * 4;
        self.report(name, rows, rows * bytes, || {
            turn_and_store(&self.stream, qkv.all(), HEADS, &turning, &places, &kv)
        })
    }

    /// Copies of one layer's pieces for a transfer, of all heads and of a quarter of them.
    fn blocks(&self, blocks: usize) -> Result<(), DeviceError> {
        let stream = &self.stream;
        let head_bytes = BLOCK_TOKENS * HEADS.head_dim * 2;
        let whole = PieceShare {
            kv_heads: HEADS.kv_heads,
            first_head: 0,
            heads: HEADS.kv_heads,
            head_bytes,
        };
        let quarter = PieceShare { first_head: 2, heads: 2, ..whole };
        let list = scattered(stream, blocks)?;
        let buffer = self.buffer::<u8>(blocks * whole.piece_bytes())?;
        for (name, share) in [("all heads", whole), ("2 of 8", quarter)] {
            let pool = self.buffer::<u8>(VOCAB.min(2 * blocks) * share.own_bytes())?;
            let pool = Pieces { memory: pool.all(), share };
            let buffer = Pieces { memory: buffer.all(), share: whole };
            let bytes = 2 * blocks * share.own_bytes();
            self.report(&format!("gather_blocks {name}"), blocks, bytes, || {
                gather_blocks(stream, buffer, pool, list.all())
            })?;
            self.report(&format!("scatter_blocks {name}"), blocks, bytes, || {
                scatter_blocks(stream, pool, buffer, list.all())
            })?;
        }
        Ok(())
    }

    fn sampling(&self, rows: usize) -> Result<(), DeviceError> {
        let plain = SamplingRow::default();
        let greedy = SamplingRow { temperature: 0.0, ..plain };
        let top_p = SamplingRow { top_p: 0.95, temperature: 0.7, ..plain };
        let top_k = SamplingRow { top_k: 50, ..top_p };
        let top_logprobs = SamplingRow { logprobs: MAX_TOP as u32, ..greedy };
        // A nucleus of most tokens: the filter falls back to passes over the row.
        let flat = SamplingRow { top_p: 0.95, temperature: 50.0, ..plain };
        for (name, params) in [
            ("sample greedy", greedy),
            ("sample top 20", top_logprobs),
            ("sample plain", plain),
            ("sample top-p", top_p),
            ("sample top-k top-p", top_k),
            ("sample flat top-p", flat),
        ] {
            self.sample(name, rows, params)?;
        }
        Ok(())
    }

    fn sample(&self, name: &str, rows: usize, params: SamplingRow) -> Result<(), DeviceError> {
        let logits = self.stream.buffer(&normal_logits(rows * DeviceSampler::stride(VOCAB)))?;
        let (params, lengths) = (vec![params; rows], vec![10_u32; rows]);
        let (params, lengths) = (self.stream.buffer(&params)?, self.stream.buffer(&lengths)?);
        let (none, no_floats) = (self.buffer::<u32>(0)?, self.buffer::<f32>(0)?);
        let (tokens, of_tokens) = (self.buffer::<u32>(rows)?, self.buffer::<f32>(rows)?);
        let top = rows * MAX_TOP;
        let (top_tokens, of_top) = (self.buffer::<u32>(top)?, self.buffer::<f32>(top)?);
        let inputs = SamplingInputs {
            logits: logits.all(),
            params: params.all(),
            lengths: lengths.all(),
            histories: none.all(),
            history_stride: 0,
            ends: none.all(),
            biases: (none.all(), no_floats.all()),
            allowed: none.all(),
        };
        let outputs = SamplingOutputs {
            tokens: tokens.all(),
            logprobs: of_tokens.all(),
            top_tokens: top_tokens.all(),
            top_logprobs: of_top.all(),
        };
        let sampler = std::cell::RefCell::new(DeviceSampler::new(&self.stream, rows, VOCAB)?);
        let all_greedy = name.starts_with("sample greedy");
        // Reading every logit once is what it has to do.
        self.report(name, rows, rows * VOCAB * 4, || {
            sampler.borrow_mut().sample(&self.stream, &inputs, &outputs, all_greedy)
        })
    }
}

/// Different numbers below twice their count (and the vocabulary), in no order.
fn scattered(stream: &Stream, count: usize) -> Result<Buffer<u32>, DeviceError> {
    let end = VOCAB.min(2 * count);
    // 7919 is prime and no divisor of these ends.
    let numbers: Vec<u32> = (0..count).map(|i| (i * 7919 % end) as u32).collect();
    stream.buffer(&numbers)
}

/// Numbers spread as logits are: about normal, of standard deviation 2.5.
fn normal_logits(count: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| ((0..6).map(|_| uniform()).sum::<f32>() - 3.0) * 3.5).collect()
}
