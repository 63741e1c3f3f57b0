//! Between wire messages and domain types: the only place where what a machine of the cluster
//! says is validated.

use std::time::Duration;

use crate::geometry::{KvDtype, KvGeometry};
use crate::hash::{BlockHash, CacheSalt, ModelRoot};
use crate::ids::{Epoch, NodeId, RequestId, Role, TransferId};
use crate::message::{
    BlockCounts, Command, Hello, Job, Logprobs, NodeEvent, NodeFinish, PROTOCOL, Peer, Report,
    Retry, TokenEvent,
};
use crate::sampling::SamplingParams;
use crate::wire::node as wire;
use wire::from_node::Message as Up;
use wire::to_node::Message as Down;

/// A message breaks the protocol; the connection that carried it is to be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid message: {0}")]
pub struct InvalidMessage(pub String);

fn invalid<T>(what: impl Into<String>) -> Result<T, InvalidMessage> {
    Err(InvalidMessage(what.into()))
}

fn required<T>(value: Option<T>, field: &str) -> Result<T, InvalidMessage> {
    value.ok_or_else(|| InvalidMessage(format!("{field} is missing")))
}

fn bytes16(bytes: &[u8], field: &str) -> Result<[u8; 16], InvalidMessage> {
    let length = bytes.len();
    bytes.try_into().map_err(|_| InvalidMessage(format!("{field} has {length} bytes, not 16")))
}

fn duration_ms(ms: f64, field: &str) -> Result<Duration, InvalidMessage> {
    Duration::try_from_secs_f64(ms / 1e3)
        .map_err(|_| InvalidMessage(format!("{field} is no duration")))
}

fn as_ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn hashes(bytes: &[u8], field: &str) -> Result<Vec<BlockHash>, InvalidMessage> {
    let (whole, rest) = bytes.as_chunks::<16>();
    if !rest.is_empty() {
        return invalid(format!("{field} is no list of 16-byte hashes"));
    }
    Ok(whole.iter().copied().map(BlockHash).collect())
}

fn hash_bytes(hashes: &[BlockHash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.0).collect()
}

// === identities ===

impl From<TransferId> for wire::TransferId {
    fn from(id: TransferId) -> Self {
        Self { request: id.request.0.to_be_bytes().to_vec(), attempt: id.attempt }
    }
}

fn transfer_id(id: Option<wire::TransferId>) -> Result<TransferId, InvalidMessage> {
    let id = required(id, "id")?;
    let request = RequestId(u128::from_be_bytes(bytes16(&id.request, "id.request")?));
    Ok(TransferId { request, attempt: id.attempt })
}

impl From<Peer> for wire::Peer {
    fn from(peer: Peer) -> Self {
        Self { node: peer.node.to_string(), epoch: peer.epoch.0, kv_address: peer.kv_address }
    }
}

impl TryFrom<wire::Peer> for Peer {
    type Error = InvalidMessage;

    fn try_from(peer: wire::Peer) -> Result<Self, InvalidMessage> {
        let node: NodeId =
            peer.node.parse().map_err(|e| InvalidMessage(format!("peer.node: {e}")))?;
        Ok(Self { node, epoch: Epoch(peer.epoch), kv_address: peer.kv_address })
    }
}

impl From<KvGeometry> for wire::Geometry {
    fn from(g: KvGeometry) -> Self {
        Self {
            layers: g.layers,
            kv_heads: g.kv_heads,
            head_dim: g.head_dim,
            dtype: g.dtype.as_str().to_owned(),
            block_tokens: g.block_tokens,
        }
    }
}

impl TryFrom<wire::Geometry> for KvGeometry {
    type Error = InvalidMessage;

    fn try_from(g: wire::Geometry) -> Result<Self, InvalidMessage> {
        // Far above any real model, and small enough that sizes cannot overflow.
        let bounds = [
            (g.layers, 4096, "geometry.layers"),
            (g.kv_heads, 4096, "geometry.kv_heads"),
            (g.head_dim, 4096, "geometry.head_dim"),
            (g.block_tokens, 4096, "geometry.block_tokens"),
        ];
        for (value, most, field) in bounds {
            if value == 0 || value > most {
                return invalid(format!("{field} is {value}; it must be from 1 to {most}"));
            }
        }
        let dtype = required(KvDtype::parse(&g.dtype), "geometry.dtype f32, bf16 or f16")?;
        Ok(Self {
            layers: g.layers,
            kv_heads: g.kv_heads,
            head_dim: g.head_dim,
            dtype,
            block_tokens: g.block_tokens,
        })
    }
}

