//! [`DeviceKv`]: a KV cache in the memory of a GPU, or one of several GPUs' parts of it, and the
//! copies out of it and into it.

use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, PieceShare, Pieces};

use super::{Copies, Direction, Slot, Staging, UNIT_BYTES};
use crate::memory::{KvMemory, SharedKv};

mod copies;
mod description;
mod marks;
mod opened;
mod shard;
mod slot;

use copies::DeviceCopies;
use description::Description;
pub use slot::DeviceSlot;

/// Slots of the direction out of the device. QUIC keeps a slot until what was sent of it is
/// acknowledged: they hold the send windows of two connections, so that a peer that does not read
/// cannot take them all.
const SLOTS_OUT: usize = 256;
/// Slots of the direction into the device: of units that arrive, or are copied.
const SLOTS_IN: usize = 64;

/// Most devices of a cache that other nodes' devices are to reach: their numbers are one byte each in
/// channels' names, and names and descriptions stay short.
pub(crate) const MAX_DEVICES: usize = 16;

/// All layers' pieces in one allocation, `[layers][blocks]`, of which this device has a share of
/// the heads. Several of them make a whole cache if, in their order, they have all heads.
pub struct DeviceKv {
    /// The memory.
    pub pieces: Arc<Buffer<u8>>,
    /// Layers.
    pub layers: usize,
    /// Blocks.
    pub blocks: usize,
    /// The heads.
    pub share: PieceShare,
}

impl DeviceKv {
    /// A cache as leases reach it: whole, whichever device has what.
    ///
    /// # Errors
    /// If the driver fails, or memory cannot be locked.
    ///
    /// # Panics
    /// If there are no devices.
    pub fn memory(devices: Vec<Self>) -> Result<KvMemory, DeviceError> {
        let devices: Arc<[_]> = devices.into_iter().map(Arc::new).collect();
        let direction = |slots| -> Result<Direction, DeviceError> {
            Ok((Self::copies(&devices)?, ring(&devices[0], slots)?))
        };
        let (out, into) = (direction(SLOTS_OUT)?, direction(SLOTS_IN)?);
        let (piece_bytes, shared) = (devices[0].share.piece_bytes(), Self::describe(&devices));
        Ok(KvMemory::Device(Staging::start(piece_bytes, shared, out, into).of_devices(devices)))
    }

    /// Copies of one direction, on streams of their own.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn copies(devices: &[Arc<Self>]) -> Result<Box<dyn Copies>, DeviceError> {
        Ok(Box::new(DeviceCopies::new(devices)?))
    }

    /// How other processes open it. `None` if this memory cannot be shared.
    #[must_use]
    pub fn describe(devices: &[Arc<Self>]) -> Option<SharedKv> {
        let blocks = u32::try_from(devices.first()?.blocks).ok()?;
        Some(SharedKv { blocks, description: Description::of(devices)?.encode() })
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        self.pieces.device()
    }

    /// The pieces of one layer.
    fn layer(&self, layer: usize) -> Pieces<'_> {
        let bytes = self.blocks * self.share.own_bytes();
        let memory = self.pieces.slice(layer * bytes..(layer + 1) * bytes);
        Pieces { memory, share: self.share }
    }
}

fn ring(kv: &DeviceKv, slots: usize) -> Result<Vec<Slot>, DeviceError> {
    let bytes = UNIT_BYTES.max(kv.share.piece_bytes());
    let slot = |_| Ok(Box::new(DeviceSlot::new(kv.device(), bytes)?) as Slot);
    (0..slots).map(slot).collect()
}
