//! [`Staging`]: blocks in the memory of a device, read and written through page-locked memory.
//!
//! Each direction has a thread with a stream of its own and a ring of slots, each of which takes
//! one payload unit. The thread begins a copy as soon as there is a slot for it, and then waits
//! for the oldest; so copies follow each other without a gap, and there are never more of them
//! than slots. Nobody else waits: whoever asks gets a future.
//!
//! A copy that has begun comes to its end and keeps its lease and its slot until then, whatever
//! becomes of the transfer: so the blocks are given to nobody else meanwhile.
//!
//! The thread of the direction into the device also copies from memory of other processes that
//! shares the machine with it.
#![expect(unsafe_code, reason = "copies go on while nobody touches what they copy")]

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use tokio::sync::oneshot;

use crate::channel::{Parcel, Part};
use crate::lease::BlockLease;
use crate::memory::{MemoryLost, PeerKv, SharedKv, Soon};

mod copier;
mod device;

use copier::{Copier, Request};
pub(crate) use device::MAX_DEVICES;
pub use device::{DeviceKv, DeviceSlot};

/// Memory that a device can copy to and from. Its bytes stay where they are when it is moved.
pub trait PageLocked: AsRef<[u8]> + AsMut<[u8]> + Any + Send + Sync {}

impl<T: AsRef<[u8]> + AsMut<[u8]> + Any + Send + Sync> PageLocked for T {}

/// Most bytes of a payload unit, unless one piece is larger.
pub const UNIT_BYTES: usize = 512 << 10;

/// Page-locked memory for one payload unit.
pub type Slot = Box<dyn PageLocked>;

/// Copies between the KV cache of a device and page-locked memory. Used by one thread.
pub trait Copies: Send + 'static {
    /// Begins to copy one layer of `blocks`, one after the other, to the beginning of `to`. What
    /// was told complete before is seen.
    ///
    /// # Safety
    /// Until it is [waited](Self::wait) for, nothing else reads or writes `to`, and nothing writes
    /// to these pieces.
    unsafe fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut dyn PageLocked,
    ) -> Result<(), MemoryLost>;

    /// Begins to copy pieces of `from` to one layer of blocks, given as pairs of (index of the
    /// piece in `from`, block). What computes after it was waited for sees it.
    ///
    /// # Safety
    /// Until it is [waited](Self::wait) for, nothing writes to `from`, and nothing else reads or
    /// writes these pieces of the cache.
    unsafe fn scatter(
        &mut self,
        layer: usize,
        from: &mut dyn PageLocked,
        pieces: &[(usize, u32)],
    ) -> Result<(), MemoryLost>;

    /// Opens the cache of another process of this machine, which has so many blocks; `None` if
    /// that cannot be done. What it is described by was made by that process, and is not to be
    /// trusted.
    fn open(&mut self, _: &SharedKv) -> Result<Option<PeerKv>, MemoryLost> {
        Ok(None)
    }

    /// Begins to copy one layer of blocks `from` of a cache that was opened to blocks `to`. False:
    /// nothing was begun, as it cannot be read. The peer may change what is read meanwhile.
    ///
    /// # Safety
    /// Until it is [waited](Self::wait) for, nothing else reads or writes these pieces of this
    /// cache. The peer's cache has the blocks.
    unsafe fn pull(
        &mut self,
        _: &PeerKv,
        _layer: usize,
        _from: &[u32],
        _to: &[u32],
    ) -> Result<bool, MemoryLost> {
        Ok(false)
    }

    /// Begins to copy one layer of `blocks`, one after the other, to the beginning of each of a
    /// parcel's parts, which are on the same devices.
    ///
    /// # Safety
    /// Until it is [waited](Self::wait) for, nothing else reads or writes `to`, and nothing writes
    /// to these pieces.
    unsafe fn pack(
        &mut self,
        _layer: usize,
        _blocks: &[u32],
        _to: &[Part],
    ) -> Result<(), MemoryLost> {
        Err(MemoryLost)
    }

    /// Begins to copy pieces from the beginning of a parcel's parts, one after the other, to one layer
    /// of `blocks`. What computes after it was waited for sees it.
    ///
    /// # Safety
    /// Until it is [waited](Self::wait) for, nothing writes to `from`, and nothing else reads or
    /// writes these pieces of the cache.
    unsafe fn unpack(
        &mut self,
        _layer: usize,
        _from: &[Part],
        _blocks: &[u32],
    ) -> Result<(), MemoryLost> {
        Err(MemoryLost)
    }

    /// Waits for the oldest copy that was begun and not yet waited for.
    fn wait(&mut self) -> Result<(), MemoryLost>;
}

/// A handle of the threads that copy; they end when nobody has one, nor a slot, any more.
#[derive(Clone)]
pub struct Staging {
    piece_bytes: usize,
    shared: Option<SharedKv>,
    /// Of a cache that channels may be made to: each device's part.
    devices: Arc<[Arc<DeviceKv>]>,
    out: Sender<Request>,
    into: Sender<Request>,
}

/// A direction's copies, and its ring of slots.
pub type Direction = (Box<dyn Copies>, Vec<Slot>);

