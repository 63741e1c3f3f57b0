//! [`BlockLease`]: the right to read or write one sequence's blocks from outside the engine.
//!
//! A block that takes part in a transfer has two lifetimes: the sequence's and the lease's. It is
//! given to nobody else before both have ended, so late reads and writes touch no other sequence.
#![expect(unsafe_code, reason = "reads and writes the KV cache while the engine runs")]

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use baton_kernels::cpu::KvStore;
use baton_proto::ids::TransferId;

use crate::channel::{NcclChannel, Parcel};
use crate::inbox::Inbox;
use crate::memory::{KvMemory, PeerKv, Soon, at_hand};
use crate::place::Place;
use crate::staging::Staged;

/// The blocks of one exported or imported sequence, or of a prefix that is served or fetched. Blocks are named by their ordinal in the
/// sequence. Dropping it gives the blocks back to the engine.
pub struct BlockLease {
    id: TransferId,
    memory: KvMemory,
    blocks: Vec<u32>,
    /// Leading blocks that lay in the prefix cache at admission.
    shared: usize,
    gate: Arc<Gate>,
    inbox: Arc<Inbox>,
}

/// What the engine allows the holder of a lease.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Per layer, leading blocks whose piece is complete and never written again.
    readable: Box<[AtomicUsize]>,
    /// Whether the blocks that were not shared at admission may be written. The lock is held
    /// during a write, which keeps two writers, and a writer and the engine, apart.
    writable: Mutex<bool>,
}

impl Gate {
    /// Of blocks to be read, the first `ready` of them now.
    pub(crate) fn reading(layers: usize, ready: usize) -> Arc<Self> {
        let readable = (0..layers).map(|_| AtomicUsize::new(ready)).collect();
        Arc::new(Self { readable, writable: Mutex::new(false) })
    }

    /// Of blocks to be written.
    pub(crate) fn writing(layers: usize) -> Arc<Self> {
        let readable = (0..layers).map(|_| AtomicUsize::new(0)).collect();
        Arc::new(Self { readable, writable: Mutex::new(true) })
    }

    /// The first `blocks` blocks are complete in `layer`.
    pub(crate) fn complete(&self, layer: usize, blocks: usize) {
        // Release: what was written to the pieces is seen by whoever reads the count.
        self.readable[layer].store(blocks, Ordering::Release);
    }

