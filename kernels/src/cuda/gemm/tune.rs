//! Choosing algorithms by trying.

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;

use super::plan::Plan;
use super::shape::Shape;
use super::{Addresses, Gemm, WORKSPACE_BYTES};
use crate::cuda::device::Device;
use crate::cuda::error::DeviceError;
use crate::cuda::event::Event;
use crate::cuda::memory::Buffer;
use crate::cuda::stream::Stream;

/// Algorithms that are tried.
const CANDIDATES: usize = 8;
/// Runs of each that are timed, after one that is not.
const RUNS: usize = 5;

/// What trying gained.
#[derive(Clone, PartialEq, Debug)]
pub struct Tuned {
    /// What was computed.
    pub product: String,
    /// Algorithms that ran.
    pub candidates: usize,
    /// Time of a product by the library's first choice.
    pub first_us: f32,
    /// Time of a product by the fastest.
    pub best_us: f32,
}

/// What trying needs, and what it has found.
pub(super) struct Tuner {
    events: (Event, Event),
    /// As large as the device's cache, and written before each run: a model's weights are not in it
    /// either.
    flush: Buffer<u8>,
    pub(super) found: Vec<Tuned>,
}

impl Tuner {
    pub(super) fn new(device: &std::sync::Arc<Device>) -> Result<Self, DeviceError> {
        Ok(Self {
            events: (Event::timed(device)?, Event::timed(device)?),
            flush: Buffer::new(device, device.cache_bytes()?)?,
            found: Vec::new(),
        })
    }

    /// The fastest algorithm of a product, which is computed many times. Waits for the stream.
    pub(super) fn fastest(
        &mut self,
        gemm: &Gemm,
        stream: &Stream,
        (shape, addresses): (&Shape, &Addresses),
    ) -> Result<cublasLtMatmulAlgo_t, DeviceError> {
        let mut plan = Plan::new(gemm.handle, shape, WORKSPACE_BYTES, None)?;
        let mut times = Vec::new();
        let all = plan.descriptors.algorithms(gemm.handle, shape, WORKSPACE_BYTES, CANDIDATES)?;
        for algorithm in all {
            plan.algorithm = algorithm;
            let run = || plan.run(gemm.handle, stream.handle, addresses, gemm.workspace.all());
            // One that does not run after all is none to choose.
            if run().is_ok() {
                times.push((self.time_us(stream, run)?, algorithm));
            }
        }
        let candidates = times.len();
        let first = times.first().map(|(us, _)| *us);
        let best = times.into_iter().min_by(|(a, _), (b, _)| a.total_cmp(b));
        let (Some(first_us), Some((best_us, algorithm))) = (first, best) else {
            return Err(DeviceError::Unsupported(format!(
                "no algorithm of cuBLASLt runs for {shape}"
            )));
        };
        self.found.push(Tuned { product: shape.to_string(), candidates, first_us, best_us });
        Ok(algorithm)
    }

    /// Microseconds of a run: the median of some.
    fn time_us(
        &self,
        stream: &Stream,
        run: impl Fn() -> Result<(), DeviceError>,
    ) -> Result<f32, DeviceError> {
        let (start, end) = &self.events;
        let mut times = [0.0; RUNS];
        for time in &mut times {
            stream.zero(self.flush.all())?;
            start.record(stream)?;
            run()?;
            end.record(stream)?;
            end.synchronize()?;
            *time = end.ms_since(start)? * 1000.0;
        }
        times.sort_by(f32::total_cmp);
        Ok(times[RUNS / 2])
    }
}
