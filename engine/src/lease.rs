//! [`BlockLease`]: the right to read or write one sequence's blocks from outside the engine.
//!
//! A block that takes part in a transfer has two lifetimes: the sequence's and the lease's. It is
//! given to nobody else before both have ended, so late reads and writes touch no other sequence.
#![expect(unsafe_code, reason = "reads and writes the KV cache while the engine runs")]

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use baton_kernels::cpu::KvStore;
use baton_proto::ids::TransferId;

use crate::inbox::Inbox;

/// The blocks of one exported or imported sequence, or of a prefix that is served or fetched. Blocks are named by their ordinal in the
/// sequence. Dropping it gives the blocks back to the engine.
pub struct BlockLease {
    id: TransferId,
    store: Arc<KvStore>,
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
        store: Arc<KvStore>,
        (blocks, shared): (Vec<u32>, usize),
        gate: Arc<Gate>,
        inbox: Arc<Inbox>,
    ) -> Arc<Self> {
        Arc::new(Self { id, store, blocks, shared, gate, inbox })
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

    /// One layer of a block, without a copy; keeps the lease.
    ///
    /// # Panics
    /// If the piece has not been told ready.
    #[must_use]
    pub fn piece(self: &Arc<Self>, layer: usize, ordinal: usize) -> Piece {
        let complete = self.gate.readable[layer].load(Ordering::Acquire);
        assert!(ordinal < complete, "layer {layer} of block {ordinal} is not complete");
        Piece { lease: self.clone(), layer, block: self.blocks[ordinal] }
    }

    /// Copies `bytes` to `offset` of one layer of a block. Does nothing to blocks that were here
    /// at admission, and nothing at all once the sequence runs: what the prefix cache may share
    /// is never written.
    ///
    /// # Panics
    /// If the place does not exist.
    pub fn write(&self, layer: usize, ordinal: usize, offset: usize, bytes: &[u8]) {
        let block = self.blocks[ordinal];
        let writable = self.gate.writable.lock().unwrap_or_else(PoisonError::into_inner);
        if !*writable || ordinal < self.shared {
            return;
        }
        // SAFETY: the block was granted to this lease alone, and stays its own until it is
        // dropped. Other writers wait for the lock; the engine reads and writes the block only
        // after it has taken the lock to end all writing.
        let piece = unsafe { self.store.piece_mut(layer, block) };
        piece[offset..][..bytes.len()].copy_from_slice(bytes);
        drop(writable);
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

/// One layer of one block.
pub struct Piece {
    lease: Arc<BlockLease>,
    layer: usize,
    block: u32,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the piece is complete, and complete pieces are written again only after the
        // block was freed, which the lease prevents.
        unsafe { self.lease.store.piece(self.layer, self.block) }
    }
}
