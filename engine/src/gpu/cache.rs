//! The paged KV cache in device memory.

use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, PieceShare, Slice};
use baton_proto::geometry::KvGeometry;

use super::shard::Shard;
use crate::staging::DeviceKv;

/// All layers' pieces, in one allocation: `[layers][blocks][k|v][kv_heads][block_tokens][head_dim]`.
pub(super) struct Cache {
    pieces: Arc<Buffer<u8>>,
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
        Ok(Self { pieces: Arc::new(pieces), geometry, blocks })
    }

    /// The cache as leases reach it, or the part of one that a device has.
    pub(super) fn kv(&self, shard: Shard) -> DeviceKv {
        let heads = self.geometry.kv_heads as usize;
        let head_bytes = self.geometry.piece_bytes() / (2 * heads);
        let (kv_heads, first_head) = (shard.ranks * heads, shard.rank * heads);
        let share = PieceShare { kv_heads, first_head, heads, head_bytes };
        let (pieces, layers) = (self.pieces.clone(), self.geometry.layers as usize);
        DeviceKv { pieces, layers, blocks: self.blocks, share }
    }

    /// The pieces of a layer.
    pub(super) fn layer(&self, layer: usize) -> Slice<'_, u8> {
        let bytes = self.blocks * self.geometry.piece_bytes();
        self.pieces.slice(layer * bytes..(layer + 1) * bytes)
    }

    pub(super) fn block_tokens(&self) -> usize {
        self.geometry.block_tokens as usize
    }
}
