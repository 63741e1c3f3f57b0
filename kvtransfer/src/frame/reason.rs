//! Why a transfer ends without success.

use std::fmt;

use baton_proto::message::Retry;

use super::FrameError;

/// Why one end ends a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// Its owner gave it up.
    Cancelled = 0,
    /// The other end was silent, or made no progress, for too long.
    Expired = 1,
    /// Too many transfers or offers.
    Busy = 2,
    /// Another model.
    Model = 3,
    /// Another KV layout.
    Geometry = 4,
    /// Another number of blocks.
    Blocks = 5,
    /// Blocks of other tokens.
    Hashes = 6,
    /// The other end's node is in another epoch.
    Epoch = 7,
    /// Expected from another node.
    Sender = 8,
    /// The payload kept arriving damaged.
    Corrupt = 9,
    /// The other end broke the protocol.
    Protocol = 10,
    /// The other end cannot reach its blocks.
    Memory = 11,
}

/// Every reason with its text.
const REASONS: [(Reason, &str); 12] = [
    (Reason::Cancelled, "its owner cancelled"),
    (Reason::Expired, "the other end was silent for too long"),
    (Reason::Busy, "too many transfers"),
    (Reason::Model, "another model"),
    (Reason::Geometry, "another KV layout"),
    (Reason::Blocks, "another number of blocks"),
    (Reason::Hashes, "blocks of other tokens"),
    (Reason::Epoch, "the node is in another epoch"),
    (Reason::Sender, "expected from another node"),
    (Reason::Corrupt, "the payload kept arriving damaged"),
    (Reason::Protocol, "the other end broke the protocol"),
    (Reason::Memory, "the memory of its blocks has failed"),
];

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

    pub(super) fn from_code(code: u8) -> Result<Self, FrameError> {
        match REASONS.get(usize::from(code)) {
            Some(&(reason, _)) => Ok(reason),
            None => Err(FrameError::UnknownCode { what: "reason", code }),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REASONS[*self as usize].1)
    }
}
