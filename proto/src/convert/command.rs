//! Jobs, and what coordinators ask of nodes.

use std::sync::Arc;
use std::time::Duration;

use super::{InvalidMessage, bytes16, invalid, job_id, pull_id, required, role, transfer_id};
use crate::embedding::Pooling;
use crate::grammar::Grammar;
use crate::hash::CacheSalt;
use crate::message::{Command, Job, Pull};
use crate::sampling::SamplingParams;
use crate::wire::node as wire;
use wire::grammar::Grammar as Kind;
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
            grammar: p.grammar.map(|grammar| Grammar::clone(&grammar).into()),
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
            grammar: p.grammar.map(Grammar::try_from).transpose()?.map(Arc::new),
        };
        // The node compares token ids with its own vocabulary.
        params.check(u32::MAX).map_err(|e| InvalidMessage(e.to_string()))?;
        Ok(params)
    }
}

impl From<Grammar> for wire::Grammar {
    fn from(grammar: Grammar) -> Self {
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => Kind::JsonSchema(schema),
            Grammar::JsonObject => Kind::JsonObject(wire::JsonObject {}),
            Grammar::Regex(regex) => Kind::Regex(regex),
            Grammar::Choice(texts) => Kind::Choice(wire::Choice { texts }),
            Grammar::Lark(lark) => Kind::Lark(lark),
        };
        Self { grammar: Some(grammar) }
    }
}

impl TryFrom<wire::Grammar> for Grammar {
    type Error = InvalidMessage;

    fn try_from(grammar: wire::Grammar) -> Result<Self, InvalidMessage> {
        Ok(match required(grammar.grammar, "sampling.grammar")? {
            Kind::JsonSchema(schema) => Self::JsonSchema(schema),
            Kind::JsonObject(_) => Self::JsonObject,
            Kind::Regex(regex) => Self::Regex(regex),
            Kind::Choice(choice) => Self::Choice(choice.texts),
            Kind::Lark(lark) => Self::Lark(lark),
        })
    }
}

fn salt_bytes(salt: CacheSalt) -> Vec<u8> {
    salt.0.map_or_else(Vec::new, |salt| salt.to_vec())
}

fn salt(bytes: &[u8], field: &str) -> Result<CacheSalt, InvalidMessage> {
    match bytes {
        [] => Ok(CacheSalt(None)),
        salt => Ok(CacheSalt(Some(bytes16(salt, field)?))),
    }
}

