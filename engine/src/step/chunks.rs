//! What a device is told of a planned chunk.

use crate::executor::{Input, PromptLogprobs, Sample, StepChunk};
use crate::forward::Wanted;
use crate::scheduler::{PlannedChunk, Scheduler};
use crate::sequence::Sequence;

pub(super) fn step_chunk<'a>(scheduler: &'a Scheduler, planned: &PlannedChunk) -> StepChunk<'a> {
    let sequence = scheduler.sequence(planned);
    let input = match planned.pending {
        Some(chunk) => Input::Pending(chunk),
        None => Input::Tokens(&sequence.tokens[planned.start..planned.end()]),
    };
    let sample = Sample {
        params: &sequence.sampling,
        prompt: sequence.prompt(),
        output: sequence.output(),
        pending: usize::from(planned.pending.is_some()),
        allowed: sequence.following.as_ref().and_then(|following| following.mask()),
    };
    StepChunk {
        input,
        start: planned.start,
        blocks: &sequence.blocks,
        prompt_logprobs: prompt_logprobs(sequence, planned),
        sample: planned.samples.then_some(sample),
        pool_from: match planned.wanted {
            Wanted::Hidden(first) => Some(first),
            _ => None,
        },
    }
}

/// The row of a position has the log-probabilities of the next one.
fn prompt_logprobs<'a>(
    sequence: &'a Sequence,
    planned: &PlannedChunk,
) -> Option<PromptLogprobs<'a>> {
    let told = sequence.prompt_logprobs.as_ref()?.len();
    // After a preemption the leading ones are here already; those before this chunk may be on
    // their way.
    let first_row = told.saturating_sub(planned.start);
    let next = planned.start + first_row + 1;
    let tokens = sequence.tokens.get(next..sequence.prompt_tokens.min(planned.end() + 1))?;
    let top = sequence.sampling.prompt_logprobs.unwrap_or(0) as usize;
    (!tokens.is_empty()).then_some(PromptLogprobs { first_row, tokens, top })
}