// === jobs and commands ===

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

// === what nodes say ===

impl From<Hello> for wire::FromNode {
    fn from(hello: Hello) -> Self {
        let hello = wire::Hello {
            protocol: PROTOCOL,
            role: hello.role.as_str().to_owned(),
            epoch: hello.epoch.0,
            model: hello.model,
            model_root: hello.root.0.to_vec(),
            geometry: Some(hello.geometry.into()),
            max_model_len: hello.max_model_len,
            vocab_size: hello.vocab_size,
            total_blocks: hello.total_blocks,
            kv_address: hello.kv_address,
            transports: hello.transports,
        };
        Self { message: Some(Up::Hello(hello)) }
    }
}

impl TryFrom<wire::FromNode> for Hello {
    type Error = InvalidMessage;

    fn try_from(message: wire::FromNode) -> Result<Self, InvalidMessage> {
        let Some(Up::Hello(hello)) = message.message else {
            return invalid("the first message is not hello");
        };
        if hello.protocol != PROTOCOL {
            let theirs = hello.protocol;
            return invalid(format!("the node speaks protocol {theirs}, this one {PROTOCOL}"));
        }
        let role = [Role::Prefill, Role::Decode].into_iter().find(|r| r.as_str() == hello.role);
        if hello.model.is_empty() || hello.model.len() > 256 || hello.transports.len() > 8 {
            return invalid("hello.model must have 1 to 256 bytes, hello.transports at most 8");
        }
        if hello.vocab_size == 0 || hello.max_model_len == 0 {
            return invalid("hello.vocab_size and hello.max_model_len must be above 0");
        }
        Ok(Self {
            role: required(role, "hello.role prefill or decode")?,
            epoch: Epoch(hello.epoch),
            model: hello.model,
            root: ModelRoot(bytes16(&hello.model_root, "hello.model_root")?),
            geometry: required(hello.geometry, "hello.geometry")?.try_into()?,
            max_model_len: hello.max_model_len,
            vocab_size: hello.vocab_size,
            total_blocks: hello.total_blocks,
            kv_address: hello.kv_address,
            transports: hello.transports,
        })
    }
}

impl From<Logprobs> for wire::Logprobs {
    fn from(l: Logprobs) -> Self {
        let (top_tokens, top_logprobs) = l.top.into_iter().unzip();
        Self { logprob: l.logprob, top_tokens, top_logprobs }
    }
}

impl From<wire::Logprobs> for Logprobs {
    fn from(l: wire::Logprobs) -> Self {
        Self { logprob: l.logprob, top: l.top_tokens.into_iter().zip(l.top_logprobs).collect() }
    }
}

impl From<NodeFinish> for wire::Finish {
    fn from(finish: NodeFinish) -> Self {
        match finish {
            NodeFinish::EndOfSequence => Self { length: false, stop_token: None },
            NodeFinish::StopToken(token) => Self { length: false, stop_token: Some(token) },
            NodeFinish::Length => Self { length: true, stop_token: None },
        }
    }
}

impl From<wire::Finish> for NodeFinish {
    fn from(finish: wire::Finish) -> Self {
        match finish {
            wire::Finish { length: true, .. } => Self::Length,
            wire::Finish { stop_token: Some(token), .. } => Self::StopToken(token),
            wire::Finish { .. } => Self::EndOfSequence,
        }
    }
}

impl From<TokenEvent> for wire::Token {
    fn from(token: TokenEvent) -> Self {
        Self {
            id: Some(token.id.into()),
            position: token.position,
            token: token.token,
            logprobs: token.logprobs.map(Into::into),
            finish: token.finish.map(Into::into),
            prefill_ms: token.prefill.map(as_ms),
        }
    }
}

impl TryFrom<wire::Token> for TokenEvent {
    type Error = InvalidMessage;

    fn try_from(token: wire::Token) -> Result<Self, InvalidMessage> {
        Ok(Self {
            id: transfer_id(token.id)?,
            position: token.position,
            token: token.token,
            logprobs: token.logprobs.map(Into::into),
            finish: token.finish.map(Into::into),
            prefill: token.prefill_ms.map(|ms| duration_ms(ms, "token.prefill_ms")).transpose()?,
        })
    }
}

impl From<Retry> for wire::Retry {
    fn from(retry: Retry) -> Self {
        match retry {
            Retry::Never => Self::Never,
            Retry::SameNode => Self::SameNode,
            Retry::OtherNode => Self::OtherNode,
        }
    }
}

