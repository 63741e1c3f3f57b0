//! Copies between slots and a KV cache whose heads several GPUs share.
//!
//! A slot has whole pieces. Each device's kernels reach its heads in there over the bus, so that
//! nothing has to be put together, and no byte crosses the bus for nothing. Whoever is at the other
//! end of a transfer sees whole pieces, and may share its heads in another way, or not at all.
#![expect(unsafe_code, reason = "implements unsafe functions")]

use std::collections::VecDeque;
use std::sync::Arc;

use baton_kernels::cuda::{Buffer, DeviceError, Pinned, Slice, Stream, gather_blocks};

use super::copies::{layer_of, lost, scatter_runs, slot_of};
use super::marks::Marks;
use super::{DeviceKv, UNIT_BYTES};
use crate::memory::MemoryLost;
use crate::staging::{Copies, PageLocked};

/// How many copies of a device may be queued before the first has begun.
const AHEAD: usize = 4;

/// One device's part of the copies of one direction.
struct Shard {
    kv: Arc<DeviceKv>,
    stream: Stream,
    /// Numbers of blocks, on the host and on the device. Used again in the order of the stream.
    names: VecDeque<(Pinned<u32>, Buffer<u32>)>,
    marks: Marks,
}

impl Shard {
    fn new(kv: &Arc<DeviceKv>) -> Result<Self, DeviceError> {
        let device = kv.pieces.device();
        let pieces = (UNIT_BYTES / kv.share.piece_bytes()).max(1);
        let names = |_| Ok((Pinned::new(device, pieces)?, Buffer::new(device, pieces)?));
        Ok(Self {
            kv: kv.clone(),
            stream: Stream::with_priority(device, -1)?,
            names: (0..AHEAD).map(names).collect::<Result<_, DeviceError>>()?,
            marks: Marks::default(),
        })
    }

    /// Queues `copy`, given the stream, one layer of the cache, and the numbers of `blocks`.
    fn begin(
        &mut self,
        layer: usize,
        blocks: &[u32],
        copy: impl Fn(&Stream, Slice<'_, u8>, Slice<'_, u32>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Self { kv, stream, names, marks } = self;
        names.rotate_left(1);
        let (on_host, on_device) = &mut names[0];
        let named = on_device.slice(0..blocks.len());
        on_host.as_mut_slice()?[..blocks.len()].copy_from_slice(blocks);
        stream.upload(on_host, 0, named)?;
        copy(stream, layer_of(kv.pieces.all(), kv.blocks, kv.share, layer), named)?;
        marks.set(stream)
    }
}

/// The copies of all devices.
pub(super) struct ShardCopies {
    shards: Vec<Shard>,
}

impl ShardCopies {
    pub(super) fn new(shards: &[Arc<DeviceKv>]) -> Result<Self, DeviceError> {
        Ok(Self { shards: shards.iter().map(Shard::new).collect::<Result<_, _>>()? })
    }
}

impl Copies for ShardCopies {
    unsafe fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut dyn PageLocked,
    ) -> Result<(), MemoryLost> {
        let slot = slot_of(to).memory.on_devices();
        for shard in &mut self.shards {
            let share = shard.kv.share;
            let pieces = slot.slice(0..blocks.len() * share.piece_bytes());
            let copy = |stream: &Stream, pool: Slice<'_, u8>, blocks: Slice<'_, u32>| {
                gather_blocks(stream, pieces, pool, blocks, share)
            };
            shard.begin(layer, blocks, copy).map_err(lost)?;
        }
        Ok(())
    }

    unsafe fn scatter(
        &mut self,
        layer: usize,
        from: &mut dyn PageLocked,
        pieces: &[(usize, u32)],
    ) -> Result<(), MemoryLost> {
        let slot = slot_of(from).memory.on_devices();
        let blocks: Vec<u32> = pieces.iter().map(|&(_, block)| block).collect();
        for shard in &mut self.shards {
            let share = shard.kv.share;
            let copy = |stream: &Stream, pool: Slice<'_, u8>, blocks: Slice<'_, u32>| {
                scatter_runs(stream, pool, slot, (pieces, blocks), share)
            };
            shard.begin(layer, &blocks, copy).map_err(lost)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), MemoryLost> {
        self.shards.iter_mut().try_for_each(|shard| shard.marks.wait()).map_err(lost)
    }
}