impl Staging {
    /// Starts the threads of both directions, out of the device and into it. Each slot has room
    /// for a payload unit of pieces of `piece_bytes`. `shared` is how other processes open the
    /// cache.
    ///
    /// # Panics
    /// If the operating system has no threads.
    #[must_use]
    pub fn start(
        piece_bytes: usize,
        shared: Option<SharedKv>,
        (copies, slots): Direction,
        into: Direction,
    ) -> Self {
        let out = Copier::start("kv-export", copies, slots);
        let into = Copier::start("kv-import", into.0, into.1);
        Self { piece_bytes, shared, devices: Arc::default(), out, into }
    }

    /// The same, of a cache that channels may be made to.
    pub(crate) fn of_devices(self, devices: Arc<[Arc<DeviceKv>]>) -> Self {
        Self { devices, ..self }
    }

    pub(crate) fn devices(&self) -> Arc<[Arc<DeviceKv>]> {
        self.devices.clone()
    }

    /// Fills a parcel with one layer of the blocks `ordinals` of a lease.
    pub(crate) fn pack(
        &self,
        lease: Arc<BlockLease>,
        layer: usize,
        ordinals: Range<usize>,
        parcel: Parcel,
    ) -> Soon<Parcel> {
        let (reply, packed) = oneshot::channel();
        let blocks = lease.block_ids(ordinals).to_vec();
        ask(&self.out, Request::Pack { lease, layer, blocks, parcel, reply }, packed)
    }

    /// Copies a parcel to one layer of the blocks `ordinals` of a lease. False: they may not be
    /// written any more.
    pub(crate) fn unpack(
        &self,
        lease: Arc<BlockLease>,
        layer: usize,
        ordinals: Range<usize>,
        parcel: Parcel,
    ) -> Soon<bool> {
        let (reply, unpacked) = oneshot::channel();
        let blocks = lease.block_ids(ordinals).to_vec();
        ask(&self.into, Request::Unpack { lease, layer, blocks, parcel, reply }, unpacked)
    }

    pub(crate) fn shared(&self) -> Option<&SharedKv> {
        self.shared.as_ref()
    }

    /// Opens another process's cache.
    pub(crate) fn open(&self, shared: SharedKv) -> Soon<Option<PeerKv>> {
        let (reply, opened) = oneshot::channel();
        ask(&self.into, Request::Open { shared, reply }, opened)
    }

    /// Copies one layer of blocks `from` of another process to those of a lease.
    pub(crate) fn pull(
        &self,
        (peer, from): (PeerKv, Vec<u32>),
        lease: Arc<BlockLease>,
        layer: usize,
        ordinals: Range<usize>,
    ) -> Soon<bool> {
        let (reply, pulled) = oneshot::channel();
        let to = lease.block_ids(ordinals).to_vec();
        ask(&self.into, Request::Pull { peer, from, lease, layer, to, reply }, pulled)
    }

    pub(crate) fn piece_bytes(&self) -> usize {
        self.piece_bytes
    }

    /// One layer of the blocks `ordinals` of a lease.
    pub(crate) fn read(
        &self,
        lease: Arc<BlockLease>,
        layer: usize,
        ordinals: Range<usize>,
    ) -> Soon<Staged> {
        let (reply, read) = oneshot::channel();
        let bytes = ordinals.len() * self.piece_bytes;
        let (blocks, home) = (lease.block_ids(ordinals).to_vec(), self.out.clone());
        let request = Request::Room { for_read: Some((lease, layer, blocks)), bytes, home, reply };
        ask(&self.out, request, read)
    }

    /// A slot to be filled.
    pub(crate) fn room(&self, bytes: usize) -> Soon<Staged> {
        let (reply, room) = oneshot::channel();
        let home = self.into.clone();
        ask(&self.into, Request::Room { for_read: None, bytes, home, reply }, room)
    }

    /// Copies `pieces` of a filled slot, given as (index, block), to one layer of blocks of
    /// `lease`.
    pub(crate) fn apply(
        &self,
        lease: Arc<BlockLease>,
        layer: usize,
        mut staged: Staged,
        pieces: Vec<(usize, u32)>,
    ) -> Soon<()> {
        let (reply, applied) = oneshot::channel();
        let slot = staged.slot.take().expect("only dropping takes the slot");
        ask(&self.into, Request::Apply { lease, layer, slot, pieces, reply }, applied)
    }
}

/// A thread that is gone drops what it was asked.
fn ask<T: Send + 'static>(
    thread: &Sender<Request>,
    request: Request,
    reply: oneshot::Receiver<T>,
) -> Soon<T> {
    let _ = thread.send(request);
    Box::pin(async move { reply.await.map_err(|_| MemoryLost) })
}

/// A slot in use. Goes back to its ring when dropped.
pub(crate) struct Staged {
    slot: Option<Slot>,
    bytes: usize,
    home: Sender<Request>,
}

impl AsRef<[u8]> for Staged {
    fn as_ref(&self) -> &[u8] {
        let slot = self.slot.as_ref().expect("only dropping takes the slot");
        &(**slot).as_ref()[..self.bytes]
    }
}

impl AsMut<[u8]> for Staged {
    fn as_mut(&mut self) -> &mut [u8] {
        let slot = self.slot.as_mut().expect("only dropping takes the slot");
        &mut (**slot).as_mut()[..self.bytes]
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let _ = self.home.send(Request::Returned(slot));
        }
    }
}
