//! The tensor cores' instructions, by products of one tile.

use crate::support::{Random, assert_close, e4m3_to_f64};
use baton_kernels::cuda::testing::{self, MMA_TILE, WGMMA_TILE, mma_tile, wgmma_tile};
use baton_kernels::cuda::{Stream, Target};

/// Elements as bytes, and as numbers.
fn operand(random: &mut Random, len: usize, element_bytes: usize) -> (Vec<u8>, Vec<f64>) {
    if element_bytes == 2 {
        let values = random.bf16s(len);
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (bytes, values.iter().map(|v| f64::from(v.to_f32())).collect())
    } else {
        // 1, 1.25, 1.5 and 1.75 of both signs: Hopper adds products of e4m3 in some 13 bits, which
        // hold the sums of these.
        let bytes: Vec<u8> = (0..len).map(|_| random.bits() as u8 & 0x86 | 0x38).collect();
        let values = bytes.iter().map(|byte| e4m3_to_f64(*byte)).collect();
        (bytes, values)
    }
}

fn product(
    a: &[f64],
    b: &[f64],
    (rows, columns): (usize, usize),
    depth: usize,
    b_is_kn: bool,
) -> Vec<f64> {
    let b_at = |column, k| if b_is_kn { b[k * columns + column] } else { b[column * depth + k] };
    let element = |i: usize| {
        let (row, column) = (i / columns, i % columns);
        (0..depth).map(|k| a[row * depth + k] * b_at(column, k)).sum()
    };
    (0..rows * columns).map(element).collect()
}

fn check(
    stream: &Stream,
    tile: (usize, usize),
    (depth, element_bytes, b_is_kn): (usize, usize, bool),
    multiply: impl Fn(&Stream, &[u8], &[u8]) -> Vec<f32>,
) {
    let mut random = Random::new(depth as u64);
    let (a_bytes, a) = operand(&mut random, tile.0 * depth, element_bytes);
    let (b_bytes, b) = operand(&mut random, tile.1 * depth, element_bytes);
    let found: Vec<_> = multiply(stream, &a_bytes, &b_bytes).into_iter().map(f64::from).collect();
    assert_close(&found, &product(&a, &b, tile, depth, b_is_kn), 1e-4);
}

fn check_wgmma(kernel: &'static str, element_bytes: usize, b_is_kn: bool) {
    testing::schedules(|stream| {
        if stream.device().target() != Target::Hopper {
            return;
        }
        for stages in [1, 2, 5] {
            let depth = stages * 128 / element_bytes;
            check(stream, WGMMA_TILE, (depth, element_bytes, b_is_kn), |stream, a, b| {
                let (a, b) = (stream.buffer(a).unwrap(), stream.buffer(b).unwrap());
                let c = stream.buffer(&vec![f32::NAN; WGMMA_TILE.0 * WGMMA_TILE.1]).unwrap();
                let shape = (depth, element_bytes, b_is_kn);
                wgmma_tile(stream, kernel, c.all(), (a.all(), b.all()), shape).unwrap();
                stream.read(c.all()).unwrap()
            });
        }
    });
}

fn check_mma(kernel: &'static str, element_bytes: usize, b_is_kn: bool) {
    testing::schedules(|stream| {
        if stream.device().target() != Target::Hopper {
            return;
        }
        for steps in [1, 3] {
            let depth = steps * 32 / element_bytes;
            check(stream, MMA_TILE, (depth, element_bytes, b_is_kn), |stream, a, b| {
                let (a, b) = (stream.buffer(a).unwrap(), stream.buffer(b).unwrap());
                let c = stream.buffer(&vec![f32::NAN; MMA_TILE.0 * MMA_TILE.1]).unwrap();
                mma_tile(stream, kernel, c.all(), (a.all(), b.all()), depth).unwrap();
                stream.read(c.all()).unwrap()
            });
        }
    });
}

#[test]
fn wgmma_multiplies() {
    check_wgmma("wgmma_tile_nt", 2, false);
    check_wgmma("wgmma_tile_nn", 2, true);
    check_wgmma("wgmma_tile_registers_nt", 2, false);
    check_wgmma("wgmma_tile_registers_nn", 2, true);
    check_wgmma("wgmma_tile_e4m3", 1, false);
    check_wgmma("wgmma_tile_registers_e4m3", 1, false);
}

#[test]
fn mma_multiplies() {
    check_mma("mma_tile_nt", 2, false);
    check_mma("mma_tile_nn", 2, true);
    check_mma("mma_tile_e4m3", 1, false);
}
