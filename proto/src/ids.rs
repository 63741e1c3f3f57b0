//! Identities of requests, transfers and nodes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// One request's choice, unique in the cluster. Displayed as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u128);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for RequestId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(Self)
    }
}

/// One attempt at a request: whatever carries an older attempt is void.
/// Names the sequence on a node and the KV transfer between a pair of nodes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TransferId {
    /// The request.
    pub request: RequestId,
    /// 1 for the first attempt; the highest bit marks the attempt's [pull](Self::pull).
    pub attempt: u32,
}

/// Of [`TransferId::attempt`]: it is the pull that belongs to the attempt.
const PULL: u32 = 1 << 31;

impl TransferId {
    /// The transfer that brings the attempt a cached prefix. It has an id of its own because a
    /// node may both send this prefix and receive the attempt's KV.
    #[must_use]
    pub fn pull(self) -> Self {
        Self { attempt: self.attempt | PULL, ..self }
    }

    /// Whether this names a pull.
    #[must_use]
    pub fn is_pull(self) -> bool {
        self.attempt & PULL != 0
    }
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pull = if self.is_pull() { "/pull" } else { "" };
        write!(f, "{}/{}{pull}", self.request, self.attempt & !PULL)
    }
}

/// Name of a node: 1 to 63 of `a-z`, `0-9` and `-`, as its certificate states it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is no node name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node name {0:?} must be 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'")]
pub struct InvalidNodeId(String);

impl FromStr for NodeId {
    type Err = InvalidNodeId;

    fn from_str(text: &str) -> Result<Self, InvalidNodeId> {
        let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let edges = text.starts_with('-') || text.ends_with('-');
        if text.is_empty() || text.len() > 63 || edges || !text.bytes().all(legal) {
            return Err(InvalidNodeId(text.chars().take(80).collect()));
        }
        Ok(Self(text.into()))
    }
}

/// One life of a node; grows with every start, so that what an earlier life said is void.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Epoch(pub u64);

/// What coordinators ask of a node. Any node can do any work.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Role {
    /// Computes prompts and sends their KV cache away.
    #[default]
    Prefill,
    /// Receives KV caches, or computes short prompts itself, and generates tokens.
    Decode,
}

impl Role {
    /// `prefill` or `decode`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// The inverse of [`Self::as_str`].
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Prefill, Self::Decode].into_iter().find(|role| role.as_str() == text)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
