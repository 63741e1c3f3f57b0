//! Copies between a GPU's KV cache, slots and other processes' caches.
#![expect(unsafe_code, reason = "implements unsafe functions")]

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use baton_kernels::cuda::{
    Buffer, Device, DeviceError, PieceShare, Pinned, SharedBuffer, Slice, Stream, gather_blocks,
    scatter_blocks,
};

use super::marks::Marks;
use super::slot::DeviceSlot;
use super::{DeviceKv, Shape, parse};
use crate::memory::{MemoryLost, PeerKv, SharedKv};
use crate::staging::{Copies, PageLocked};

/// Buffers on the device, and how many copies may be queued before the first has begun.
const SCRATCHES: usize = 4;
/// Bytes of such a buffer, unless a piece is larger: what a peer's blocks are copied by.
const SCRATCH_BYTES: usize = 8 << 20;

/// Most pieces that are copied at once; the kernels take twice as many.
const MAX_PIECES: usize = 16_384;

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

    /// Queues the upload of numbers of blocks, once those of its last use are uploaded.
    fn name(&mut self, stream: &Stream, blocks: &[u32]) -> Result<(), DeviceError> {
        self.on_host.as_mut_slice()?[..blocks.len()].copy_from_slice(blocks);
        stream.upload(&mut self.on_host, 0, self.blocks.slice(0..blocks.len()))
    }
}

/// Another process's cache.
struct Opened {
    memory: SharedBuffer,
    blocks: usize,
    share: PieceShare,
}

pub(super) struct DeviceCopies {
    kv: Arc<DeviceKv>,
    stream: Stream,
    scratches: VecDeque<Scratch>,
    marks: Marks,
    /// By their descriptions: the driver opens a cache once at a time.
    opened: HashMap<Vec<u8>, Weak<Opened>>,
}

impl DeviceCopies {
    pub(super) fn new(kv: Arc<DeviceKv>) -> Result<Self, DeviceError> {
        let (device, piece_bytes) = (kv.device().clone(), kv.share.piece_bytes());
        let pieces = (SCRATCH_BYTES / piece_bytes).clamp(1, MAX_PIECES);
        let scratch = |_| Scratch::new(&device, pieces * piece_bytes, pieces);
        let scratches = (0..SCRATCHES).map(scratch).collect::<Result<_, _>>()?;
        // Small beside what computes, and somebody waits for it.
        let stream = Stream::with_priority(&device, -1)?;
        Ok(Self { kv, stream, scratches, marks: Marks::default(), opened: HashMap::new() })
    }

