//! What a model does before it serves, so that no request has to wait for it: matrix products try
//! their algorithms, libraries load their kernels, and decode steps are captured as graphs.
//!
//! It computes steps that nobody wants over a cache of one block, while the cache proper is not
//! there yet. So what all of that takes of the device's memory is known when the cache is sized.

#![expect(unsafe_code, reason = "launches steps")]

use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use baton_kernels::cuda::{DeviceError, Tuned};
use baton_proto::sampling::SamplingParams;

use super::{GpuLoadError, GpuModel, MAX_GRAPH_ROWS};
use crate::executor::{DeviceFailure, Executor, Input, Sample, Step, StepChunk};

/// What was done before the first request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WarmUp {
    /// Sizes of steps that were captured.
    pub graphs: usize,
    /// Matrix products of the first device, and what trying their algorithms gained.
    pub tuned: Vec<Tuned>,
    /// How long it took.
    pub took: Duration,
}

impl fmt::Display for WarmUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |time: fn(&Tuned) -> f32| self.tuned.iter().map(time).sum::<f32>();
        let (first, best) = (sum(|tuned| tuned.first_us), sum(|tuned| tuned.best_us));
        let saved = if first > 0.0 { 100.0 * (1.0 - best / first) } else { 0.0 };
        let (graphs, products, took) = (self.graphs, self.tuned.len(), self.took.as_secs_f32());
        write!(f, "{graphs} graphs captured in {took:.1} s; of {products} matrix products, ")?;
        write!(f, "algorithms that were tried save {saved:.0} % of the time")
    }
}

/// The parts of a model, one for each device, which compute together.
pub(super) trait Parts: Executor {
    /// Lets every part do something, side by side.
    fn on_each(&mut self, work: &Work<'_>) -> Result<(), DeviceError>;

    /// The first device's.
    fn first(&mut self) -> &mut GpuModel;
}

/// What a part is let do.
pub(super) type Work<'a> = dyn Fn(&mut GpuModel) -> Result<(), DeviceError> + Sync + 'a;

impl Parts for GpuModel {
    fn on_each(&mut self, work: &Work<'_>) -> Result<(), DeviceError> {
        work(self)
    }

    fn first(&mut self) -> &mut GpuModel {
        self
    }
}

/// Prepares for steps of up to so many tokens, for no longer than `budget` and one step more:
/// first for the small ones, which are the most frequent. What there is no time for is done when
/// such a step comes.
pub(super) fn warm_up(
    model: &mut impl Parts,
    block_tokens: usize,
    tokens: usize,
    budget: Duration,
) -> Result<(), GpuLoadError> {
    let began = Instant::now();
    if budget.is_zero() {
        return Ok(());
    }
    let late = || began.elapsed() >= budget;
    model.on_each(&|part| {
        drop(part.reserve_cache(block_tokens as u32, 1)?);
        part.gemm.start_tuning()
    })?;
    let sequences = model.first().results.rows();
    for rows in powers_of_two(sequences.min(MAX_GRAPH_ROWS)).take_while(|_| !late()) {
        rehearse(model, rows.min(sequences), 1)?;
    }
    let tokens = tokens.min(model.max_model_len());
    for tokens in powers_of_two(tokens).map(|power| power.min(tokens)).take_while(|_| !late()) {
        rehearse(model, 1, tokens)?;
    }
    model.on_each(&|part| {
        part.graph_bytes = part.free_bytes()?; // until it is known
        Ok(())
    })?;
    capture(model)?;
    model.on_each(&|part| {
        let before = std::mem::take(&mut part.graph_bytes);
        part.graph_bytes = before.saturating_sub(part.free_bytes()?);
        part.warm_up.tuned = part.gemm.stop_tuning();
        part.warm_up.graphs = part.graphs.len();
        part.graphs.clear();
        part.cache = None;
        part.warm_up.took = began.elapsed();
        Ok(())
    })?;
    Ok(())
}

/// Captures steps of all sizes that were computed before, over the cache that there is.
pub(super) fn capture(model: &mut impl Parts) -> Result<(), DeviceFailure> {
    let first = model.first();
    let (sizes, sequences) = (first.warm.clone(), first.results.rows());
    sizes.into_iter().try_for_each(|rows| rehearse(model, rows.min(sequences), 1))
}

/// 1, 2, 4 and so on, until one is `most` at least.
fn powers_of_two(most: usize) -> impl Iterator<Item = usize> {
    (0..=most.next_power_of_two().ilog2()).map(|power| 1 << power)
}

/// Computes the first tokens of some sequences, all of them in block 0.
fn rehearse(
    model: &mut impl Executor,
    sequences: usize,
    tokens: usize,
) -> Result<(), DeviceFailure> {
    // Longer tables than needed: the memory for numbers grows to what larger steps need, too.
    let (prompt, blocks) = (vec![0; tokens], vec![0; tokens]);
    let chunk = StepChunk {
        input: Input::Tokens(&prompt),
        start: 0,
        blocks: &blocks,
        prompt_logprobs: None,
        sample: Some(Sample {
            params: &SamplingParams::default(),
            prompt: &prompt,
            output: &[],
            pending: 0,
            allowed: None,
        }),
        pool_from: None,
    };
    let step = Step { chunks: vec![chunk; sequences], watched: false };
    // SAFETY: nobody else has the cache yet, whose first block is the only one that is used. All
    // rows write to it at once, which on a device gives wrong numbers; nobody wants them.
    unsafe { model.launch(&step, &mut |_| ControlFlow::Continue(())) }?;
    model.finish(&mut |_| ControlFlow::Continue(()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_up_to_the_one_that_holds_the_largest() {
        assert_eq!(powers_of_two(1).collect::<Vec<_>>(), [1]);
        assert_eq!(powers_of_two(5).collect::<Vec<_>>(), [1, 2, 4, 8]);
        assert_eq!(powers_of_two(256).last(), Some(256));
    }

    #[test]
    fn what_was_gained_is_said() {
        let tuned =
            |first_us, best_us| Tuned { product: String::new(), candidates: 3, first_us, best_us };
        let warm_up = WarmUp {
            graphs: 9,
            tuned: vec![tuned(60.0, 50.0), tuned(40.0, 40.0)],
            took: Duration::from_millis(1500),
        };
        let expected = "9 graphs captured in 1.5 s; of 2 matrix products, algorithms that were \
                        tried save 10 % of the time";
        assert_eq!(warm_up.to_string(), expected);
        assert!(WarmUp::default().to_string().ends_with("save 0 % of the time"));
    }
}
