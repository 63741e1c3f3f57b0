//! Jobs, and what coordinators ask of nodes.

use std::time::Duration;

use super::{InvalidMessage, bytes16, invalid, required, transfer_id};
use crate::hash::CacheSalt;
use crate::message::{Command, Job};
use crate::sampling::SamplingParams;
use crate::wire::node as wire;
use wire::to_node::Message as Down;

impl From<SamplingParams> for wire::Sampling {
    fn from(p: SamplingParams) -> Self {
        let (bias_tokens, bias_values) = p.logit_bias.into_iter().unzip();
        Self {
            temperature: p.temperature,
            top_k: p.top_k,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            bias_tokens,
            bias_values,
            seed: p.seed,
            max_tokens: p.max_tokens,
            min_tokens: p.min_tokens,
            eos_token_ids: p.eos_token_ids,
            stop_token_ids: p.stop_token_ids,
            logprobs: p.logprobs,
            prompt_logprobs: p.prompt_logprobs,
        }
    }
}

impl TryFrom<wire::Sampling> for SamplingParams {
    type Error = InvalidMessage;

    fn try_from(p: wire::Sampling) -> Result<Self, InvalidMessage> {
        if p.bias_tokens.len() != p.bias_values.len() {
            return invalid("bias_tokens and bias_values differ in length");
        }
        let params = Self {
            temperature: p.temperature,
            top_k: p.top_k,
            top_p: p.top_p,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            logit_bias: p.bias_tokens.into_iter().zip(p.bias_values).collect(),
            seed: p.seed,
            max_tokens: p.max_tokens,
            min_tokens: p.min_tokens,
            eos_token_ids: p.eos_token_ids,
            stop_token_ids: p.stop_token_ids,
            logprobs: p.logprobs,
            prompt_logprobs: p.prompt_logprobs,
        };
        // The node compares token ids with its own vocabulary.
        params.check(u32::MAX).map_err(|e| InvalidMessage(e.to_string()))?;
        Ok(params)
    }
}

impl From<Job> for wire::Job {
    fn from(job: Job) -> Self {
        let deadline = job.deadline.map_or(0, |d| d.as_millis().clamp(1, u32::MAX.into()));
        Self {
            id: Some(job.id.into()),
            tokens: job.tokens,
            prompt_tokens: job.prompt_tokens as u32,
            sampling: Some(job.sampling.into()),
            salt: job.salt.0.map_or_else(Vec::new, |salt| salt.to_vec()),
            deadline_ms: deadline as u32,
        }
    }
}

impl TryFrom<wire::Job> for Job {
    type Error = InvalidMessage;

    fn try_from(job: wire::Job) -> Result<Self, InvalidMessage> {
        let prompt_tokens = job.prompt_tokens as usize;
        if prompt_tokens == 0 || prompt_tokens > job.tokens.len() {
            return invalid(format!(
                "job.prompt_tokens is {prompt_tokens} of {} tokens",
                job.tokens.len()
            ));
        }
        let salt = match &job.salt[..] {
            [] => CacheSalt(None),
            salt => CacheSalt(Some(bytes16(salt, "job.salt")?)),
        };
        Ok(Self {
            id: transfer_id(job.id)?,
            tokens: job.tokens,
            prompt_tokens,
            sampling: required(job.sampling, "job.sampling")?.try_into()?,
            salt,
            deadline: (job.deadline_ms > 0).then(|| Duration::from_millis(job.deadline_ms.into())),
        })
    }
}

impl From<Command> for wire::ToNode {
    fn from(command: Command) -> Self {
        let message = match command {
            Command::Prefill { job, decode } => {
                Down::Prefill(wire::Prefill { job: Some(job.into()), decode: Some(decode.into()) })
            }
            Command::Decode { job, prefill } => Down::Decode(wire::Decode {
                job: Some(job.into()),
                prefill: prefill.map(Into::into),
            }),
            Command::Cancel(id) => Down::Cancel(wire::Cancel { id: Some(id.into()) }),
            Command::SendSnapshot => Down::SendSnapshot(wire::SendSnapshot {}),
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<wire::ToNode> for Command {
    type Error = InvalidMessage;

    fn try_from(message: wire::ToNode) -> Result<Self, InvalidMessage> {
        match required(message.message, "message")? {
            Down::Welcome(_) => invalid("a second welcome"),
            Down::Prefill(prefill) => Ok(Self::Prefill {
                job: required(prefill.job, "prefill.job")?.try_into()?,
                decode: required(prefill.decode, "prefill.decode")?.try_into()?,
            }),
            Down::Decode(decode) => Ok(Self::Decode {
                job: required(decode.job, "decode.job")?.try_into()?,
                prefill: decode.prefill.map(TryInto::try_into).transpose()?,
            }),
            Down::Cancel(cancel) => Ok(Self::Cancel(transfer_id(cancel.id)?)),
            Down::SendSnapshot(_) => Ok(Self::SendSnapshot),
        }
    }
}
