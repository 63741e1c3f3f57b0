//! [`Shard`]: the copies of one direction of one device.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_kernels::cuda::{
    Buffer, Device, DeviceError, PieceShare, Pieces, Pinned, Slice, Stream, gather_blocks,
    scatter_blocks,
};

use super::marks::Marks;
use super::opened::Opened;
use super::{DeviceKv, DeviceSlot};
use crate::channel::Part;

/// Buffers on the device, and how many copies may be queued before the first has begun.
const SCRATCHES: usize = 4;
/// Bytes of such a buffer, unless a piece is larger: what a peer's blocks are copied by.
const SCRATCH_BYTES: usize = 8 << 20;
/// Most pieces that are copied at once; the kernels take twice as many.
const MAX_PIECES: usize = 16_384;

/// One device's part of the copies of one direction.
pub(super) struct Shard {
    pub(super) kv: Arc<DeviceKv>,
    stream: Stream,
    scratches: VecDeque<Scratch>,
    /// Most pieces of a copy.
    most: usize,
    pub(super) marks: Marks,
}

/// Contiguous memory on the device between blocks and a slot, or blocks and other ones, and the
/// numbers of the blocks. Used again in the order of the stream.
struct Scratch {
    pieces: Buffer<u8>,
    on_host: Pinned<u32>,
    blocks: Buffer<u32>,
}

impl Scratch {
    fn new(device: &Arc<Device>, bytes: usize, pieces: usize) -> Result<Self, DeviceError> {
        Ok(Self {
            pieces: Buffer::new(device, bytes)?,
            on_host: Pinned::new(device, 2 * pieces)?,
            blocks: Buffer::new(device, 2 * pieces)?,
        })
    }

    /// The beginning of it, for so many pieces.
    fn pieces(&self, count: usize, share: PieceShare) -> Pieces<'_> {
        Pieces { memory: self.pieces.slice(0..count * share.own_bytes()), share }
    }
}

impl Shard {
    pub(super) fn new(kv: &Arc<DeviceKv>) -> Result<Self, DeviceError> {
        let (device, piece_bytes) = (kv.device(), kv.share.piece_bytes());
        let most = (SCRATCH_BYTES / piece_bytes).clamp(1, MAX_PIECES);
        let scratch = |_| Scratch::new(device, most * piece_bytes, most);
        let scratches = (0..SCRATCHES).map(scratch).collect::<Result<_, _>>()?;
        // Small beside what computes, and somebody waits for it.
        let stream = Stream::with_priority(device, -1)?;
        Ok(Self { kv: kv.clone(), stream, scratches, most, marks: Marks::default() })
    }

    /// Queues `copy`, given one layer of the cache, scratch memory, and the numbers of `blocks`.
    fn copy(
        &mut self,
        layer: usize,
        blocks: &[u32],
        copy: impl FnOnce(&Stream, Pieces<'_>, &Scratch, Slice<'_, u32>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Self { kv, stream, scratches, .. } = self;
        scratches.rotate_left(1);
        let scratch = &mut scratches[0];
        let named = scratch.blocks.slice(0..blocks.len());
        // Once those of its last use are uploaded.
        scratch.on_host.as_mut_slice()?[..blocks.len()].copy_from_slice(blocks);
        stream.upload(&mut scratch.on_host, 0, named)?;
        let scratch = &scratches[0];
        copy(stream, kv.layer(layer), scratch, scratch.blocks.slice(0..blocks.len()))
    }

    /// Everything that was queued so far belongs to the copy that has begun.
    pub(super) fn mark(&mut self) -> Result<(), DeviceError> {
        self.marks.set(&self.stream)
    }

    /// A slot has whole pieces. A device that has all heads copies them at once; several devices'
    /// kernels reach their heads in there over the bus, so that nothing has to be put together, and
    /// no byte crosses the bus for nothing.
    pub(super) fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut DeviceSlot,
    ) -> Result<(), DeviceError> {
        let (whole, count) = (self.kv.share.whole(), blocks.len());
        let alone = self.kv.share == whole;
        self.copy(layer, blocks, |stream, pool, scratch, blocks| {
            if !alone {
                let memory = to.memory.on_devices().slice(0..count * whole.own_bytes());
                return gather_blocks(stream, Pieces { memory, share: whole }, pool, blocks);
            }
            let pieces = scratch.pieces(count, whole);
            gather_blocks(stream, pieces, pool, blocks)?;
            stream.download(pieces.memory, &mut to.memory, 0)
        })
    }

