//! [`Parcel`]: pieces on their way through a channel, and the [`Ring`] of a channel's parcels.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_kernels::cuda::{Buffer, DeviceError, PieceShare, Slice};
use tokio::sync::oneshot;

use super::lanes::Lane;
use super::{PARCEL_BYTES, PARCELS};
use crate::staging::DeviceKv;

/// Memory of a device for some heads of a parcel's pieces, one after the other.
pub struct Part {
    /// Which of the devices that share the cache.
    pub device: usize,
    /// The heads.
    pub share: PieceShare,
    /// Room for them.
    pub memory: Buffer<u8>,
}

/// Memory of the devices for some pieces. Goes back to its channel when dropped.
pub struct Parcel {
    parts: Option<Vec<Part>>,
    pieces: usize,
    ring: Arc<Ring>,
}

impl Parcel {
    /// Bytes of the pieces, all heads together.
    pub(crate) fn bytes(&self) -> usize {
        self.pieces * self.ring.piece_bytes
    }

    /// One for each lane.
    pub(crate) fn parts(&self) -> &[Part] {
        self.parts.as_deref().expect("only dropping takes the memory")
    }

    /// What the pieces are in each part.
    pub(super) fn contents(&self) -> impl Iterator<Item = Slice<'_, u8>> {
        let contents = |part: &'_ Part| 0..self.pieces * part.share.own_bytes();
        self.parts().iter().map(move |part| part.memory.slice(contents(part)))
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            Ring::give_back(&self.ring, parts);
        }
    }
}

/// The parcels of a channel.
pub(super) struct Ring {
    piece_bytes: usize,
    /// Most pieces of a parcel.
    most: usize,
    parcels: Mutex<Parcels>,
}

#[derive(Default)]
struct Parcels {
    free: Vec<Vec<Part>>,
    /// Who waits for one, and for how many pieces.
    waiting: VecDeque<(usize, oneshot::Sender<Parcel>)>,
}

impl Ring {
    pub(super) fn new(devices: &[Arc<DeviceKv>], lanes: &[Lane]) -> Result<Arc<Self>, DeviceError> {
        let piece_bytes = devices.first().map_or(1, |kv| kv.share.piece_bytes());
        let most = (PARCEL_BYTES / piece_bytes).max(1);
        let part = |&Lane { device, share }: &Lane| {
            let memory = Buffer::new(devices[device].device(), most * share.own_bytes())?;
            Ok(Part { device, share, memory })
        };
        let free = (0..PARCELS).map(|_| lanes.iter().map(part).collect());
        let free = free.collect::<Result<_, DeviceError>>()?;
        let parcels = Mutex::new(Parcels { free, waiting: VecDeque::new() });
        Ok(Arc::new(Self { piece_bytes, most, parcels }))
    }

    fn parcels(&self) -> MutexGuard<'_, Parcels> {
        self.parcels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a parcel can have so many bytes: they are whole pieces, and not too many.
    pub(super) fn fits(&self, bytes: usize) -> bool {
        bytes.is_multiple_of(self.piece_bytes) && bytes / self.piece_bytes <= self.most
    }

    /// A parcel, if one is free.
    pub(super) fn take(ring: &Arc<Self>, bytes: usize) -> Option<Parcel> {
        let parts = ring.parcels().free.pop()?;
        Some(Self::parcel(ring, parts, bytes / ring.piece_bytes))
    }

    /// A parcel as soon as one is free; `None` if none is as large.
    pub(super) fn room(self: &Arc<Self>, bytes: usize) -> Option<oneshot::Receiver<Parcel>> {
        let (give, given) = oneshot::channel();
        if !self.fits(bytes) {
            return None;
        }
        let pieces = bytes / self.piece_bytes;
        let mut parcels = self.parcels();
        match parcels.free.pop() {
            Some(parts) => {
                drop(parcels);
                let _ = give.send(Self::parcel(self, parts, pieces));
            }
            None => parcels.waiting.push_back((pieces, give)),
        }
        Some(given)
    }

    fn parcel(ring: &Arc<Self>, parts: Vec<Part>, pieces: usize) -> Parcel {
        Parcel { parts: Some(parts), pieces, ring: ring.clone() }
    }

    fn give_back(ring: &Arc<Self>, parts: Vec<Part>) {
        let mut parcels = ring.parcels();
        // Who does not wait any more is passed over.
        while let Some((pieces, give)) = parcels.waiting.pop_front() {
            if !give.is_closed() {
                drop(parcels);
                // If that was in vain it comes back here.
                let _ = give.send(Self::parcel(ring, parts, pieces));
                return;
            }
        }
        parcels.free.push(parts);
    }
}

#[cfg(test)]
mod tests {
    use baton_kernels::cuda::testing;

    use super::*;

    #[test]
    fn parcels_go_around() {
        let Some(device) = testing::test_device() else { return };
        let whole = PieceShare { kv_heads: 2, first_head: 0, heads: 2, head_bytes: 32 };
        let pieces = Arc::new(Buffer::new(&device.device, whole.piece_bytes()).unwrap());
        let kv = Arc::new(DeviceKv { pieces, layers: 1, blocks: 1, share: whole });
        let one =
            |first_head| Lane { device: 0, share: PieceShare { first_head, heads: 1, ..whole } };
        let ring = Ring::new(&[kv], &[one(0), one(1)]).unwrap();
        let bytes = whole.piece_bytes();
        assert!(ring.room(PARCEL_BYTES + bytes).is_none(), "more than one has");
        assert!(ring.room(bytes + 1).is_none(), "not whole pieces");
        let mut taken: Vec<_> = (0..PARCELS).map(|_| Ring::take(&ring, bytes).unwrap()).collect();
        assert!(Ring::take(&ring, bytes).is_none());
        let parts: Vec<_> = taken[0].contents().map(|slice| slice.len()).collect();
        assert_eq!(parts, [bytes / 2; 2], "each lane's part");
        // Who waits for one gets it; who does not wait any more is passed over.
        let [mut first, gone, mut last] = [7, 8, 9].map(|n| ring.room(n * bytes).unwrap());
        drop(gone);
        assert!(first.try_recv().is_err());
        taken.pop();
        let parcel = first.try_recv().unwrap();
        assert!(last.try_recv().is_err());
        drop(parcel);
        assert_eq!(last.try_recv().unwrap().bytes(), 9 * bytes);
        taken.clear();
        assert_eq!(ring.parcels().free.len(), PARCELS);
    }
}
