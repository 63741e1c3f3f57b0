//! What nodes say.

use super::{
    InvalidMessage, as_ms, bytes16, duration_ms, hash_bytes, hashes, invalid, job_id, required,
    role, transfer_id,
};
use crate::embedding::MAX_HIDDEN_SIZE;
use crate::hash::ModelRoot;
use crate::ids::Epoch;
use crate::message::{
    BlockCounts, Hello, Logprobs, MAX_PRICE, NodeEvent, NodeFinish, PROTOCOL, Report, Retry,
    TokenEvent,
};
use crate::wire::node as wire;
use wire::from_node::Message as Up;

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
            price: hello.price,
            hidden_size: hello.hidden_size,
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
            return invalid(format!(
                "the node speaks protocol {theirs}, the coordinator {PROTOCOL}: update the older one"
            ));
        }
        if hello.model.is_empty() || hello.model.len() > 256 || hello.transports.len() > 8 {
            return invalid("hello.model must have 1 to 256 bytes, hello.transports at most 8");
        }
        if hello.vocab_size == 0 || hello.max_model_len == 0 {
            return invalid("hello.vocab_size and hello.max_model_len must be above 0");
        }
        if !(1..=MAX_HIDDEN_SIZE).contains(&hello.hidden_size) {
            return invalid(format!("hello.hidden_size must be from 1 to {MAX_HIDDEN_SIZE}"));
        }
        Ok(Self {
            role: role(&hello.role, "hello.role")?,
            epoch: Epoch(hello.epoch),
            model: hello.model,
            root: ModelRoot(bytes16(&hello.model_root, "hello.model_root")?),
            geometry: required(hello.geometry, "hello.geometry")?.try_into()?,
            max_model_len: hello.max_model_len,
            vocab_size: hello.vocab_size,
            total_blocks: hello.total_blocks,
            kv_address: hello.kv_address,
            transports: hello.transports,
            price: price(hello.price)?,
            hidden_size: hello.hidden_size,
        })
    }
}

/// A node that says nothing costs what others do.
fn price(price: f64) -> Result<f64, InvalidMessage> {
    match price {
        0.0 => Ok(1.0),
        price if price > 0.0 && price <= MAX_PRICE => Ok(price),
        other => {
            invalid(format!("hello.price is {other}; it must be above 0, at most {MAX_PRICE}"))
        }
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
            role: r.role.as_str().to_owned(),
            waiting_blocks: r.waiting_blocks,
            kv_transport: r.kv_transport,
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
        if r.kv_transport.len() > 16 {
            return invalid("report.kv_transport must have at most 16 bytes");
        }
        Ok(Self {
            role: role(&r.role, "report.role")?,
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
            waiting_blocks: r.waiting_blocks,
            prefill_tokens_per_second: r.prefill_tokens_per_second,
            decode_step_ms: r.decode_step_ms,
            kv_transport: r.kv_transport,
        })
    }
}

/// Whether there are as many as the model's hidden states have is the coordinator's to know.
fn embedding(values: Vec<f32>) -> Result<Vec<f32>, InvalidMessage> {
    let count = values.len();
    if count == 0 || count > MAX_HIDDEN_SIZE as usize {
        return invalid(format!("embedded.values has {count}; most are {MAX_HIDDEN_SIZE}"));
    }
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => invalid(format!("embedded.values contains {value}")),
        None => Ok(values),
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
            NodeEvent::Embedded { id, values, prefill } => Up::Embedded(wire::Embedded {
                id: Some(id.into()),
                values,
                prefill_ms: as_ms(prefill),
            }),
            NodeEvent::Transferred { id, hidden, exposed, bytes, blocks } => {
                Up::Transferred(wire::Transferred {
                    id: Some(id.into()),
                    hidden_ms: as_ms(hidden),
                    exposed_ms: as_ms(exposed),
                    bytes,
                    blocks,
                })
            }
            NodeEvent::Pulled { id, tokens, took } => {
                Up::Pulled(wire::Pulled { id: Some(id.into()), tokens, took_ms: as_ms(took) })
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
            Up::Embedded(embedded) => Self::Embedded {
                id: job_id(embedded.id)?,
                values: embedding(embedded.values)?,
                prefill: duration_ms(embedded.prefill_ms, "embedded.prefill_ms")?,
            },
            Up::Transferred(done) => Self::Transferred {
                id: transfer_id(done.id)?,
                hidden: duration_ms(done.hidden_ms, "transferred.hidden_ms")?,
                exposed: duration_ms(done.exposed_ms, "transferred.exposed_ms")?,
                bytes: done.bytes,
                blocks: done.blocks,
            },
            Up::Pulled(pulled) => Self::Pulled {
                id: job_id(pulled.id)?,
                tokens: pulled.tokens,
                took: duration_ms(pulled.took_ms, "pulled.took_ms")?,
            },
            Up::Failed(failed) => Self::Failed {
                id: transfer_id(failed.id.clone())?,
                retry: failed.retry().into(),
                reason: failed.reason,
            },
        })
    }
}
