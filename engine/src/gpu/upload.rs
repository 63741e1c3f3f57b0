//! Weights from a checkpoint to a device: threads read tensors, as bf16, into page-locked memory,
//! from where the device copies them while the threads read on. What becomes e4m3 is rounded on the
//! device, whole rows at a time.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};

use baton_kernels::Dtype;
use baton_kernels::cpu::ThreadPool;
use baton_kernels::cuda::{self, Buffer, Device, DeviceError, Pinned, Stream};
use half::bf16;

use super::shard::Shard;
use super::weights::{Part, Place};
use crate::model::LoadProgress;
use crate::weights::{Tensor, Weights};

/// Elements that are copied at once.
const STRETCH: usize = 4 << 20;
/// Page-locked buffers of a thread: one is filled while the others are copied.
const BUFFERS: usize = 3;
/// More do not read faster.
const MOST_THREADS: usize = 16;

/// Copies a device's share of every part, and tells how many bytes have been read.
pub(super) fn upload(
    device: &Arc<Device>,
    source: (&Weights, Shard),
    parts: &[Part<'_>],
    threads: usize,
    on_progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), DeviceError> {
    let part_bytes = |part: &Part<'_>| part.to.len() * source.0.dtype(&part.name).bytes();
    let total_bytes = parts.iter().map(part_bytes).sum();
    let next = AtomicUsize::new(0);
    let (told, progress) = mpsc::channel();
    let work = |told: Sender<usize>| {
        let done = Reader::new(device).and_then(|reader| reader.run(source, parts, &next, &told));
        if done.is_err() {
            // The others need not go on.
            next.store(parts.len(), Ordering::Relaxed);
        }
        done
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.clamp(1, MOST_THREADS))
            .map(|_| told.clone())
            .map(|told| scope.spawn(|| work(told)))
            .collect();
        drop(told);
        let mut done_bytes = 0;
        for bytes in progress {
            done_bytes += bytes;
            on_progress(LoadProgress { done_bytes, total_bytes });
        }
        let results = threads.into_iter().map(|t| t.join().expect("reading does not panic"));
        results.collect()
    })
}

/// What one thread has.
struct Reader {
    stream: Stream,
    buffers: Vec<Pinned<bf16>>,
    /// The next buffer to fill: the one that was filled first.
    next: usize,
    /// bf16 on the device that is to be rounded, once there is such.
    wide: Option<Buffer<bf16>>,
    pool: ThreadPool,
}

impl Reader {
    fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let buffers =
            (0..BUFFERS).map(|_| Pinned::new(device, STRETCH)).collect::<Result<_, _>>()?;
        let (stream, pool) = (Stream::new(device)?, ThreadPool::new(1));
        Ok(Self { stream, buffers, next: 0, wide: None, pool })
    }

    /// Takes parts until none is left.
    fn run(
        mut self,
        (weights, shard): (&Weights, Shard),
        parts: &[Part<'_>],
        next: &AtomicUsize,
        told: &Sender<usize>,
    ) -> Result<(), DeviceError> {
        while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let tensor = weights.tensor(&self.pool, &part.name);
            let size = tensor.dtype.bytes();
            let mut runs = VecDeque::from(shard.runs(&part.name, weights.shape(&part.name)));
            let room = part.to.whole_rows(STRETCH);
            let mut first = 0;
            while !runs.is_empty() {
                let turn = self.next;
                self.next = (turn + 1) % BUFFERS;
                let buffer = &mut self.buffers[turn].as_mut_slice()?[..room];
                let len = fill(&tensor, &mut runs, buffer);
                self.send(turn, part.to.part(first..first + len))?;
                first += len;
                // Who listens goes on until all threads have ended.
                let _ = told.send(len * size);
            }
        }
        self.stream.synchronize()
    }

    /// Queues the first elements of a buffer to where they go.
    fn send(&mut self, buffer: usize, to: Place<'_>) -> Result<(), DeviceError> {
        let Self { stream, buffers, wide, .. } = self;
        let from = &mut buffers[buffer];
        match to {
            Place::Bf16(to) => stream.upload(from, 0, to),
            Place::E4m3 { values, scales } => {
                if wide.is_none() {
                    *wide = Some(Buffer::new(stream.device(), STRETCH)?);
                }
                let wide = wide.as_ref().expect("it was just made").slice(0..values.len());
                stream.upload(from, 0, wide)?;
                cuda::quantize_rows(stream, values, scales, wide)
            }
        }
    }
}

/// Reads on in a tensor, as far as there is room. How many elements that were.
fn fill(tensor: &Tensor<'_>, runs: &mut VecDeque<Range<usize>>, room: &mut [bf16]) -> usize {
    let (size, mut len) = (tensor.dtype.bytes(), 0);
    while let Some(run) = runs.front_mut().filter(|_| len < room.len()) {
        let count = run.len().min(room.len() - len);
        let bytes = &tensor.bytes[run.start * size..(run.start + count) * size];
        narrow(tensor.dtype, bytes, &mut room[len..len + count]);
        (run.start, len) = (run.start + count, len + count);
        if run.start == run.end {
            runs.pop_front();
        }
    }
    len
}

/// Rounds elements to bf16, to the nearest, ties to even.
fn narrow(dtype: Dtype, bytes: &[u8], to: &mut [bf16]) {
    if dtype == Dtype::Bf16 {
        for (to, bytes) in to.iter_mut().zip(bytes.as_chunks().0) {
            *to = bf16::from_le_bytes(*bytes);
        }
        return;
    }
    let mut values = [0.0; 1024];
    for (to, bytes) in to.chunks_mut(values.len()).zip(bytes.chunks(values.len() * dtype.bytes())) {
        let values = &mut values[..to.len()];
        dtype.widen(bytes, values);
        for (to, value) in to.iter_mut().zip(values) {
            *to = bf16::from_f32(*value);
        }
    }
}