impl From<wire::Retry> for Retry {
    fn from(retry: wire::Retry) -> Self {
        match retry {
            wire::Retry::Never => Self::Never,
            wire::Retry::SameNode => Self::SameNode,
            wire::Retry::OtherNode => Self::OtherNode,
        }
    }
}

impl From<Report> for wire::Report {
    fn from(r: Report) -> Self {
        Self {
            draining: r.draining,
            waiting: r.waiting,
            running: r.running,
            queued_tokens: r.queued_tokens,
            free_blocks: r.blocks.free,
            active_blocks: r.blocks.active,
            cached_blocks: r.blocks.cached,
            leased_blocks: r.blocks.leased,
            prefill_tokens_per_second: r.prefill_tokens_per_second,
            decode_step_ms: r.decode_step_ms,
        }
    }
}

impl TryFrom<wire::Report> for Report {
    type Error = InvalidMessage;

    fn try_from(r: wire::Report) -> Result<Self, InvalidMessage> {
        for (value, field) in [
            (r.prefill_tokens_per_second, "report.prefill_tokens_per_second"),
            (r.decode_step_ms, "report.decode_step_ms"),
        ] {
            if !value.is_finite() || value < 0.0 {
                return invalid(format!("{field} is {value}"));
            }
        }
        Ok(Self {
            draining: r.draining,
            waiting: r.waiting,
            running: r.running,
            queued_tokens: r.queued_tokens,
            blocks: BlockCounts {
                free: r.free_blocks,
                active: r.active_blocks,
                cached: r.cached_blocks,
                leased: r.leased_blocks,
            },
            prefill_tokens_per_second: r.prefill_tokens_per_second,
            decode_step_ms: r.decode_step_ms,
        })
    }
}

