//! How a transfer reads and writes the pools of its two ends.
//!
//! Memory of a device is not at hand: what is sent has to be copied out of it and what arrives
//! into it, through a bounded amount of staging memory. So both ends answer with futures. Those of
//! memory that is at hand are ready at once, and nothing is copied for them.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use crate::channel::{Channel, Parcel};
use crate::direct::Remote;
use crate::frame::{LayerRun, Run};

/// Something that takes a copy, or none. What it needs has been asked for already when it is
/// returned; dropping it only says that nobody waits.
pub type Soon<T> = Pin<Box<dyn Future<Output = Result<T, MemoryLost>> + Send>>;

/// The memory of the blocks cannot be read or written any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory of the blocks has failed")]
pub struct MemoryLost;

/// A [`Soon`] for memory that is at hand.
pub fn at_hand<T: Send + 'static>(value: T) -> Soon<T> {
    Box::pin(std::future::ready(Ok(value)))
}

/// The blocks of one sequence at the sending end.
pub trait BlockSource: Send + Sync + 'static {
    /// The bytes of `pieces` in order, in whatever parts; each piece is exactly
    /// [`piece_bytes`](baton_proto::geometry::KvGeometry::piece_bytes) long. Asked only for pieces
    /// reported ready. The bytes are sent as they lie, so they must not change while the parts
    /// live. Until they are dropped they may occupy staging memory; the future waits for some.
    fn read(&self, pieces: LayerRun) -> Soon<Vec<Bytes>>;

    /// The blocks' numbers in the memory that is [shared](crate::Direct::shared), if it is.
    fn references(&self, _: Run) -> Option<Vec<u32>> {
        None
    }

    /// A copy of `pieces` for a channel. The future waits for room, which is given in the order in
    /// which it was asked for. `None`: source and channel do not go together, or it is broken.
    fn pack(&self, _: &dyn Channel, _: LayerRun) -> Soon<Option<Parcel>> {
        at_hand(None)
    }
}

/// The blocks reserved for one sequence at the receiving end.
pub trait BlockSink: Send + Sync + 'static {
    /// A place for the bytes of `pieces`, which are among the granted ones and at hand. The future waits
    /// for staging memory; no more than one further unit of the transfer is read meanwhile.
    fn place(self: Arc<Self>, pieces: LayerRun) -> Soon<Box<dyn Place>>;

    /// Copies `pieces` from blocks `references` of a peer's memory. False: they cannot be read.
    /// Done, and bound to come to its end, as [`Place::apply`]. Copies are made in the order in
    /// which they were asked for, those of places included.
    fn copy(
        self: Arc<Self>,
        _from: &Remote,
        _pieces: LayerRun,
        _references: Vec<u32>,
    ) -> Soon<bool> {
        at_hand(false)
    }

    /// Copies what has come through a channel to `pieces`. False: it does not belong there. Done,
    /// and bound to come to its end, as [`Place::apply`]; in order, as [`copy`](Self::copy).
    fn unpack(self: Arc<Self>, _: LayerRun, _: Parcel) -> Soon<bool> {
        at_hand(false)
    }
}

/// Where one payload unit goes. What is written counts only once it is applied; a place that is
/// dropped before is given up.
pub trait Place: Send {
    /// Copies the whole, verified piece of the sequence's block `ordinal`. Within the unit; never called
    /// for a piece that had landed before, nor after the transfer has ended.
    fn write(&mut self, ordinal: u32, piece: &[u8]);

    /// Done when whoever uses the blocks next sees what was written: the transfer is not complete before. Once begun it comes to its end, also when the transfer does not.
    fn apply(self: Box<Self>) -> Soon<()>;
}
