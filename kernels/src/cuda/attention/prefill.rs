//! Attention of prompt chunks.

use half::bf16;

use super::{AttentionInput, QueryRows};
use crate::cuda::error::DeviceError;
use crate::cuda::kernel::Grid;
use crate::cuda::kv::{HeadShape, KvElements};
use crate::cuda::memory::Slice;
use crate::cuda::stream::Stream;
use crate::cuda::tensor_map::{Dimension, Swizzle, TensorMap};

/// Query rows (tokens times heads of a group) of a tile, and keys of a step.
const TILE: usize = 128;
/// Elements of a row of a TMA box: 128 bytes.
const COLUMN: usize = 64;
/// Stages of the rings of keys and of values.
const STAGES: usize = 2;
/// Shared memory for barriers.
const BARRIER_BYTES: usize = 128;
/// A producer and two consumers of 128 threads.
const THREADS: u32 = 384;
/// Words of a tile: `prefill::Tile`.
const TILE_WORDS: usize = 5;

/// Tiles of one KV head that a chunk of so many tokens falls into.
pub(super) fn tiles_of(rows: usize, shape: &HeadShape) -> usize {
    rows.div_ceil((TILE / shape.group()).max(1))
}

/// The tiles of a step's chunks, for [`prefill_attention`] to read on the device. All layers of a
/// step have the same.
///
/// # Panics
/// If a group has more than 128 heads, or a position is beyond 2³².
#[must_use]
pub fn prefill_tiles(chunks: &[QueryRows], shape: &HeadShape) -> Vec<u32> {
    let tokens = TILE / shape.group();
    assert!(tokens > 0, "groups of {} heads", shape.group());
    let word = |value: usize| u32::try_from(value).expect("positions and rows below 2^32");
    let mut tiles = Vec::new();
    for chunk in chunks {
        let keys = chunk.position + chunk.rows;
        for first in (0..chunk.rows).step_by(tokens) {
            let rows = tokens.min(chunk.rows - first);
            let place = [chunk.row + first, rows, chunk.position + first, keys, chunk.sequence];
            tiles.push(place.map(word));
        }
    }
    // Longest first: those of most keys. Blocks take them in a snake, so their sums are about equal.
    tiles.sort_by_key(|[_, rows, position, ..]| std::cmp::Reverse(position + rows));
    tiles.into_flattened()
}

/// Attention of the rows of `tiles`, from [`prefill_tiles`], on Hopper: `out` is
/// `[rows, heads, head_dim]`, and other rows of it are not written.
///
/// # Errors
/// If there is no such kernel for the device, the heads or an e4m3 cache, or the driver fails.
///
/// # Panics
/// If a buffer does not have the shape that is described.
pub fn prefill_attention(
    stream: &Stream,
    out: Slice<'_, bf16>,
    input: &AttentionInput<'_>,
    tiles: Slice<'_, u32>,
) -> Result<(), DeviceError> {
    let rows = input.check(&out);
    assert!(tiles.len().is_multiple_of(TILE_WORDS), "whole tiles");
    let tile_count = tiles.len() / TILE_WORDS;
    if tile_count == 0 {
        return Ok(());
    }
    let (shape, kv) = (&input.shape, &input.kv);
    let kernel = kernel_for(input)?;
    let pool_rows = kv.pieces.len() / (shape.head_dim * kv.elements.bytes());
    let blocks = stream.device().multiprocessors().min(tile_count * shape.kv_heads);
    let tile_bytes = TILE * shape.head_dim * size_of::<bf16>();
    let grid = Grid::new(blocks, THREADS).shared((1 + 2 * STAGES) * tile_bytes + BARRIER_BYTES);
    stream.launch(
        kernel,
        grid,
        &[
            &query_map(input, rows)?,
            &kv_map(input, pool_rows)?,
            &out,
            &tiles,
            &(tile_count as u32),
            &kv.block_tables,
            &(kv.max_blocks as u32),
            &(shape.group() as u32),
            &(shape.kv_heads as u32),
            &(pool_rows as u32),
            &(input.window as u32),
            &input.scale_log2(),
        ],
    )
}

fn kernel_for(input: &AttentionInput<'_>) -> Result<&'static str, DeviceError> {
    if input.kv.elements != KvElements::Bf16 || input.shape.group() > TILE {
        return Err(input.unsupported("prefill"));
    }
    match (input.shape.head_dim, input.kv.block_tokens) {
        (64, 16) => Ok("prefill_attention_d64_p16"),
        (64, 32) => Ok("prefill_attention_d64_p32"),
        (64, 64) => Ok("prefill_attention_d64_p64"),
        (128, 16) => Ok("prefill_attention_d128_p16"),
        (128, 32) => Ok("prefill_attention_d128_p32"),
        (128, 64) => Ok("prefill_attention_d128_p64"),
        _ => Err(input.unsupported("prefill")),
    }
}

/// Queries as `[rows, heads, head_dim]`; a box is a tile's tokens and the heads of a group.
fn query_map(input: &AttentionInput<'_>, rows: usize) -> Result<TensorMap, DeviceError> {
    let (shape, element) = (&input.shape, size_of::<bf16>());
    let group = shape.group();
    let dimension = |size, stride: usize, box_size| Dimension {
        size,
        stride_bytes: stride * element,
        box_size: box_size as u32,
    };
    let dimensions = [
        dimension(shape.head_dim, 1, COLUMN),
        dimension(shape.heads, shape.head_dim, group),
        dimension(rows, shape.row(), TILE / group),
    ];
    TensorMap::new(input.qkv, &dimensions, Swizzle::Bytes128)
}

/// The cache as rows of one head of one token; a box is a head of a block.
fn kv_map(input: &AttentionInput<'_>, rows: usize) -> Result<TensorMap, DeviceError> {
    let (head_dim, element) = (input.shape.head_dim, size_of::<bf16>());
    let tokens = input.kv.block_tokens as u32;
    let dimensions = [
        Dimension { size: head_dim, stride_bytes: element, box_size: COLUMN as u32 },
        Dimension { size: rows, stride_bytes: head_dim * element, box_size: tokens },
    ];
    TensorMap::new(input.kv.pieces.cast::<bf16>(), &dimensions, Swizzle::Bytes128)
}
