//! Attention of single rows and short runs.

use half::bf16;

use super::AttentionInput;
use super::decode_plan::{ITEM_WORDS, UNIT_ROWS};
use crate::cuda::device::Device;
use crate::cuda::error::DeviceError;
use crate::cuda::kernel::Grid;
use crate::cuda::kv::{HeadShape, KvElements};
use crate::cuda::memory::{Buffer, Slice};
use crate::cuda::stream::Stream;

const WARPS: usize = 4;
/// Keys that a warp copies at once.
const STEP_KEYS: usize = 16;
/// Most bytes, and most steps, of a warp's ring.
const RING_BYTES: usize = 24 << 10;
const RING_STEPS: usize = 8;
/// Blocks that a multiprocessor runs at once.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;

/// Workers for which to make a [`DecodePlan`](super::DecodePlan): as many as the device runs at
/// once, with a block for each KV head.
#[must_use]
pub fn decode_workers(device: &Device, shape: &HeadShape) -> usize {
    (device.multiprocessors() * BLOCKS_PER_MULTIPROCESSOR / shape.kv_heads).max(1)
}

/// Memory for partial results of [`decode_attention`], for one stream at a time. A launch leaves it
/// as the next one needs it.
pub struct DecodeScratch {
    items: usize,
    shape: HeadShape,
    sums: Buffer<f32>,
    /// Pairs.
    weights: Buffer<f32>,
    arrived: Buffer<u32>,
}

impl DecodeScratch {
    /// For plans of at most so many items ([`DecodePlan::most_items`](super::DecodePlan::most_items)).
    ///
    /// # Errors
    /// If the device has not as much memory.
    pub fn new(stream: &Stream, items: usize, shape: &HeadShape) -> Result<Self, DeviceError> {
        let (device, rows) = (stream.device(), items * shape.kv_heads * UNIT_ROWS);
        let arrived = Buffer::new(device, items * shape.kv_heads)?;
        stream.zero(arrived.all())?;
        Ok(Self {
            items,
            shape: *shape,
            sums: Buffer::new(device, rows * shape.head_dim)?,
            weights: Buffer::new(device, rows * 2)?,
            arrived,
        })
    }
}

/// Attention of the rows of a plan, whose items and shares lie in device memory: `out` is
/// `[rows, heads, head_dim]`, and other rows of it are not written. `items` may be longer than the
/// plan's; `shares` says which there are.
///
/// The same plan gives the same bits; another plan rounds differently.
///
/// # Errors
/// If there is no such kernel for the heads, or the driver fails.
///
/// # Panics
/// If a buffer does not have the shape that is described.
pub fn decode_attention(
    stream: &Stream,
    out: Slice<'_, bf16>,
    input: &AttentionInput<'_>,
    (items, shares): (Slice<'_, u32>, Slice<'_, u32>),
    scratch: &DecodeScratch,
) -> Result<(), DeviceError> {
    input.check(&out);
    let (shape, kv) = (&input.shape, &input.kv);
    assert!(items.len().is_multiple_of(ITEM_WORDS), "whole items");
    assert!(items.len() / ITEM_WORDS <= scratch.items, "scratch for the items");
    assert!(*shape == scratch.shape, "scratch for these heads");
    let workers = shares.len().checked_sub(1).expect("shares end somewhere");
    let (kernel, ring_bytes) = kernel_for(input)?;
    let (k_scale, v_scale) = match kv.elements {
        KvElements::Bf16 => (1.0, 1.0),
        KvElements::E4m3 { k_scale, v_scale } => (k_scale, v_scale),
    };
    let sums_bytes = UNIT_ROWS * shape.head_dim * size_of::<f32>();
    let shared_bytes = WARPS * (ring_bytes + UNIT_ROWS * 8) + sums_bytes + 16;
    let grid = Grid::of([workers, shape.kv_heads, 1], WARPS as u32 * 32).shared(shared_bytes);
    stream.launch(
        kernel,
        grid,
        &[
            &out,
            &input.qkv,
            &(shape.row() as u32),
            &kv.pieces,
            &items,
            &shares,
            &kv.block_tables,
            &(kv.max_blocks as u32),
            &kv.block_tokens.ilog2(),
            &(shape.group() as u32),
            &(shape.kv_heads as u32),
            &(input.window as u32),
            &(input.scale_log2() * k_scale),
            &v_scale,
            &scratch.sums.all(),
            &scratch.weights.all(),
            &scratch.arrived.all(),
        ],
    )
}

/// The kernel, and the bytes of a warp's ring in it.
fn kernel_for(input: &AttentionInput<'_>) -> Result<(&'static str, usize), DeviceError> {
    let head_dim = input.shape.head_dim;
    let kernel = match (head_dim, input.kv.elements) {
        _ if input.shape.group() > UNIT_ROWS => return Err(input.unsupported("decode")),
        (64, KvElements::Bf16) => "decode_attention_d64_bf16",
        (128, KvElements::Bf16) => "decode_attention_d128_bf16",
        (64, KvElements::E4m3 { .. }) => "decode_attention_d64_e4m3",
        (128, KvElements::E4m3 { .. }) => "decode_attention_d128_e4m3",
        _ => return Err(input.unsupported("decode")),
    };
    let step_bytes = 2 * STEP_KEYS * head_dim * input.kv.elements.bytes();
    Ok((kernel, (RING_BYTES / step_bytes).min(RING_STEPS) * step_bytes))
}