    /// The other way round: pieces of a slot, given by their indices there, to the blocks that go
    /// with them.
    pub(super) fn scatter(
        &mut self,
        layer: usize,
        from: &mut DeviceSlot,
        pieces: &[(usize, u32)],
    ) -> Result<(), DeviceError> {
        let whole = self.kv.share.whole();
        let alone = self.kv.share == whole;
        let blocks: Vec<u32> = pieces.iter().map(|&(_, block)| block).collect();
        let end = pieces.last().map_or(0, |&(at, _)| at + 1);
        self.copy(layer, &blocks, |stream, pool, scratch, blocks| {
            let arrived = if alone {
                let on_device = scratch.pieces(end, whole);
                stream.upload(&mut from.memory, 0, on_device.memory)?;
                on_device
            } else {
                Pieces { memory: from.memory.on_devices(), share: whole }
            };
            scatter_runs(stream, pool, arrived, pieces, blocks)
        })
    }

    /// Copies blocks of a peer's cache, whichever of its devices have the heads.
    pub(super) fn pull(
        &mut self,
        (peer, own): (&Opened, usize),
        layer: usize,
        from: &[u32],
        to: &[u32],
    ) -> Result<(), DeviceError> {
        let share = self.kv.share;
        for (from, to) in from.chunks(self.most).zip(to.chunks(self.most)) {
            let count = from.len();
            self.copy(layer, &[from, to].concat(), |stream, pool, scratch, blocks| {
                let pieces = scratch.pieces(count, share);
                for theirs in peer.layer(own, layer) {
                    gather_blocks(stream, pieces, theirs, blocks.slice(0..count))?;
                }
                scatter_blocks(stream, pool, pieces, blocks.slice(count..2 * count))
            })?;
        }
        Ok(())
    }

    /// Copies blocks to this device's part of a parcel.
    pub(super) fn pack(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &Part,
    ) -> Result<(), DeviceError> {
        self.for_parcel(layer, blocks, to, |stream, pieces, pool, blocks| {
            gather_blocks(stream, pieces, pool, blocks)
        })
    }

    /// Copies a part of a parcel to blocks.
    pub(super) fn unpack(
        &mut self,
        layer: usize,
        from: &Part,
        blocks: &[u32],
    ) -> Result<(), DeviceError> {
        self.for_parcel(layer, blocks, from, |stream, pieces, pool, blocks| {
            scatter_blocks(stream, pool, pieces, blocks)
        })
    }

    fn for_parcel(
        &mut self,
        layer: usize,
        blocks: &[u32],
        part: &Part,
        copy: impl Fn(&Stream, Pieces<'_>, Pieces<'_>, Slice<'_, u32>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let (share, mut done) = (part.share, 0);
        for blocks in blocks.chunks(self.most) {
            let bytes = done * share.own_bytes()..(done + blocks.len()) * share.own_bytes();
            let pieces = Pieces { memory: part.memory.slice(bytes), share };
            self.copy(layer, blocks, |stream, pool, _, blocks| copy(stream, pieces, pool, blocks))?;
            done += blocks.len();
        }
        Ok(())
    }
}

/// Copies pieces of `from`, given by their indices there, to the blocks that go with them in
/// `pieces`, whose numbers are in `blocks` too.
fn scatter_runs(
    stream: &Stream,
    pool: Pieces<'_>,
    from: Pieces<'_>,
    pieces: &[(usize, u32)],
    blocks: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    let (bytes, mut done) = (from.share.own_bytes(), 0);
    // Mostly one run: everything that has arrived is new.
    for run in pieces.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
        let memory = from.memory.slice(run[0].0 * bytes..(run[0].0 + run.len()) * bytes);
        let from = Pieces { memory, ..from };
        scatter_blocks(stream, pool, from, blocks.slice(done..done + run.len()))?;
        done += run.len();
    }
    Ok(())
}