    /// Ends writing, once a write in progress has ended.
    pub(crate) fn seal(&self) {
        *self.writable.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

impl BlockLease {
    pub(crate) fn new(
        id: TransferId,
        memory: KvMemory,
        (blocks, shared): (Vec<u32>, usize),
        gate: Arc<Gate>,
        inbox: Arc<Inbox>,
    ) -> Arc<Self> {
        Arc::new(Self { id, memory, blocks, shared, gate, inbox })
    }

    /// The job whose blocks these are.
    #[must_use]
    pub fn id(&self) -> TransferId {
        self.id
    }

    /// How many blocks the job's tokens occupy, the last one perhaps in part.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Export, serve: how many leading blocks could be read at admission.
    #[must_use]
    pub fn ready_blocks(&self) -> usize {
        self.shared
    }

    /// Import, fetch: how many leading blocks are here already; the others are to be written.
    #[must_use]
    pub fn held(&self) -> usize {
        self.shared
    }

    /// One layer of the blocks `ordinals`, in one part or more. Host memory is not copied and keeps
    /// the lease; what is copied out of a device keeps a slot of its ring.
    ///
    /// # Panics
    /// If a piece has not been told ready.
    #[must_use]
    pub fn read(self: &Arc<Self>, layer: usize, ordinals: Range<usize>) -> Soon<Vec<Piece>> {
        let complete = self.gate.readable[layer].load(Ordering::Acquire);
        assert!(ordinals.end <= complete, "layer {layer} of blocks {ordinals:?} is not complete");
        let lease = self.clone();
        match &self.memory {
            KvMemory::Host(store) => {
                let block = |&block: &u32| {
                    let (lease, store) = (lease.clone(), store.clone());
                    Piece(Held::InPlace { _lease: lease, store, layer, block })
                };
                at_hand(self.blocks[ordinals].iter().map(block).collect())
            }
            KvMemory::Device(staging) => {
                let read = staging.read(lease, layer, ordinals);
                Box::pin(async { Ok(vec![Piece(Held::Staged(read.await?))]) })
            }
        }
    }

    /// Where one layer of the blocks `ordinals` can be written.
    ///
    /// # Panics
    /// If there are no such blocks.
    #[must_use]
    pub fn place(self: &Arc<Self>, layer: usize, ordinals: Range<usize>) -> Soon<Place> {
        assert!(ordinals.end <= self.blocks.len(), "there are no blocks {ordinals:?}");
        let lease = self.clone();
        match &self.memory {
            KvMemory::Host(_) => at_hand(Place::at_hand(lease, layer, ordinals)),
            KvMemory::Device(staging) => {
                let room = staging.room(ordinals.len() * staging.piece_bytes());
                Box::pin(async move { Ok(Place::staged(lease, layer, ordinals, room.await?)) })
            }
        }
    }

    /// Copies one layer of blocks `from` of a peer's cache to the blocks `ordinals`. False: they
    /// cannot be read. Done, and bound to come to its end, as [`Place::apply`].
    ///
    /// # Panics
    /// If there are no such blocks here.
    #[must_use]
    pub fn copy_from(
        self: &Arc<Self>,
        peer: &PeerKv,
        layer: usize,
        ordinals: Range<usize>,
        from: Vec<u32>,
    ) -> Soon<bool> {
        match &self.memory {
            KvMemory::Device(staging) if ordinals.start >= self.shared => {
                staging.pull((peer.clone(), from), self.clone(), layer, ordinals)
            }
            _ => at_hand(false),
        }
    }

    /// A copy of one layer of the blocks `ordinals` for a channel, of which it waits for a parcel
    /// that is free. `None`: the blocks are not on its device, more than a parcel holds, or the
    /// channel is broken.
    ///
    /// # Panics
    /// If a piece has not been told ready.
    #[must_use]
    pub fn pack(
        self: &Arc<Self>,
        channel: &NcclChannel,
        layer: usize,
        ordinals: Range<usize>,
    ) -> Soon<Option<Parcel>> {
        let complete = self.gate.readable[layer].load(Ordering::Acquire);
        assert!(ordinals.end <= complete, "layer {layer} of blocks {ordinals:?} is not complete");
        let KvMemory::Device(staging) = self.memory.clone() else { return at_hand(None) };
        let Some(room) = channel.room(ordinals.len() * staging.piece_bytes()) else {
            return at_hand(None);
        };
        let lease = self.clone();
        Box::pin(async move {
            let Ok(parcel) = room.await else { return Ok(None) };
            staging.pack(lease, layer, ordinals, parcel).await.map(Some)
        })
    }

    /// Copies what came through a channel to one layer of the blocks `ordinals`. False: they may not
    /// be written, or other ones came. Done, and bound to come to its end, as [`Place::apply`].
    ///
    /// # Panics
    /// If there are no such blocks here.
    #[must_use]
    pub fn unpack(
        self: &Arc<Self>,
        layer: usize,
        ordinals: Range<usize>,
        parcel: Parcel,
    ) -> Soon<bool> {
        match &self.memory {
            KvMemory::Device(staging)
                if ordinals.start >= self.shared
                    && parcel.bytes() == ordinals.len() * staging.piece_bytes() =>
            {
                staging.unpack(self.clone(), layer, ordinals, parcel)
            }
            _ => at_hand(false),
        }
    }

    pub(crate) fn memory(&self) -> &KvMemory {
        &self.memory
    }

    /// Where in the cache the blocks `ordinals` are.
    #[must_use]
    pub fn block_ids(&self, ordinals: Range<usize>) -> &[u32] {
        &self.blocks[ordinals]
    }

    /// Runs `write`, unless the blocks may not be written any more.
    pub(crate) fn while_writable<T>(&self, write: impl FnOnce() -> T) -> Option<T> {
        let writable = self.gate.writable.lock().unwrap_or_else(PoisonError::into_inner);
        writable.then(write)
    }

    /// Copies `bytes` to `offset` of one layer of a block of host memory. Does nothing to blocks
    /// that were here at admission, and nothing at all once the sequence runs: what the prefix
    /// cache may share is never written.
    pub(crate) fn write(&self, layer: usize, ordinal: usize, offset: usize, bytes: &[u8]) {
        let KvMemory::Host(store) = &self.memory else { return };
        if ordinal < self.shared {
            return;
        }
        let block = self.blocks[ordinal];
        self.while_writable(|| {
            // SAFETY: the block was granted to this lease alone, and stays its own until it is
            // dropped. Other writers wait for the lock; the engine reads and writes the block only
            // after it has taken the lock to end all writing.
            let piece = unsafe { store.piece_mut(layer, block) };
            piece[offset..][..bytes.len()].copy_from_slice(bytes);
        });
    }
}

impl Drop for BlockLease {
    fn drop(&mut self) {
        self.inbox.lease_returned(self.id);
    }
}

impl fmt::Debug for BlockLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, blocks, shared, .. } = self;
        write!(f, "BlockLease({id}, {} blocks, {shared} shared)", blocks.len())
    }
}

/// One layer of one block, or of several that follow each other.
pub struct Piece(Held);

enum Held {
    InPlace { _lease: Arc<BlockLease>, store: Arc<KvStore>, layer: usize, block: u32 },
    Staged(Staged),
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: the piece is complete, and complete pieces are written again only after the
            // block was freed, which the lease prevents.
            Held::InPlace { store, layer, block, .. } => unsafe { store.piece(*layer, *block) },
            Held::Staged(staged) => staged.as_ref(),
        }
    }
}
