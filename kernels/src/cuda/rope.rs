//! From projected queries, keys and values to attention: norms of heads, rotation
//! (<https://arxiv.org/abs/2104.09864>), keys and values into the cache. Over `rope.cu`.

use half::bf16;

use super::error::DeviceError;
use super::kernel::{Grid, parameters};
use super::kv::{HeadShape, KvElements, PagedKv};
use super::memory::Slice;
use super::shape::check_lengths;
use super::stream::Stream;

/// The position of a row that pads a batch: kernels do nothing for it.
pub const NO_POSITION: u32 = u32::MAX;

const THREADS: usize = 256;

/// Cosines and sines of each row's position: `[positions, pairs]` each, the same for all layers of
/// a step. `frequencies: [pairs]` in radians per position, `head_dim / 2` of them; `scale` is a
/// factor on both (YaRN's attention factor).
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If the slices do not fit each other.
pub fn rope_angles(
    stream: &Stream,
    (cos, sin): (Slice<'_, f32>, Slice<'_, f32>),
    positions: Slice<'_, u32>,
    frequencies: Slice<'_, f32>,
    scale: f32,
) -> Result<(), DeviceError> {
    let pairs = frequencies.len();
    check_lengths(positions.len() * pairs, &[cos.len(), sin.len()]);
    if positions.is_empty() {
        return Ok(());
    }
    let grid = Grid::new(positions.len(), 128);
    let pairs = pairs as i32;
    stream.launch("rope_angles", grid, &[&cos, &sin, &positions, &frequencies, &scale, &pairs])
}

/// Which tokens the rows of a step are.
#[derive(Clone, Copy)]
pub struct RowPlaces<'a> {
    /// Position of each row in its sequence, or [`NO_POSITION`].
    pub positions: Slice<'a, u32>,
    /// Sequence of each row: a row of the block tables.
    pub sequences: Slice<'a, u32>,
}

/// How heads are turned.
#[derive(Clone, Copy)]
pub struct Turning<'a> {
    /// Cosines and sines of the rows, from [`rope_angles`].
    pub angles: (Slice<'a, f32>, Slice<'a, f32>),
    /// Weights `[head_dim]` of the norms of q's and k's heads, if the model has such.
    pub norms: Option<(Slice<'a, bf16>, Slice<'a, bf16>)>,
    /// Epsilon of these norms.
    pub epsilon: f32,
}

/// The kernel's `Shape`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    heads: i32,
    kv_heads: i32,
    block_tokens: i32,
    max_blocks: i32,
}
parameters!(Shape);

/// For each row of `qkv: [rows, heads + 2 kv_heads, head_dim]`: normalises the heads of q and k,
/// turns them to the row's position, and writes q back in place and k and v into the cache. What
/// `qkv` holds of k and v stays as it was.
///
/// # Errors
/// If the driver fails.
///
/// # Panics
/// If the slices do not fit each other, or heads are not of 64, 128 or 256 elements. Positions and
/// blocks are not checked: they must exist, and rows must differ in where they go.
pub fn turn_and_store(
    stream: &Stream,
    qkv: Slice<'_, bf16>,
    heads: HeadShape,
    turning: &Turning<'_>,
    places: &RowPlaces<'_>,
    kv: &PagedKv<'_>,
) -> Result<(), DeviceError> {
    let RowPlaces { positions, sequences } = *places;
    let (rows, (cos, sin)) = (positions.len(), turning.angles);
    check_lengths(rows * heads.row(), &[qkv.len()]);
    check_lengths(rows * heads.head_dim / 2, &[cos.len(), sin.len()]);
    check_lengths(rows, &[sequences.len()]);
    let (q_norm, k_norm) = turning.norms.map_or((0, 0), |(q, k)| {
        check_lengths(heads.head_dim, &[q.len(), k.len()]);
        (q.address(), k.address())
    });
    if rows == 0 {
        return Ok(());
    }
    let shape = Shape {
        heads: heads.heads as i32,
        kv_heads: heads.kv_heads as i32,
        block_tokens: kv.block_tokens as i32,
        max_blocks: kv.max_blocks as i32,
    };
    let (k_inverse, v_inverse) = inverse_scales(kv.elements);
    // A sixteenth of a head for each thread.
    let blocks = (heads.row() / 16).div_ceil(THREADS);
    stream.launch(
        kernel_for(heads.head_dim, kv.elements),
        Grid::of([rows, blocks, 1], THREADS as u32),
        &[
            &qkv,
            &kv.pieces,
            &cos,
            &sin,
            &q_norm,
            &k_norm,
            &positions,
            &sequences,
            &kv.block_tables,
            &shape,
            &turning.epsilon,
            &k_inverse,
            &v_inverse,
        ],
    )
}

fn kernel_for(head_dim: usize, elements: KvElements) -> &'static str {
    match (head_dim, elements) {
        (64, KvElements::Bf16) => "turn_heads_64_bf16",
        (128, KvElements::Bf16) => "turn_heads_128_bf16",
        (256, KvElements::Bf16) => "turn_heads_256_bf16",
        (64, KvElements::E4m3 { .. }) => "turn_heads_64_e4m3",
        (128, KvElements::E4m3 { .. }) => "turn_heads_128_e4m3",
        (256, KvElements::E4m3 { .. }) => "turn_heads_256_e4m3",
        _ => panic!("heads of {head_dim} elements, and not of 64, 128 or 256"),
    }
}

fn inverse_scales(elements: KvElements) -> (f32, f32) {
    match elements {
        KvElements::Bf16 => (1.0, 1.0),
        KvElements::E4m3 { k_scale, v_scale } => (1.0 / k_scale, 1.0 / v_scale),
    }
}
