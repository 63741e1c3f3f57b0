//! The paged KV cache in device memory.

use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, Slice};
use baton_proto::geometry::KvGeometry;

/// All layers' pieces, in one allocation: `[layers][blocks][k|v][kv_heads][block_tokens][head_dim]`.
pub(super) struct Cache {
    pieces: Buffer<u8>,
    geometry: KvGeometry,
    blocks: usize,
}

impl Cache {
    pub(super) fn new(
        device: &Arc<Device>,
        geometry: KvGeometry,
        blocks: usize,
    ) -> Result<Self, DeviceError> {
        let pieces = Buffer::new(device, blocks * geometry.block_bytes())?;
        Ok(Self { pieces, geometry, blocks })
    }

    /// The pieces of a layer.
    pub(super) fn layer(&self, layer: usize) -> Slice<'_, u8> {
        let bytes = self.blocks * self.geometry.piece_bytes();
        self.pieces.slice(layer * bytes..(layer + 1) * bytes)
    }

    /// One layer of a block.
    pub(super) fn piece(&self, layer: usize, block: u32) -> Slice<'_, u8> {
        let (block, bytes) = (block as usize, self.piece_bytes());
        self.layer(layer).slice(block * bytes..(block + 1) * bytes)
    }

    pub(super) fn piece_bytes(&self) -> usize {
        self.geometry.piece_bytes()
    }

    pub(super) fn block_tokens(&self) -> usize {
        self.geometry.block_tokens as usize
    }
}
