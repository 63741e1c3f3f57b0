//! [`DeviceCopies`]: copies between a cache, slots, parcels and other processes' caches. The heads
//! of the cache may be shared among several devices. Whoever is at the other end of a transfer sees
//! whole pieces, and may share its heads in another way, or not at all.
#![expect(unsafe_code, reason = "implements unsafe functions")]

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use baton_kernels::cuda::DeviceError;

use super::DeviceKv;
use super::description::Description;
use super::opened::Opened;
use super::shard::Shard;
use super::slot::DeviceSlot;
use crate::channel::Part;
use crate::memory::{MemoryLost, PeerKv, SharedKv};
use crate::staging::{Copies, PageLocked};

pub(super) struct DeviceCopies {
    shards: Vec<Shard>,
    /// By their descriptions: the driver opens a cache once at a time.
    opened: HashMap<Vec<u8>, Weak<Opened>>,
}

impl DeviceCopies {
    pub(super) fn new(devices: &[Arc<DeviceKv>]) -> Result<Self, DeviceError> {
        let shards = devices.iter().map(Shard::new).collect::<Result<_, _>>()?;
        Ok(Self { shards, opened: HashMap::new() })
    }

    /// Begins what each device has to do of a copy.
    fn begin(
        &mut self,
        mut copy: impl FnMut(usize, &mut Shard) -> Result<(), DeviceError>,
    ) -> Result<(), MemoryLost> {
        for (own, shard) in self.shards.iter_mut().enumerate() {
            copy(own, shard).and_then(|()| shard.mark()).map_err(lost)?;
        }
        Ok(())
    }
}

fn slot_of(memory: &mut dyn PageLocked) -> &mut DeviceSlot {
    let memory: &mut dyn Any = memory;
    memory.downcast_mut().expect("slots of the ring that came with the copies")
}

fn lost(error: DeviceError) -> MemoryLost {
    // The engine's thread finds out what it was, and says so.
    drop(error);
    MemoryLost
}

/// What a device has of a parcel.
fn parts_of(parcel: &[Part], own: usize) -> impl Iterator<Item = &Part> {
    parcel.iter().filter(move |part| part.device == own)
}

impl Copies for DeviceCopies {
    unsafe fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut dyn PageLocked,
    ) -> Result<(), MemoryLost> {
        let slot = slot_of(to);
        self.begin(|_, shard| shard.gather(layer, blocks, slot))
    }

    unsafe fn scatter(
        &mut self,
        layer: usize,
        from: &mut dyn PageLocked,
        pieces: &[(usize, u32)],
    ) -> Result<(), MemoryLost> {
        let slot = slot_of(from);
        self.begin(|_, shard| shard.scatter(layer, slot, pieces))
    }

    fn open(&mut self, shared: &SharedKv) -> Result<Option<PeerKv>, MemoryLost> {
        let blocks = shared.blocks as usize;
        self.opened.retain(|_, cache| cache.strong_count() > 0);
        if let Some(cache) = self.opened.get(&shared.description).and_then(Weak::upgrade) {
            let same = cache.blocks == blocks;
            return Ok(same.then(|| PeerKv { blocks: shared.blocks, cache }));
        }
        let theirs = Description::parse(&shared.description);
        let devices = self.shards.iter().map(|shard| &shard.kv);
        let Some(opened) = theirs.and_then(|theirs| Opened::open(devices, &theirs, blocks)) else {
            return Ok(None);
        };
        let cache = Arc::new(opened);
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
        self.begin(|own, shard| shard.pull((peer, own), layer, from, to))?;
        Ok(true)
    }

    unsafe fn pack(&mut self, layer: usize, blocks: &[u32], to: &[Part]) -> Result<(), MemoryLost> {
        self.begin(|own, shard| {
            parts_of(to, own).try_for_each(|part| shard.pack(layer, blocks, part))
        })
    }

    unsafe fn unpack(
        &mut self,
        layer: usize,
        from: &[Part],
        blocks: &[u32],
    ) -> Result<(), MemoryLost> {
        self.begin(|own, shard| {
            parts_of(from, own).try_for_each(|part| shard.unpack(layer, part, blocks))
        })
    }

    fn wait(&mut self) -> Result<(), MemoryLost> {
        self.shards.iter_mut().try_for_each(|shard| shard.marks.wait()).map_err(lost)
    }
}
