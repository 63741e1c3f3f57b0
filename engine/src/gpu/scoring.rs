//! Log-probabilities of prompts: rare, so their logits come to the host.

use baton_kernels::cuda::{DeviceError, Pinned};
use baton_proto::message::Logprobs;

use super::pass::Pass;
use crate::executor::{PromptLogprobs, Step};
use crate::sampler::logprobs;

/// Reads logits.
#[derive(Default)]
pub(super) struct Scoring {
    logits: Option<Pinned<f32>>,
}

impl Scoring {
    /// Rows of logits that come at once.
    pub(super) const ROWS: usize = 64;

    /// By chunk: the log-probabilities that are wanted of its prompt. Their rows begin with row
    /// `first` of the wanted ones. Waits for the device.
    pub(super) fn run(
        &mut self,
        pass: &Pass<'_>,
        step: &Step<'_>,
        mut first: usize,
    ) -> Result<Vec<Vec<(u32, Logprobs)>>, DeviceError> {
        let mut found = vec![Vec::new(); step.chunks.len()];
        for (found, chunk) in found.iter_mut().zip(&step.chunks) {
            let Some(PromptLogprobs { tokens, top, .. }) = chunk.prompt_logprobs else { continue };
            for tokens in tokens.chunks(Self::ROWS) {
                found.extend(self.rows(pass, first, tokens, top)?);
                first += tokens.len();
            }
        }
        Ok(found)
    }

    fn rows(
        &mut self,
        pass: &Pass<'_>,
        first: usize,
        tokens: &[u32],
        top: usize,
    ) -> Result<Vec<(u32, Logprobs)>, DeviceError> {
        let (a, vocab) = (pass.activations, pass.config.vocab_size);
        let (width, stride) = (a.wanted.width, a.logits.width);
        let end = first + tokens.len();
        let logits = a.logits.first(tokens.len());
        pass.score(a.wanted.first(end).slice(first * width..end * width), logits)?;
        if self.logits.is_none() {
            self.logits = Some(Pinned::new(pass.stream.device(), Self::ROWS * stride)?);
        }
        let here = self.logits.as_mut().expect("it was just made");
        pass.stream.download(logits, here, 0)?;
        if let Some(member) = pass.member {
            member.group.wait(|| here.is_ready())?;
        }
        let rows = here.as_slice()?.chunks(stride).zip(tokens);
        Ok(rows.map(|(row, token)| (*token, logprobs(&row[..vocab], *token, top))).collect())
    }
}