    fn begin_gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut DeviceSlot,
    ) -> Result<(), DeviceError> {
        let (share, count) = (self.kv.share, blocks.len());
        let Self { stream, scratches, kv, .. } = self;
        scratches.rotate_left(1);
        let scratch = &mut scratches[0];
        scratch.name(stream, blocks)?;
        let pieces = scratch.pieces.slice(0..count * share.piece_bytes());
        let blocks = scratch.blocks.slice(0..count);
        gather_blocks(
            stream,
            pieces,
            layer_of(kv.pieces.all(), kv.blocks, share, layer),
            blocks,
            share,
        )?;
        stream.download(pieces, &mut to.memory, 0)?;
        self.marks.set(&self.stream)
    }

    fn begin_scatter(
        &mut self,
        layer: usize,
        from: &mut DeviceSlot,
        pieces: &[(usize, u32)],
    ) -> Result<(), DeviceError> {
        let (share, bytes) = (self.kv.share, self.kv.share.piece_bytes());
        let Self { stream, scratches, kv, .. } = self;
        scratches.rotate_left(1);
        let scratch = &mut scratches[0];
        let blocks: Vec<u32> = pieces.iter().map(|&(_, block)| block).collect();
        scratch.name(stream, &blocks)?;
        let end = pieces.last().map_or(0, |&(at, _)| at + 1);
        stream.upload(&mut from.memory, 0, scratch.pieces.slice(0..end * bytes))?;
        let pool = layer_of(kv.pieces.all(), kv.blocks, share, layer);
        scatter_runs(stream, pool, scratch.pieces.all(), (pieces, scratch.blocks.all()), share)?;
        self.marks.set(&self.stream)
    }

    fn begin_pull(
        &mut self,
        peer: &Opened,
        layer: usize,
        from: &[u32],
        to: &[u32],
    ) -> Result<(), DeviceError> {
        let (share, bytes) = (self.kv.share, self.kv.share.piece_bytes());
        let Self { stream, scratches, kv, .. } = self;
        let most = scratches[0].pieces.len() / bytes;
        let theirs = layer_of(peer.memory.all(), peer.blocks, peer.share, layer);
        for (from, to) in from.chunks(most).zip(to.chunks(most)) {
            scratches.rotate_left(1);
            let (scratch, count) = (&mut scratches[0], from.len());
            scratch.name(stream, &[from, to].concat())?;
            let pieces = scratch.pieces.slice(0..count * bytes);
            gather_blocks(stream, pieces, theirs, scratch.blocks.slice(0..count), peer.share)?;
            let own = layer_of(kv.pieces.all(), kv.blocks, share, layer);
            scatter_blocks(stream, own, pieces, scratch.blocks.slice(count..2 * count), share)?;
        }
        self.marks.set(&self.stream)
    }

    fn begin_pack(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &Buffer<u8>,
    ) -> Result<(), DeviceError> {
        self.for_parcel(layer, blocks, to, |stream, pieces, pool, blocks, share| {
            gather_blocks(stream, pieces, pool, blocks, share)
        })
    }

    fn begin_unpack(
        &mut self,
        layer: usize,
        from: &Buffer<u8>,
        blocks: &[u32],
    ) -> Result<(), DeviceError> {
        self.for_parcel(layer, blocks, from, |stream, pieces, pool, blocks, share| {
            scatter_blocks(stream, pool, pieces, blocks, share)
        })
    }

    /// Queues a copy between contiguous pieces and blocks of a layer, whose numbers it gets.
    fn for_parcel(
        &mut self,
        layer: usize,
        blocks: &[u32],
        parcel: &Buffer<u8>,
        copy: impl Fn(
            &Stream,
            Slice<'_, u8>,
            Slice<'_, u8>,
            Slice<'_, u32>,
            PieceShare,
        ) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let (share, bytes) = (self.kv.share, self.kv.share.piece_bytes());
        let Self { stream, scratches, kv, .. } = self;
        let most = scratches[0].pieces.len() / bytes;
        let own = layer_of(kv.pieces.all(), kv.blocks, share, layer);
        for (at, blocks) in blocks.chunks(most).enumerate() {
            scratches.rotate_left(1);
            let (scratch, start) = (&mut scratches[0], at * most * bytes);
            scratch.name(stream, blocks)?;
            let pieces = parcel.slice(start..start + blocks.len() * bytes);
            copy(stream, pieces, own, scratch.blocks.slice(0..blocks.len()), share)?;
        }
        self.marks.set(&self.stream)
    }

    /// Whether pieces of the other cache have what this one's do, and lie where they should.
    fn fits(&self, memory: &SharedBuffer, blocks: usize, theirs: &Shape) -> bool {
        let (own, share) = (self.kv.share, theirs.share);
        let alike = theirs.layers == self.kv.layers
            && (share.kv_heads, share.head_bytes) == (own.kv_heads, own.head_bytes);
        let end = share.first_head.checked_add(share.heads).filter(|&end| end <= own.kv_heads);
        let has_ours = share.first_head <= own.first_head
            && end.is_some_and(|end| own.first_head + own.heads <= end);
        let bytes = theirs.layers.checked_mul(blocks).filter(|_| alike && has_ours);
        let bytes = bytes.and_then(|pieces| pieces.checked_mul(share.own_bytes()));
        bytes.is_some_and(|bytes| bytes <= memory.all().len())
    }
}

