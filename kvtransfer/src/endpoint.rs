//! A node's end of all its transfers.

use std::net::SocketAddr;

use baton_identity::Identity;
use baton_proto::ids::Epoch;

use crate::limits::Timing;
use crate::receive::{Incoming, ReceiveHandle};
use crate::send::{Outgoing, SendHandle};

/// Transports of this build, best first.
pub const TRANSPORTS: &[&str] = &["quic"];

/// The endpoint could not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be bound.
    #[error("cannot listen for KV transfers on {address}: {error}")]
    Socket {
        /// The address asked for.
        address: SocketAddr,
        /// Why not.
        error: std::io::Error,
    },
}

/// Sends and receives the transfers of one node. Cheap to clone; all clones are one endpoint.
#[derive(Clone)]
pub struct Endpoint {}

impl Endpoint {
    /// Listens on `listen` as `identity`, in life `epoch` of the node. Must be called in a tokio
    /// runtime, which then runs the transfers; the other methods may be called from any thread.
    pub fn bind(
        _listen: SocketAddr,
        _identity: &Identity,
        _epoch: Epoch,
        _timing: Timing,
    ) -> Result<Self, BindError> {
        todo!()
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        todo!()
    }

    /// Starts to send. Never blocks; what cannot be sent fails through the handle.
    pub fn send(&self, _outgoing: Outgoing) -> SendHandle {
        todo!()
    }

    /// Starts to receive. Never blocks; the offer may have come already.
    pub fn expect(&self, _incoming: Incoming) -> ReceiveHandle {
        todo!()
    }

    /// Transfers under way: `(outgoing, incoming)`.
    #[must_use]
    pub fn transfers(&self) -> (usize, usize) {
        todo!()
    }

    /// Cancels every transfer and closes every connection; returns when peers have been told, or
    /// after a short wait.
    pub async fn close(&self) {
        todo!()
    }
}
