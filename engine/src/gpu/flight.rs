//! Steps that a device computes, and their results.

use std::sync::Arc;

use baton_kernels::cuda::{
    Buffer, Device, DeviceError, Event, MAX_TOP, Pinned, SamplingOutputs, Slice, Stream,
};
use baton_proto::message::Logprobs;
use half::bf16;

use super::sampling::Answers;
use crate::pooling::pool;
use crate::sampler::Sampled;

/// A launched step.
pub(super) struct Flight {
    /// Its place among the [`Slot`]s.
    pub(super) slot: usize,
    /// How many chunks it has.
    pub(super) chunks: usize,
    /// By row that samples: the chunk, and how many alternatives are wanted, if any are.
    pub(super) sampling: Vec<(usize, Option<u32>)>,
    /// Whether layers are told.
    pub(super) watched: bool,
    /// Chunks whose hidden states are summed, and of how many rows.
    pub(super) pooling: Vec<(usize, usize)>,
    /// By chunk; they are known at the launch.
    pub(super) prompt_logprobs: Vec<Vec<(u32, Logprobs)>>,
}

/// What a step in flight needs, used again by later ones.
pub(super) struct Slot {
    /// When the device began with the step, and when it ended.
    pub(super) began: Event,
    pub(super) ended: Event,
    /// When keys and values of each layer were written.
    pub(super) layers: Vec<Event>,
    results: Pinned<u32>,
    /// Hidden states; grows to those of the largest step that wanted some. None: nobody wanted
    /// any, or there was no memory for those of the last step.
    hidden: Option<Pinned<bf16>>,
}

impl Slot {
    pub(super) fn new(
        device: &Arc<Device>,
        layers: usize,
        rows: usize,
    ) -> Result<Self, DeviceError> {
        Ok(Self {
            began: Event::timed(device)?,
            ended: Event::timed(device)?,
            layers: (0..layers).map(|_| Event::new(device)).collect::<Result<_, _>>()?,
            results: Pinned::new(device, rows * ROW_WORDS)?,
            hidden: None,
        })
    }

    /// How long the step took on the device, once it ended.
    pub(super) fn took_ms(&self) -> Result<f32, DeviceError> {
        self.ended.synchronize()?;
        self.ended.ms_since(&self.began)
    }

    /// Copies hidden states to the host, if it has memory for them: who wanted them fails then, and
    /// not all that the device computes.
    pub(super) fn download_hidden(
        &mut self,
        stream: &Stream,
        values: Slice<'_, bf16>,
    ) -> Result<(), DeviceError> {
        if self.hidden.as_ref().is_none_or(|hidden| hidden.len() < values.len()) {
            // Before there is more.
            self.hidden = None;
            self.hidden = Pinned::new(stream.device(), values.len().next_power_of_two()).ok();
        }
        self.hidden.as_mut().map_or(Ok(()), |hidden| stream.download(values, hidden, 0))
    }

    /// The sums over the hidden states of the step's chunks, once they are here; none if there was
    /// no memory for them.
    pub(super) fn pooled(
        &self,
        pooling: &[(usize, usize)],
        width: usize,
    ) -> Result<Vec<(usize, Vec<f64>)>, DeviceError> {
        let Some(hidden) = self.hidden.as_ref().filter(|_| !pooling.is_empty()) else {
            return Ok(Vec::new());
        };
        let mut rows = hidden.as_slice()?.chunks(width);
        let sum = |(chunk, count): &(usize, usize)| {
            let mut sum = Vec::new();
            let own = rows.by_ref().take(*count);
            own.for_each(|row| pool(&mut sum, row.iter().map(|x| f64::from(x.to_f32()))));
            (*chunk, sum)
        };
        Ok(pooling.iter().map(sum).collect())
    }

    /// What the rows of the step sampled, once they are here.
    pub(super) fn sampled(
        &self,
        sampling: &[(usize, Option<u32>)],
    ) -> Result<Vec<(usize, Sampled)>, DeviceError> {
        let words = self.results.as_slice()?;
        let rows = words.len() / ROW_WORDS;
        let (tokens, rest) = words.split_at(rows);
        let (logprobs, rest) = rest.split_at(rows);
        let (top_tokens, top_logprobs) = rest.split_at(rows * MAX_TOP);
        let answers = Answers { tokens, logprobs, top_tokens, top_logprobs };
        let row = |(row, (chunk, top)): (usize, &(usize, Option<u32>))| {
            (*chunk, answers.sampled(row, *top))
        };
        Ok(sampling.iter().enumerate().map(row).collect())
    }
}

/// Words of a row's results: a token, its log-probability, and alternatives with theirs.
const ROW_WORDS: usize = 2 + 2 * MAX_TOP;

/// What the last step sampled, on the device: `[rows]` tokens, `[rows]` log-probabilities, `[rows,
/// MAX_TOP]` tokens and log-probabilities of alternatives.
pub(super) struct Results {
    buffer: Buffer<u32>,
    rows: usize,
}

impl Results {
    pub(super) fn new(device: &Arc<Device>, rows: usize) -> Result<Self, DeviceError> {
        Ok(Self { buffer: Buffer::new(device, rows * ROW_WORDS)?, rows })
    }

    /// Most rows that sample.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// The tokens.
    pub(super) fn tokens(&self) -> Slice<'_, u32> {
        self.buffer.slice(0..self.rows)
    }

    /// Where a sampler writes the results of `count` rows.
    pub(super) fn outputs(&self, count: usize) -> SamplingOutputs<'_> {
        let at = |first: usize, words: usize| {
            self.buffer.slice(first * self.rows..first * self.rows + words)
        };
        SamplingOutputs {
            tokens: at(0, count),
            logprobs: at(1, count).cast(),
            top_tokens: at(2, count * MAX_TOP),
            top_logprobs: at(2 + MAX_TOP, count * MAX_TOP).cast(),
        }
    }

    /// Copies the results of the first `rows` rows to the host.
    pub(super) fn download(
        &self,
        stream: &Stream,
        to: &mut Slot,
        rows: usize,
        logprobs: bool,
    ) -> Result<(), DeviceError> {
        let mut copy = |first: usize, words: usize| {
            let start = first * self.rows;
            stream.download(self.buffer.slice(start..start + words), &mut to.results, start)
        };
        copy(0, rows)?;
        if logprobs {
            copy(1, rows)?;
            copy(2, rows * MAX_TOP)?;
            copy(2 + MAX_TOP, rows * MAX_TOP)?;
        }
        Ok(())
    }
}