impl From<NodeEvent> for wire::FromNode {
    fn from(event: NodeEvent) -> Self {
        let message = match event {
            NodeEvent::Report(report) => Up::Report(report.into()),
            NodeEvent::Cache { sequence, stored, removed } => Up::Cache(wire::CacheEvents {
                sequence,
                stored: hash_bytes(&stored),
                removed: hash_bytes(&removed),
            }),
            NodeEvent::Snapshot { sequence, hashes, last } => {
                Up::Snapshot(wire::CacheSnapshot { sequence, hashes: hash_bytes(&hashes), last })
            }
            NodeEvent::Started { id, cached_tokens, queued } => Up::Started(wire::Started {
                id: Some(id.into()),
                cached_tokens,
                queue_ms: as_ms(queued),
            }),
            NodeEvent::Tokens(tokens) => {
                Up::Tokens(wire::Tokens { tokens: tokens.into_iter().map(Into::into).collect() })
            }
            NodeEvent::PromptLogprobs { id, tokens } => {
                let tokens = tokens
                    .into_iter()
                    .map(|(token, l)| wire::PromptLogprob { token, logprobs: Some(l.into()) })
                    .collect();
                Up::PromptLogprobs(wire::PromptLogprobs { id: Some(id.into()), tokens })
            }
            NodeEvent::Transferred { id, hidden, exposed, bytes, blocks } => {
                Up::Transferred(wire::Transferred {
                    id: Some(id.into()),
                    hidden_ms: as_ms(hidden),
                    exposed_ms: as_ms(exposed),
                    bytes,
                    blocks,
                })
            }
            NodeEvent::Failed { id, reason, retry } => Up::Failed(wire::Failed {
                id: Some(id.into()),
                reason,
                retry: wire::Retry::from(retry).into(),
            }),
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<wire::FromNode> for NodeEvent {
    type Error = InvalidMessage;

    fn try_from(message: wire::FromNode) -> Result<Self, InvalidMessage> {
        Ok(match required(message.message, "message")? {
            Up::Hello(_) => return invalid("a second hello"),
            Up::Report(report) => Self::Report(report.try_into()?),
            Up::Cache(cache) => Self::Cache {
                sequence: cache.sequence,
                stored: hashes(&cache.stored, "cache.stored")?,
                removed: hashes(&cache.removed, "cache.removed")?,
            },
            Up::Snapshot(snapshot) => Self::Snapshot {
                sequence: snapshot.sequence,
                hashes: hashes(&snapshot.hashes, "snapshot.hashes")?,
                last: snapshot.last,
            },
            Up::Started(started) => Self::Started {
                id: transfer_id(started.id)?,
                cached_tokens: started.cached_tokens,
                queued: duration_ms(started.queue_ms, "started.queue_ms")?,
            },
            Up::Tokens(tokens) => {
                let tokens: Result<_, _> =
                    tokens.tokens.into_iter().map(TryInto::try_into).collect();
                Self::Tokens(tokens?)
            }
            Up::PromptLogprobs(prompt) => Self::PromptLogprobs {
                id: transfer_id(prompt.id)?,
                tokens: prompt
                    .tokens
                    .into_iter()
                    .map(|t| Ok((t.token, required(t.logprobs, "prompt.logprobs")?.into())))
                    .collect::<Result<_, InvalidMessage>>()?,
            },
            Up::Transferred(done) => Self::Transferred {
                id: transfer_id(done.id)?,
                hidden: duration_ms(done.hidden_ms, "transferred.hidden_ms")?,
                exposed: duration_ms(done.exposed_ms, "transferred.exposed_ms")?,
                bytes: done.bytes,
                blocks: done.blocks,
            },
            Up::Failed(failed) => Self::Failed {
                id: transfer_id(failed.id.clone())?,
                retry: failed.retry().into(),
                reason: failed.reason,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            id: TransferId { request: RequestId(1 << 100), attempt: 3 },
            tokens: vec![5, 6, 7],
            prompt_tokens: 2,
            sampling: SamplingParams {
                logit_bias: vec![(3, -1.5)],
                logprobs: Some(2),
                eos_token_ids: vec![9],
                ..SamplingParams::default()
            },
            salt: CacheSalt::from_text("tenant"),
            deadline: Some(Duration::from_millis(1500)),
        }
    }

    fn peer() -> Peer {
        let node = "decode-0".parse().unwrap();
        Peer { node, epoch: Epoch(7), kv_address: "127.0.0.1:1".into() }
    }

    #[test]
    fn commands_survive_the_wire() {
        let commands = [
            Command::Prefill { job: job(), decode: peer() },
            Command::Decode { job: job(), prefill: Some(peer()) },
            Command::Decode { job: Job { deadline: None, ..job() }, prefill: None },
            Command::Cancel(job().id),
            Command::SendSnapshot,
        ];
        for command in commands {
            let wire = wire::ToNode::from(command.clone());
            assert_eq!(Command::try_from(wire), Ok(command));
        }
    }

    #[test]
    fn events_survive_the_wire() {
        let id = job().id;
        let logprobs = Logprobs { logprob: -0.5, top: vec![(1, -0.5), (2, -1.0)] };
        let token = TokenEvent {
            id,
            position: 4,
            token: 11,
            logprobs: Some(logprobs.clone()),
            finish: Some(NodeFinish::StopToken(11)),
            prefill: Some(Duration::from_millis(12)),
        };
        let hash = |n| BlockHash([n; 16]);
        let events = [
            NodeEvent::Report(Report { waiting: 1, decode_step_ms: 2.5, ..Report::default() }),
            NodeEvent::Cache {
                sequence: 1,
                stored: vec![hash(1), hash(2)],
                removed: vec![hash(3)],
            },
            NodeEvent::Snapshot { sequence: 9, hashes: vec![hash(4)], last: true },
            NodeEvent::Started { id, cached_tokens: 3, queued: Duration::from_millis(5) },
            NodeEvent::Tokens(vec![
                TokenEvent { finish: Some(NodeFinish::Length), ..token.clone() },
                TokenEvent { finish: Some(NodeFinish::EndOfSequence), ..token.clone() },
                TokenEvent { finish: None, logprobs: None, prefill: None, ..token.clone() },
                token,
            ]),
            NodeEvent::PromptLogprobs { id, tokens: vec![(8, logprobs)] },
            NodeEvent::Transferred {
                id,
                hidden: Duration::from_millis(8),
                exposed: Duration::from_millis(1),
                bytes: 1 << 40,
                blocks: 3,
            },
            NodeEvent::Failed { id, reason: "gone".into(), retry: Retry::OtherNode },
        ];
        for event in events {
            let wire = wire::FromNode::from(event.clone());
            assert_eq!(NodeEvent::try_from(wire), Ok(event));
        }
    }

    #[test]
    fn bad_messages_are_refused_by_name() {
        let mut bad = wire::Job::from(job());
        bad.prompt_tokens = 4;
        let error = Job::try_from(bad).unwrap_err();
        assert_eq!(error.to_string(), "invalid message: job.prompt_tokens is 4 of 3 tokens");
        let cache = wire::CacheEvents { sequence: 1, stored: vec![0; 17], removed: Vec::new() };
        let error = NodeEvent::try_from(wire::FromNode { message: Some(Up::Cache(cache)) });
        assert!(error.unwrap_err().to_string().contains("cache.stored"));
        assert!(NodeEvent::try_from(wire::FromNode { message: None }).is_err());
    }
}
