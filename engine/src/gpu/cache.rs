//! The paged KV cache in device memory, and blocks of it as bf16.

use std::sync::Arc;

use baton_kernels::cuda::{
    self, Buffer, Device, DeviceError, HeadShape, KvElements, PagedKv, PieceShare, Slice, Stream,
};
use baton_proto::geometry::{KvDtype, KvGeometry};
use half::bf16;

use super::places::WidenedShape;
use super::shard::Shard;
use crate::staging::DeviceKv;

/// How kernels know the elements of a cache. e4m3 has a scale of 1, which is vLLM's default too
/// (<https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/>): it has all of its
/// precision from 2⁻⁶ to 448, and a scale that is not measured by the model is a guess.
pub(super) fn elements(dtype: KvDtype) -> KvElements {
    match dtype {
        KvDtype::Fp8 => KvElements::E4m3 { k_scale: 1.0, v_scale: 1.0 },
        _ => KvElements::Bf16,
    }
}

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

    pub(super) fn elements(&self) -> KvElements {
        elements(self.geometry.dtype)
    }
}

/// Room for blocks of one layer of an e4m3 cache as bf16, which attention of long chunks reads.
pub(super) struct Widened {
    pieces: Buffer<bf16>,
    /// 0, 1, 2, …: the table of who has all of them.
    table: Buffer<u32>,
    shape: HeadShape,
    block_tokens: usize,
}

impl Widened {
    /// Room for so many blocks.
    pub(super) fn new(
        stream: &Stream,
        shape: HeadShape,
        block_tokens: usize,
        blocks: usize,
    ) -> Result<Self, DeviceError> {
        let piece = 2 * shape.kv_heads * block_tokens * shape.head_dim;
        let table: Vec<u32> = (0..blocks as u32).collect();
        let pieces = Buffer::new(stream.device(), blocks * piece)?;
        Ok(Self { pieces, table: stream.buffer(&table)?, shape, block_tokens })
    }

    pub(super) fn shape(&self) -> WidenedShape {
        WidenedShape { blocks: self.table.len(), block_tokens: self.block_tokens }
    }

    /// Queues filling it with `blocks` of a cache; they as blocks 0, 1, 2, … of another one.
    pub(super) fn fill(
        &self,
        stream: &Stream,
        kv: &PagedKv<'_>,
        blocks: Slice<'_, u32>,
    ) -> Result<PagedKv<'_>, DeviceError> {
        let piece = self.pieces.len() / self.table.len();
        let wide = self.pieces.slice(0..blocks.len() * piece);
        cuda::widen_blocks(stream, wide, kv, &self.shape, blocks)?;
        Ok(PagedKv {
            pieces: wide.cast(),
            elements: KvElements::Bf16,
            block_tokens: self.block_tokens,
            block_tables: self.table.all(),
            max_blocks: 1,
        })
    }
}
