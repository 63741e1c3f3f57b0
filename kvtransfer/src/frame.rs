//! skeleton
use baton_proto::message::{Logprobs, NodeFinish, Retry};
use std::fmt;
/// The first token, sampled by the sender's node, handed over with the KV.
#[derive(Clone, Debug, PartialEq)]
pub struct FirstToken {
    /// The token.
    pub token: u32,
    /// If the request asked for them.
    pub logprobs: Option<Logprobs>,
    /// The sequence ends with this token.
    pub finish: Option<NodeFinish>,
}
/// Why one end ends a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its owner gave it up.
    Cancelled,
    /// The other end was silent for too long.
    Expired,
    /// Too many transfers or offers.
    Busy,
    /// Another model.
    Model,
    /// Another KV layout.
    Geometry,
    /// Another number of blocks.
    Blocks,
    /// Blocks of other tokens.
    Hashes,
    /// The sender, or the receiver, is in another epoch.
    Epoch,
    /// Expected from another node.
    Sender,
    /// The payload kept arriving damaged.
    Corrupt,
    /// The other end broke the protocol.
    Protocol,
}
impl Reason {
    /// Whether and where another attempt may succeed.
    #[must_use]
    pub fn retry(self) -> Retry {
        match self {
            Self::Cancelled => Retry::Never,
            Self::Busy => Retry::SameNode,
            _ => Retry::OtherNode,
        }
    }
}
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
