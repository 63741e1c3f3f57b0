//! How a transfer fails, at each end.

use baton_proto::message::Retry;

use crate::frame::Reason;
use crate::memory::MemoryLost;

/// A transfer did not reach its receiver. Nothing of it is held any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The transfer's description is impossible; names what is wrong.
    #[error("cannot be sent: {0}")]
    Invalid(&'static str),
    /// [`MAX_OUTGOING`](crate::limits::MAX_OUTGOING) transfers are under way, or this one already.
    #[error("too many transfers, or the same one twice")]
    Busy,
    /// No connection to the peer.
    #[error("the receiver cannot be reached: {0}")]
    Unreachable(String),
    /// Who answered is not the node that was to answer.
    #[error("the peer is not the expected receiver: {0}")]
    WrongPeer(String),
    /// The receiver has restarted since the transfer was arranged, or was never that old.
    #[error("the receiver is in epoch {theirs}, not {expected}")]
    WrongEpoch {
        /// What the coordinator said.
        expected: u64,
        /// What the peer said.
        theirs: u64,
    },
    /// The receiver refused or ended the transfer.
    #[error("the receiver ended the transfer: {0}")]
    Refused(Reason),
    /// The owner of this end cancelled, or dropped its handle.
    #[error("cancelled")]
    Cancelled,
    /// Nothing happened for too long; says what was waited for.
    #[error("gave up waiting for {0}")]
    Timeout(&'static str),
    /// The receiver broke the protocol.
    #[error("the receiver broke the protocol: {0}")]
    Protocol(&'static str),
    /// The blocks here cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryLost),
}

impl SendError {
    /// Whether and where another attempt may succeed.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Invalid(_) | Self::Cancelled => Retry::Never,
            Self::Refused(reason) => reason.retry(),
            Self::Busy => Retry::SameNode,
            _ => Retry::OtherNode,
        }
    }
}

/// A transfer did not arrive. Its blocks hold nothing of use, and nothing writes to them any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// The expectation is impossible; names what is wrong.
    #[error("cannot be received: {0}")]
    Invalid(&'static str),
    /// [`MAX_INCOMING`](crate::limits::MAX_INCOMING) transfers are expected, or this one already.
    #[error("too many transfers, or the same one twice")]
    Busy,
    /// The sender ended the transfer.
    #[error("the sender ended the transfer: {0}")]
    Ended(Reason),
    /// What the sender offered is not what was expected; it was refused.
    #[error("the offer does not fit: {0}")]
    Mismatch(Reason),
    /// The owner of this end cancelled, or dropped its handle.
    #[error("cancelled")]
    Cancelled,
    /// Nothing came from the sender for as long as the lease.
    #[error("gave up waiting for {0}")]
    Timeout(&'static str),
    /// Checksums kept failing.
    #[error("the payload kept arriving damaged")]
    Corrupt,
    /// The sender broke the protocol.
    #[error("the sender broke the protocol: {0}")]
    Protocol(&'static str),
    /// The blocks here cannot be written.
    #[error(transparent)]
    Memory(#[from] MemoryLost),
}

impl ReceiveError {
    /// Whether and where another attempt may succeed.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Invalid(_) | Self::Cancelled => Retry::Never,
            Self::Busy => Retry::SameNode,
            Self::Ended(reason) | Self::Mismatch(reason) => reason.retry(),
            _ => Retry::OtherNode,
        }
    }
}
