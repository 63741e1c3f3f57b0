//! [`DeviceKv`]: a KV cache in the memory of a GPU, and the copies out of it and into it.

use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, IpcHandle, PieceShare};

use super::{Copies, Direction, Slot, Staging, UNIT_BYTES};
use crate::memory::{KvMemory, SharedKv};

mod copies;
mod marks;
mod shards;
mod slot;

use copies::DeviceCopies;
use shards::ShardCopies;
pub use slot::DeviceSlot;

/// Slots of the direction out of the device. QUIC keeps a slot until what was sent of it is
/// acknowledged: they hold the send windows of two connections, so that a peer that does not read
/// cannot take them all.
const SLOTS_OUT: usize = 256;
/// Slots of the direction into the device: of units that arrive, or are copied.
const SLOTS_IN: usize = 64;
/// All layers' pieces in one allocation, `[layers][blocks]`, of which this device has a share of
/// the heads.
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
    /// The cache as leases reach it.
    ///
    /// # Errors
    /// If the driver fails, or memory cannot be locked.
    pub fn memory(self) -> Result<KvMemory, DeviceError> {
        let kv = Arc::new(self);
        let (out, into) = (direction(&kv, SLOTS_OUT)?, direction(&kv, SLOTS_IN)?);
        let shared = kv.describe();
        let staging = Staging::start(kv.share.piece_bytes(), shared, out, into);
        Ok(KvMemory::Device(staging.with_cache(kv)))
    }

    /// A cache whose heads several devices share, as leases reach it: whole, whoever has what. Other
    /// processes cannot open it.
    ///
    /// # Errors
    /// As [`memory`](Self::memory).
    ///
    /// # Panics
    /// If there are no devices.
    pub fn memory_of_shards(shards: Vec<Self>) -> Result<KvMemory, DeviceError> {
        let shards: Vec<_> = shards.into_iter().map(Arc::new).collect();
        let direction = |slots| -> Result<Direction, DeviceError> {
            Ok((Self::copies_of_shards(&shards)?, ring(&shards[0], slots)?))
        };
        let piece_bytes = shards[0].share.piece_bytes();
        let (out, into) = (direction(SLOTS_OUT)?, direction(SLOTS_IN)?);
        Ok(KvMemory::Device(Staging::start(piece_bytes, None, out, into)))
    }

    /// Copies of one direction, on a stream of their own.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn copies(self: Arc<Self>) -> Result<Box<dyn Copies>, DeviceError> {
        Ok(Box::new(DeviceCopies::new(self)?))
    }

    /// Copies of one direction of a cache whose heads several devices share.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn copies_of_shards(shards: &[Arc<Self>]) -> Result<Box<dyn Copies>, DeviceError> {
        Ok(Box::new(ShardCopies::new(shards)?))
    }

    /// How other processes open it. `None` if this memory cannot be shared.
    #[must_use]
    pub fn describe(&self) -> Option<SharedKv> {
        let handle = self.pieces.share().ok()?;
        let share = self.share;
        let numbers =
            [self.layers, share.kv_heads, share.first_head, share.heads, share.head_bytes];
        let mut description = handle.to_vec();
        description.extend(numbers.into_iter().flat_map(|number| (number as u64).to_le_bytes()));
        Some(SharedKv { blocks: u32::try_from(self.blocks).ok()?, description })
    }

    fn device(&self) -> &Arc<Device> {
        self.pieces.device()
    }
}

fn direction(kv: &Arc<DeviceKv>, slots: usize) -> Result<Direction, DeviceError> {
    Ok((kv.clone().copies()?, ring(kv, slots)?))
}

fn ring(kv: &DeviceKv, slots: usize) -> Result<Vec<Slot>, DeviceError> {
    let bytes = UNIT_BYTES.max(kv.share.piece_bytes());
    let slot = |_| Ok(Box::new(DeviceSlot::new(kv.device(), bytes)?) as Slot);
    (0..slots).map(slot).collect()
}

/// What a cache looks like.
struct Shape {
    layers: usize,
    share: PieceShare,
}

/// Reads a description, which may be anything.
fn parse(description: &[u8]) -> Option<(IpcHandle, Shape)> {
    let (handle, rest) = description.split_first_chunk::<{ size_of::<IpcHandle>() }>()?;
    let (numbers, []) = rest.as_chunks() else { return None };
    let numbers: Vec<u64> = numbers.iter().map(|&number| u64::from_le_bytes(number)).collect();
    let &[layers, kv_heads, first_head, heads, head_bytes] = &numbers[..] else { return None };
    let number = |number: u64| usize::try_from(number).ok();
    let share = PieceShare {
        kv_heads: number(kv_heads)?,
        first_head: number(first_head)?,
        heads: number(heads)?,
        head_bytes: number(head_bytes)?,
    };
    Some((*handle, Shape { layers: number(layers)?, share }))
}
