//! Products of one tile, over `tile.cu`: what tests compare the emulator with a device by.

use super::super::error::DeviceError;
use super::super::kernel::Grid;
use super::super::memory::Slice;
use super::super::stream::Stream;
use super::super::tensor_map::{Dimension, Swizzle, TensorMap};

/// Rows and columns of C for kernels that use wgmma.
pub const WGMMA_TILE: (usize, usize) = (64, 128);
/// Rows and columns of C for kernels that use mma.
pub const MMA_TILE: (usize, usize) = (16, 8);
/// Bytes of a row of an operand that TMA brings at a time.
const ROW_BYTES: usize = 128;
const STAGES: usize = 2;

/// C = A Bᵀ (or A B with `b_is_kn`) by a `wgmma_tile_*` kernel. Operands are elements of
/// `element_bytes`: bf16, or e4m3. `depth` is a multiple of what 128 bytes hold.
///
/// # Errors
/// If the device has no such kernel, or the driver fails.
///
/// # Panics
/// If the slices are not of as many elements.
pub fn wgmma_tile(
    stream: &Stream,
    kernel: &'static str,
    c: Slice<'_, f32>,
    (a, b): (Slice<'_, u8>, Slice<'_, u8>),
    (depth, element_bytes, b_is_kn): (usize, usize, bool),
) -> Result<(), DeviceError> {
    let (rows, columns) = WGMMA_TILE;
    let wide = ROW_BYTES / element_bytes;
    assert!(depth.is_multiple_of(wide) && c.len() == rows * columns);
    let map = |slice, height: usize, width: usize, box_height| {
        let inner = Dimension { size: width, stride_bytes: element_bytes, box_size: wide as u32 };
        let stride_bytes = width * element_bytes;
        let outer = Dimension { size: height, stride_bytes, box_size: box_height };
        match element_bytes {
            2 => TensorMap::new(cast(slice), &[inner, outer], Swizzle::Bytes128),
            _ => TensorMap::new(slice, &[inner, outer], Swizzle::Bytes128),
        }
    };
    let of_a = map(a, rows, depth, rows as u32)?;
    let of_b = match b_is_kn {
        true => map(b, depth, columns, wide as u32)?,
        false => map(b, columns, depth, columns as u32)?,
    };
    let shared = STAGES * ((rows + columns) * ROW_BYTES + 2 * 8) + 1024;
    let grid = Grid::new(1, 256).shared(shared);
    stream.launch(kernel, grid, &[&c, &of_a, &of_b, &(depth as i32)])
}

fn cast(slice: Slice<'_, u8>) -> Slice<'_, u16> {
    slice.cast()
}

/// C = A Bᵀ (or A B) by a `mma_tile_*` kernel. `depth` is a multiple of what 32 bytes hold.
///
/// # Errors
/// If the device has no such kernel, or the driver fails.
///
/// # Panics
/// If C is not of one tile.
pub fn mma_tile(
    stream: &Stream,
    kernel: &'static str,
    c: Slice<'_, f32>,
    (a, b): (Slice<'_, u8>, Slice<'_, u8>),
    depth: usize,
) -> Result<(), DeviceError> {
    assert_eq!(c.len(), MMA_TILE.0 * MMA_TILE.1);
    let grid = Grid::new(1, 32).shared(2048);
    stream.launch(kernel, grid, &[&c, &a, &b, &(depth as i32)])
}
