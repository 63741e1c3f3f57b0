//! Choosing an algorithm by trying.

use super::{Gemm, Matmul, Output, Plan, WORKSPACE_BYTES};
use crate::cuda::error::DeviceError;
use crate::cuda::event::Event;
use crate::cuda::stream::Stream;

/// Algorithms that are tried.
const CANDIDATES: usize = 16;
/// Runs of each that are timed, after one that is not.
const RUNS: u32 = 10;

/// What trying gained.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tuned {
    /// Algorithms that ran.
    pub candidates: usize,
    /// Time of a product by the library's first choice.
    pub first_us: f32,
    /// Time of a product by the fastest.
    pub best_us: f32,
}

impl Gemm {
    /// Tries the algorithms for a product and keeps the fastest for products of its shape. `y`
    /// holds nonsense afterwards. Weights come from the cache where they fit in it, unlike in a
    /// model: worth it for large products only.
    ///
    /// # Errors
    /// If the library has no algorithm for it, or fails.
    ///
    /// # Panics
    /// As [`Gemm::multiply`], and if there is nothing to multiply.
    pub fn tune<Y: Output>(
        &self,
        stream: &Stream,
        product: &Matmul<'_, Y>,
    ) -> Result<Tuned, DeviceError> {
        let (shape, addresses) = product.describe();
        assert!(shape.rows > 0, "a product to time");
        self.device.bind()?;
        let mut plan = Plan::new(self.handle, &shape, WORKSPACE_BYTES)?;
        let events = (Event::timed(&self.device)?, Event::timed(&self.device)?);
        let mut times = Vec::new();
        for algorithm in plan.algorithms(self.handle, &shape, WORKSPACE_BYTES, CANDIDATES)? {
            plan.algorithm = algorithm;
            let run = || plan.run(self.handle, stream.handle, &addresses, self.workspace.all());
            // One that does not run after all is none to choose.
            if run().is_ok() {
                times.push((time_us(stream, &events, run)?, algorithm));
            }
        }
        let candidates = times.len();
        let first = times.first().map(|(us, _)| *us);
        let best = times.into_iter().min_by(|(a, _), (b, _)| a.total_cmp(b));
        let (Some(first_us), Some((best_us, algorithm))) = (first, best) else {
            return Err(DeviceError::Unsupported(format!("no algorithm runs for {shape:?}")));
        };
        plan.algorithm = algorithm;
        let mut plans = self.plans.lock().expect("nothing panics with the lock");
        plans.insert(shape, plan);
        Ok(Tuned { candidates, first_us, best_us })
    }
}

/// Microseconds of a run.
fn time_us(
    stream: &Stream,
    (start, end): &(Event, Event),
    run: impl Fn() -> Result<(), DeviceError>,
) -> Result<f32, DeviceError> {
    start.record(stream)?;
    for _ in 0..RUNS {
        run()?;
    }
    end.record(stream)?;
    end.synchronize()?;
    Ok(end.ms_since(start)? * 1000.0 / RUNS as f32)
}
