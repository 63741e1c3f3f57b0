//! Between wire messages and domain types: the only place where what a machine of the cluster
//! says is validated.

mod command;
mod event;
mod share;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::geometry::{KvDtype, KvGeometry};
use crate::hash::BlockHash;
use crate::ids::{Epoch, NodeId, RequestId, Role, TransferId};
use crate::message::Peer;
use crate::wire::node as wire;

/// Nothing that a machine reports takes longer.
const MOST_TIME: Duration = Duration::from_secs(366 * 24 * 3600);

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
    let duration = Duration::try_from_secs_f64(ms / 1e3).ok();
    let duration = duration.filter(|&duration| duration <= MOST_TIME);
    duration.ok_or_else(|| InvalidMessage(format!("{field} is no duration of at most a year")))
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

/// The id of an attempt, not of its pull.
fn job_id(id: Option<wire::TransferId>) -> Result<TransferId, InvalidMessage> {
    match transfer_id(id)? {
        id if id.is_pull() => invalid("id is a pull's, not an attempt's"),
        id => Ok(id),
    }
}

fn pull_id(id: Option<wire::TransferId>) -> Result<TransferId, InvalidMessage> {
    match transfer_id(id)? {
        id if id.is_pull() => Ok(id),
        _ => invalid("id is an attempt's, not its pull's"),
    }
}

fn role(text: &str, field: &str) -> Result<Role, InvalidMessage> {
    Role::parse(text)
        .ok_or_else(|| InvalidMessage(format!("{field} is neither prefill nor decode")))
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
        let dtype = required(KvDtype::parse(&g.dtype), "geometry.dtype f32, bf16, f16 or fp8")?;
        Ok(Self {
            layers: g.layers,
            kv_heads: g.kv_heads,
            head_dim: g.head_dim,
            dtype,
            block_tokens: g.block_tokens,
        })
    }
}
