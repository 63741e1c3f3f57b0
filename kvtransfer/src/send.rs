//! The sending end of one transfer, driven over QUIC.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::geometry::KvGeometry;
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::TransferId;
use baton_proto::message::Peer;

use crate::error::SendError;
use crate::frame::FirstToken;
use crate::memory::BlockSource;

/// What is to be sent, and to whom.
pub struct Outgoing {
    /// Names the transfer, at both ends.
    pub transfer: TransferId,
    /// The receiver.
    pub peer: Peer,
    /// The model.
    pub root: ModelRoot,
    /// Layout of the blocks.
    pub geometry: KvGeometry,
    /// Hash chain of the full blocks.
    pub hashes: Vec<BlockHash>,
    /// Blocks of the sequence, the partial last one included.
    pub blocks: u32,
    /// Where the blocks are.
    pub source: Arc<dyn BlockSource>,
}

/// A transfer that has arrived. Durations on the sender's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// From the first payload handed to the transport to `finish`.
    pub hidden: Duration,
    /// From `finish` to the receiver's acknowledgement that everything is in place.
    pub exposed: Duration,
    /// Payload bytes that the receiver wanted; 0 if it held everything.
    pub bytes: u64,
    /// Blocks that the receiver wanted.
    pub blocks: u32,
}

/// An outgoing transfer. Dropping it cancels, unless the transfer has ended.
pub struct SendHandle {}

impl SendHandle {
    /// Blocks `ordinals` are computed and final in `layer`. Does not block.
    pub fn ready(&self, _layer: u32, _ordinals: Range<u32>) {
        todo!()
    }

    /// The prompt is computed and this is the first token. Does not block.
    pub fn finish(&self, _first: FirstToken) {
        todo!()
    }

    /// Stops the transfer and tells the receiver. Does not block.
    pub fn cancel(&self) {
        todo!()
    }

    /// Waits for the end. The source is released before this returns.
    pub async fn outcome(&self) -> Result<Sent, SendError> {
        todo!()
    }
}