/// Copies pieces of `from`, given by their indices there, to the blocks that go with them in
/// `pieces`, whose numbers are in `blocks` too.
pub(super) fn scatter_runs(
    stream: &Stream,
    pool: Slice<'_, u8>,
    from: Slice<'_, u8>,
    (pieces, blocks): (&[(usize, u32)], Slice<'_, u32>),
    share: PieceShare,
) -> Result<(), DeviceError> {
    let (bytes, mut done) = (share.piece_bytes(), 0);
    // Mostly one run: everything that has arrived is new.
    for run in pieces.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
        let from = from.slice(run[0].0 * bytes..(run[0].0 + run.len()) * bytes);
        scatter_blocks(stream, pool, from, blocks.slice(done..done + run.len()), share)?;
        done += run.len();
    }
    Ok(())
}

/// The pieces of one layer.
pub(super) fn layer_of(
    pieces: Slice<'_, u8>,
    blocks: usize,
    share: PieceShare,
    layer: usize,
) -> Slice<'_, u8> {
    let bytes = blocks * share.own_bytes();
    pieces.slice(layer * bytes..(layer + 1) * bytes)
}

pub(super) fn slot_of(memory: &mut dyn PageLocked) -> &mut DeviceSlot {
    let memory: &mut dyn Any = memory;
    memory.downcast_mut().expect("slots of the ring that came with the copies")
}

pub(super) fn lost(error: DeviceError) -> MemoryLost {
    // The engine's thread finds out what it was, and says so.
    drop(error);
    MemoryLost
}

impl Copies for DeviceCopies {
    unsafe fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut dyn PageLocked,
    ) -> Result<(), MemoryLost> {
        self.begin_gather(layer, blocks, slot_of(to)).map_err(lost)
    }

    unsafe fn scatter(
        &mut self,
        layer: usize,
        from: &mut dyn PageLocked,
        pieces: &[(usize, u32)],
    ) -> Result<(), MemoryLost> {
        self.begin_scatter(layer, slot_of(from), pieces).map_err(lost)
    }

    fn open(&mut self, shared: &SharedKv) -> Result<Option<PeerKv>, MemoryLost> {
        let Some((handle, shape)) = parse(&shared.description) else { return Ok(None) };
        let blocks = shared.blocks as usize;
        self.opened.retain(|_, cache| cache.strong_count() > 0);
        if let Some(cache) = self.opened.get(&shared.description).and_then(Weak::upgrade) {
            let same = cache.blocks == blocks;
            return Ok(same.then(|| PeerKv { blocks: shared.blocks, cache }));
        }
        // What a driver says of a bad handle may read as if the device were lost: the next copy tells.
        let Ok(memory) = SharedBuffer::open(self.kv.device(), &handle) else { return Ok(None) };
        if !self.fits(&memory, blocks, &shape) {
            return Ok(None);
        }
        let cache = Arc::new(Opened { memory, blocks, share: shape.share });
        self.opened.insert(shared.description.clone(), Arc::downgrade(&cache));
        Ok(Some(PeerKv { blocks: shared.blocks, cache }))
    }

    unsafe fn pull(
        &mut self,
        peer: &PeerKv,
        layer: usize,
        from: &[u32],
        to: &[u32],
    ) -> Result<bool, MemoryLost> {
        let Some(peer) = peer.cache.downcast_ref::<Opened>() else { return Ok(false) };
        self.begin_pull(peer, layer, from, to).map_err(lost)?;
        Ok(true)
    }

    unsafe fn pack(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &Buffer<u8>,
    ) -> Result<(), MemoryLost> {
        self.begin_pack(layer, blocks, to).map_err(lost)
    }

    unsafe fn unpack(
        &mut self,
        layer: usize,
        from: &Buffer<u8>,
        blocks: &[u32],
    ) -> Result<(), MemoryLost> {
        self.begin_unpack(layer, from, blocks).map_err(lost)
    }

    fn wait(&mut self) -> Result<(), MemoryLost> {
        self.marks.wait().map_err(lost)
    }
}
