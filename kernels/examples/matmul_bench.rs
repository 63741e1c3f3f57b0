//! Speed of matrix products beside the machine's limits, measured in the same run:
//! `cargo run --release -p baton-kernels --example matmul_bench -- [threads] [inputs outputs]`.
#![expect(unsafe_code, reason = "measures vector instructions")]

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use baton_kernels::Dtype;
use baton_kernels::cpu::{PackedMatrix, ThreadPool, matmul};

const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 512];
/// Weights of a benchmark are spread over so many bytes, as a model's are: no cache holds them.
const WORKING_SET: usize = 600 << 20;
/// How often a limit is measured: the best counts, as for the products.
const ROUNDS: usize = 60;
const TIME: Duration = Duration::from_millis(400);

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments.first().copied().unwrap_or(cores);
    let (inputs, outputs) = match arguments[..] {
        [_, inputs, outputs] => (inputs, outputs),
        _ => (1024, 3072),
    };
    let (flops, bandwidth) = (peak_flops(threads), peak_bandwidth(threads));
    println!("{threads} threads: {:.0} GFLOP/s, {:.1} GB/s", flops / 1e9, bandwidth / 1e9);
    println!("[rows, {inputs}] x [{inputs}, {outputs}]");
    println!("type  rows  GFLOP/s   GB/s  of the limit");
    let pool = ThreadPool::new(threads);
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        let bytes = inputs * outputs * dtype.bytes();
        let weights: Vec<f32> = (0..inputs * outputs).map(|i| (i % 61) as f32 / 64.0).collect();
        let mut source = vec![0; bytes];
        dtype.narrow(&weights, &mut source);
        let matrices: Vec<PackedMatrix> = (0..WORKING_SET.div_ceil(bytes))
            .map(|_| PackedMatrix::pack(&pool, outputs, inputs, dtype, &[&source]))
            .collect();
        for rows in ROWS {
            let seconds = seconds_per_product(&pool, rows, &matrices);
            let work = 2.0 * (rows * inputs * outputs) as f64;
            let least = (work / flops).max(bytes as f64 / bandwidth);
            println!(
                "{dtype:<5?} {rows:>4} {:>8.1} {:>6.1} {:>11.0} %",
                work / seconds / 1e9,
                bytes as f64 / seconds / 1e9,
                100.0 * least / seconds,
            );
        }
    }
}

/// The best of many: whatever else runs on the machine only slows it down.
fn seconds_per_product(pool: &ThreadPool, rows: usize, matrices: &[PackedMatrix]) -> f64 {
    let (inputs, outputs) = (matrices[0].inputs(), matrices[0].outputs());
    let x: Vec<f32> = (0..rows * inputs).map(|i| (i % 13) as f32 / 16.0).collect();
    let mut y = vec![0.0; rows * outputs];
    let mut best = f64::INFINITY;
    let begin = Instant::now();
    for matrix in matrices.iter().cycle() {
        let start = Instant::now();
        matmul(pool, &x, matrix, &mut y);
        best = best.min(start.elapsed().as_secs_f64());
        if begin.elapsed() > TIME {
            break;
        }
    }
    black_box(&y);
    best
}

/// The greatest sum over all threads of what `work` did per second, of several rounds. `work` does
/// one thread's round and returns how much that was.
fn best_rate(threads: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let round = || {
        std::thread::scope(|scope| {
            let thread = |index| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    let done = work(index);
                    done / start.elapsed().as_secs_f64()
                })
            };
            let all: Vec<_> = (0..threads).map(thread).collect();
            all.into_iter().map(|t| t.join().expect("no panic")).sum()
        })
    };
    (0..ROUNDS).map(|_| round()).fold(0.0, f64::max)
}

fn peak_bandwidth(threads: usize) -> f64 {
    // Read in several places at a time, as one stream does not fill the memory's queues.
    const STREAMS: usize = 4;
    const WORDS: usize = 8 << 20;
    let data: Vec<Vec<u64>> = (0..threads as u64).map(|i| vec![i + 1; WORDS]).collect();
    best_rate(threads, |thread| {
        let parts: Vec<&[u64]> = data[thread].chunks(data[thread].len() / STREAMS).collect();
        let mut sums = [0_u64; 8 * STREAMS];
        for at in (0..parts[0].len()).step_by(8) {
            for (stream, part) in parts.iter().enumerate() {
                for (lane, value) in part[at..at + 8].iter().enumerate() {
                    sums[stream * 8 + lane] ^= value;
                }
            }
        }
        black_box(sums);
        (data[thread].len() * 8) as f64
    })
}

fn peak_flops(threads: usize) -> f64 {
    const STEPS: usize = 50_000;
    best_rate(threads, |_| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            return unsafe { x86::zmm(STEPS) };
        } else if is_x86_feature_detected!("fma") {
            // SAFETY: just detected.
            return unsafe { x86::ymm(STEPS) };
        }
        let mut sums = [1.0_f32; 16];
        for _ in 0..STEPS {
            sums = black_box(sums.map(|s| s * 0.5 + 0.5));
        }
        black_box(sums);
        (STEPS * 2 * 16) as f64
    })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Enough sums to hide the latency.
    const SUMS: usize = 12;

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn zmm(steps: usize) -> f64 {
        let half = _mm512_set1_ps(black_box(0.5));
        let mut sums = [half; SUMS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, half, half);
            }
        }
        black_box(sums);
        (steps * SUMS * 2 * 16) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn ymm(steps: usize) -> f64 {
        let half = _mm256_set1_ps(black_box(0.5));
        let mut sums = [half; SUMS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, half, half);
            }
        }
        black_box(sums);
        (steps * SUMS * 2 * 8) as f64
    }
}