impl From<Job> for wire::Job {
    fn from(job: Job) -> Self {
        let deadline = job.deadline.map_or(0, |d| d.as_millis().clamp(1, u32::MAX.into()));
        Self {
            id: Some(job.id.into()),
            tokens: job.tokens.to_vec(),
            prompt_tokens: job.prompt_tokens as u32,
            sampling: Some(job.sampling.into()),
            salt: salt_bytes(job.salt),
            deadline_ms: deadline as u32,
            traceparent: job.trace.map_or_else(String::new, |trace| trace.to_string()),
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
        Ok(Self {
            id: job_id(job.id)?,
            tokens: job.tokens.into(),
            prompt_tokens,
            sampling: required(job.sampling, "job.sampling")?.try_into()?,
            salt: salt(&job.salt, "job.salt")?,
            deadline: (job.deadline_ms > 0).then(|| Duration::from_millis(job.deadline_ms.into())),
            // A trace that cannot be read is no reason to fail.
            trace: job.traceparent.parse().ok(),
        })
    }
}

impl From<Pull> for wire::Pull {
    fn from(pull: Pull) -> Self {
        Self { from: Some(pull.from.into()), tokens: pull.tokens as u32 }
    }
}

/// The pull of a job that has `most` tokens.
fn pull(pull: Option<wire::Pull>, most: usize) -> Result<Option<Pull>, InvalidMessage> {
    let Some(pull) = pull else { return Ok(None) };
    let tokens = pull.tokens as usize;
    if tokens == 0 || tokens > most {
        return invalid(format!("pull.tokens is {tokens} of {most} tokens"));
    }
    Ok(Some(Pull { from: required(pull.from, "pull.from")?.try_into()?, tokens }))
}

fn prefill(message: wire::Prefill) -> Result<Command, InvalidMessage> {
    let job: Job = required(message.job, "prefill.job")?.try_into()?;
    let pull = pull(message.pull, job.tokens.len())?;
    Ok(Command::Prefill {
        job,
        decode: required(message.decode, "prefill.decode")?.try_into()?,
        pull,
    })
}

fn decode(message: wire::Decode) -> Result<Command, InvalidMessage> {
    if message.prefill.is_some() && message.pull.is_some() {
        return invalid("decode.pull with a prefill node");
    }
    let job: Job = required(message.job, "decode.job")?.try_into()?;
    let pull = pull(message.pull, job.tokens.len())?;
    Ok(Command::Decode { job, prefill: message.prefill.map(TryInto::try_into).transpose()?, pull })
}

fn embed(message: wire::Embed) -> Result<Command, InvalidMessage> {
    let Ok(pooling) = wire::Pooling::try_from(message.pooling) else {
        return invalid(format!("embed.pooling is {}", message.pooling));
    };
    let job: Job = required(message.job, "embed.job")?.try_into()?;
    if job.prompt_tokens < job.tokens.len() {
        return invalid("embed.job has output");
    }
    Ok(Command::Embed { job, pooling: pooling.into() })
}

impl From<Pooling> for wire::Pooling {
    fn from(pooling: Pooling) -> Self {
        match pooling {
            Pooling::Last => Self::Last,
            Pooling::Mean => Self::Mean,
        }
    }
}

impl From<wire::Pooling> for Pooling {
    fn from(pooling: wire::Pooling) -> Self {
        match pooling {
            wire::Pooling::Last => Self::Last,
            wire::Pooling::Mean => Self::Mean,
        }
    }
}

fn serve(message: wire::Serve) -> Result<Command, InvalidMessage> {
    if message.tokens.is_empty() {
        return invalid("serve.tokens is empty");
    }
    Ok(Command::Serve {
        id: pull_id(message.id)?,
        tokens: message.tokens,
        salt: salt(&message.salt, "serve.salt")?,
        to: required(message.to, "serve.to")?.try_into()?,
    })
}

impl From<Command> for wire::ToNode {
    fn from(command: Command) -> Self {
        let message = match command {
            Command::Prefill { job, decode, pull } => Down::Prefill(wire::Prefill {
                job: Some(job.into()),
                decode: Some(decode.into()),
                pull: pull.map(Into::into),
            }),
            Command::Decode { job, prefill, pull } => Down::Decode(wire::Decode {
                job: Some(job.into()),
                prefill: prefill.map(Into::into),
                pull: pull.map(Into::into),
            }),
            Command::Embed { job, pooling } => Down::Embed(wire::Embed {
                job: Some(job.into()),
                pooling: wire::Pooling::from(pooling).into(),
            }),
            Command::Serve { id, tokens, salt, to } => Down::Serve(wire::Serve {
                id: Some(id.into()),
                tokens,
                salt: salt_bytes(salt),
                to: Some(to.into()),
            }),
            Command::Cancel(id) => Down::Cancel(wire::Cancel { id: Some(id.into()) }),
            Command::SendSnapshot => Down::SendSnapshot(wire::SendSnapshot {}),
            Command::SetRole(role) => {
                Down::SetRole(wire::SetRole { role: role.as_str().to_owned() })
            }
            Command::SetDraining(draining) => Down::SetDraining(wire::SetDraining { draining }),
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<wire::ToNode> for Command {
    type Error = InvalidMessage;

    fn try_from(message: wire::ToNode) -> Result<Self, InvalidMessage> {
        match required(message.message, "message")? {
            Down::Welcome(_) => invalid("a second welcome"),
            Down::Prefill(message) => prefill(message),
            Down::Decode(message) => decode(message),
            Down::Embed(message) => embed(message),
            Down::Serve(message) => serve(message),
            Down::Cancel(cancel) => Ok(Self::Cancel(transfer_id(cancel.id)?)),
            Down::SendSnapshot(_) => Ok(Self::SendSnapshot),
            Down::SetRole(set) => Ok(Self::SetRole(role(&set.role, "set_role.role")?)),
            Down::SetDraining(set) => Ok(Self::SetDraining(set.draining)),
        }
    }
}
