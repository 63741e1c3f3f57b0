//! Copies between the KV cache of a device and the host, for transfers.
//!
//! Each is waited for where it is asked, on a thread of the staging ring.

#![expect(unsafe_code, reason = "implements unsafe functions")]

use std::sync::Arc;

use baton_kernels::cuda::{Device, DeviceError, Stream};

use super::cache::Cache;
use crate::memory::{KvMemory, MemoryLost};
use crate::staging::{Copies, Direction, PageLocked, Slot, Staging, UNIT_BYTES};

/// Slots of each direction.
const SLOTS: usize = 4;

/// One direction's copies.
struct CacheCopies {
    cache: Arc<Cache>,
    stream: Stream,
}

/// The cache as leases reach it.
pub(super) fn memory(cache: &Arc<Cache>, device: &Arc<Device>) -> Result<KvMemory, DeviceError> {
    let piece_bytes = cache.piece_bytes();
    let direction = || -> Result<Direction, DeviceError> {
        let copies = CacheCopies { cache: cache.clone(), stream: Stream::new(device)? };
        let slot = |_| Box::new(vec![0u8; UNIT_BYTES.max(piece_bytes)]) as Slot;
        Ok((Box::new(copies) as Box<dyn Copies>, (0..SLOTS).map(slot).collect()))
    };
    Ok(KvMemory::Device(Staging::start(piece_bytes, None, direction()?, direction()?)))
}

impl Copies for CacheCopies {
    unsafe fn gather(
        &mut self,
        layer: usize,
        blocks: &[u32],
        to: &mut dyn PageLocked,
    ) -> Result<(), MemoryLost> {
        let bytes = self.cache.piece_bytes();
        for (block, to) in blocks.iter().zip(to.as_mut().chunks_exact_mut(bytes)) {
            let piece = self.stream.read(self.cache.piece(layer, *block));
            to.copy_from_slice(&piece.map_err(|_| MemoryLost)?);
        }
        Ok(())
    }

    unsafe fn scatter(
        &mut self,
        layer: usize,
        from: &mut dyn PageLocked,
        pieces: &[(usize, u32)],
    ) -> Result<(), MemoryLost> {
        let bytes = self.cache.piece_bytes();
        for (index, block) in pieces {
            let from = &(*from).as_ref()[index * bytes..(index + 1) * bytes];
            self.stream.write(from, self.cache.piece(layer, *block)).map_err(|_| MemoryLost)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), MemoryLost> {
        Ok(())
    }
}
