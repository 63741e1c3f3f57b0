//! The receiving end of one transfer, driven over QUIC.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::geometry::KvGeometry;
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{Epoch, NodeId, TransferId};

use crate::error::ReceiveError;
use crate::frame::FirstToken;
use crate::memory::BlockSink;

/// What is expected, and from whom.
pub struct Incoming {
    /// Names the transfer, at both ends.
    pub transfer: TransferId,
    /// The only node that may send it.
    pub from: NodeId,
    /// The only life of that node that may.
    pub epoch: Epoch,
    /// The model.
    pub root: ModelRoot,
    /// Layout of the blocks.
    pub geometry: KvGeometry,
    /// Hash chain of the full blocks; blocks of other tokens are refused.
    pub hashes: Vec<BlockHash>,
    /// Blocks of the sequence, the partial last one included.
    pub blocks: u32,
    /// How many leading blocks are here already and are not wanted.
    pub held: u32,
    /// Where the blocks go.
    pub sink: Arc<dyn BlockSink>,
    /// How long the blocks are kept without a sign of life from the sender: also the wait for
    /// its offer.
    pub lease: Duration,
}

/// An incoming transfer. Dropping it cancels, unless the transfer has ended.
pub struct ReceiveHandle {}

impl ReceiveHandle {
    /// Stops the transfer and tells the sender. Does not block.
    pub fn cancel(&self) {
        todo!()
    }

    /// Waits for the end: every wanted piece verified and in place. The sink is released before
    /// this returns.
    pub async fn outcome(&self) -> Result<FirstToken, ReceiveError> {
        todo!()
    }
}
