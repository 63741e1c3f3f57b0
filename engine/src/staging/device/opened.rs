//! [`Opened`]: the cache of another process.

use std::sync::Arc;

use baton_kernels::cuda::{PieceShare, Pieces, SharedBuffer};

use super::DeviceKv;
use super::description::Description;

/// Another process's cache, as far as this one's devices need it.
pub(super) struct Opened {
    pub(super) blocks: usize,
    /// By this process's device: the parts that have some of its heads, which together have all.
    devices: Vec<Vec<Part>>,
}

struct Part {
    memory: SharedBuffer,
    share: PieceShare,
}

impl Opened {
    /// `None` if that cannot be done, or the cache is not what it is said to be, or of another shape.
    pub(super) fn open<'a>(
        devices: impl Iterator<Item = &'a Arc<DeviceKv>>,
        theirs: &Description,
        blocks: usize,
    ) -> Option<Self> {
        let parts = |kv: &Arc<DeviceKv>| {
            let needed = theirs.parts.iter().filter(|(_, share)| kv.share.common(share).is_some());
            let part = |(handle, share): &(_, PieceShare)| {
                // What a driver says of a bad handle may read as if the device were lost: the next
                // copy tells.
                let memory = SharedBuffer::open(kv.device(), handle).ok()?;
                let bytes = theirs.layers.checked_mul(blocks)?.checked_mul(share.own_bytes())?;
                (bytes <= memory.all().len()).then_some(Part { memory, share: *share })
            };
            fits(kv, theirs).then(|| needed.map(part).collect::<Option<Vec<_>>>())?
        };
        Some(Self { blocks, devices: devices.map(parts).collect::<Option<_>>()? })
    }

    /// One layer of the parts that a device needs.
    pub(super) fn layer(&self, device: usize, layer: usize) -> impl Iterator<Item = Pieces<'_>> {
        self.devices[device].iter().map(move |Part { memory, share }| {
            let bytes = self.blocks * share.own_bytes();
            let memory = memory.all().slice(layer * bytes..(layer + 1) * bytes);
            Pieces { memory, share: *share }
        })
    }
}

/// Whether the other cache has pieces of the same shape.
fn fits(own: &DeviceKv, theirs: &Description) -> bool {
    let alike = |(_, share): &(_, PieceShare)| {
        (share.kv_heads, share.head_bytes) == (own.share.kv_heads, own.share.head_bytes)
    };
    theirs.layers == own.layers && !theirs.parts.is_empty() && theirs.parts.iter().all(alike)
}
