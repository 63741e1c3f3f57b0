//! [`Description`]: what other processes open a cache by.

use std::sync::Arc;

use baton_kernels::cuda::{IpcHandle, PieceShare};

use super::{DeviceKv, MAX_DEVICES};

/// A cache, and what the driver opens each device's part of it by. The devices have its heads in
/// their order, so none is missing and none is there twice.
pub(super) struct Description {
    pub(super) layers: usize,
    pub(super) parts: Vec<(IpcHandle, PieceShare)>,
}

impl Description {
    /// `None` if the memory cannot be shared, or the devices do not make a whole cache.
    pub(super) fn of(devices: &[Arc<DeviceKv>]) -> Option<Self> {
        let part = |kv: &Arc<DeviceKv>| Some((kv.pieces.share().ok()?, kv.share));
        let parts: Vec<_> = devices.iter().map(part).collect::<Option<_>>()?;
        let mut next = 0;
        for (_, share) in &parts {
            (share.first_head == next).then(|| next += share.heads)?;
        }
        let whole = next == devices.first()?.share.kv_heads && parts.len() <= MAX_DEVICES;
        whole.then(|| Self { layers: devices[0].layers, parts })
    }

    /// Layers, bytes of a head, and of each device its heads and its handle.
    pub(super) fn encode(&self) -> Vec<u8> {
        let head_bytes = self.parts.first().map_or(0, |(_, share)| share.head_bytes);
        let mut bytes = [self.layers, head_bytes].map(number).concat();
        for (handle, share) in &self.parts {
            bytes.extend(number(share.heads));
            bytes.extend(handle);
        }
        bytes
    }

    /// Reads what may be anything.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        const NUMBER: usize = size_of::<u64>();
        let (numbers, rest) = bytes.split_first_chunk::<{ 2 * NUMBER }>()?;
        let (layers, head_bytes) = numbers.split_at(NUMBER);
        let (parts, []) = rest.as_chunks::<{ NUMBER + size_of::<IpcHandle>() }>() else {
            return None;
        };
        if parts.len() > MAX_DEVICES {
            return None;
        }
        let (mut found, mut kv_heads) = (Vec::new(), 0_usize);
        for part in parts {
            let (heads, handle) = part.split_first_chunk::<NUMBER>()?;
            let (heads, first_head) = (read(heads)?, kv_heads);
            kv_heads = kv_heads.checked_add(heads)?;
            found.push((*handle.first_chunk()?, first_head, heads));
        }
        let head_bytes = read(head_bytes)?;
        let parts = found.into_iter().map(|(handle, first_head, heads)| {
            (handle, PieceShare { kv_heads, first_head, heads, head_bytes })
        });
        Some(Self { layers: read(layers)?, parts: parts.collect() })
    }
}

fn number(value: usize) -> [u8; 8] {
    (value as u64).to_le_bytes()
}

fn read(bytes: &[u8]) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
}
