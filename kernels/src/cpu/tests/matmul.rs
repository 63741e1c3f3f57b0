use proptest::prelude::*;

use super::{DTYPES, bits, cases, numbers, pools, rounded};
use crate::Dtype;
use crate::cpu::{PackedMatrix, ThreadPool, matmul};

/// What `matmul` is documented to compute, one sum after the other.
fn reference(x: &[f32], w: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut y = Vec::new();
    for x in x.chunks_exact(inputs) {
        for w in w.chunks_exact(inputs).take(outputs) {
            y.push(x.iter().zip(w).fold(0.0, |sum: f32, (x, w)| x.mul_add(*w, sum)));
        }
    }
    y
}

fn product(pool: &ThreadPool, x: &[f32], w: &PackedMatrix) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / w.inputs() * w.outputs()];
    matmul(pool, x, w, &mut y);
    y
}

fn check(dtype: Dtype, rows: usize, inputs: usize, outputs: usize) {
    let x = numbers(1, rows * inputs);
    let (bytes, w) = rounded(dtype, &numbers(2, inputs * outputs));
    let expected = reference(&x, &w, inputs, outputs);
    // Each output is near the same sum in double precision, so the reference is right too.
    for (i, y) in expected.iter().enumerate() {
        let (x, w) = (&x[i / outputs * inputs..][..inputs], &w[i % outputs * inputs..][..inputs]);
        let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        assert!((f64::from(*y) - exact).abs() < 1e-6 * inputs as f64);
    }
    for pool in pools() {
        let w = PackedMatrix::pack(&pool, outputs, inputs, dtype, &[&bytes]);
        let got = product(&pool, &x, &w);
        assert_eq!(bits(&got), bits(&expected), "{:?} x {}", pool.isa(), pool.threads());
    }
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn every_path_gives_the_documented_bits(
        dtype in prop::sample::select(&DTYPES),
        rows in 1_usize..50,
        inputs in 1_usize..600,
        outputs in 1_usize..150,
    ) {
        check(dtype, rows, inputs, outputs);
    }

    #[test]
    fn rows_do_not_depend_on_their_batch(rows in 1_usize..80, cut in 0_usize..80) {
        let (inputs, outputs) = (300, 70);
        let x = numbers(3, rows * inputs);
        let (bytes, _) = rounded(Dtype::Bf16, &numbers(4, inputs * outputs));
        let pool = ThreadPool::new(2);
        let w = PackedMatrix::pack(&pool, outputs, inputs, Dtype::Bf16, &[&bytes]);
        let (head, tail) = x.split_at(cut.min(rows) * inputs);
        let parts = [product(&pool, head, &w), product(&pool, tail, &w)].concat();
        prop_assert_eq!(bits(&parts), bits(&product(&pool, &x, &w)));
    }
}

#[test]
fn batches_of_each_kind_of_path() {
    for dtype in DTYPES {
        for rows in [1, 2, 3, 4, 5, 12, 13, 31, 32, 65] {
            check(dtype, rows, 257, 33);
        }
        check(dtype, 1, 520, 600);
    }
}

#[test]
fn stacked_pieces_are_one_matrix_and_rows_come_back() {
    let (inputs, outputs) = (48, 75);
    let pool = ThreadPool::new(2);
    for dtype in DTYPES {
        let (bytes, wide) = rounded(dtype, &numbers(5, inputs * outputs));
        let (a, rest) = bytes.split_at(10 * inputs * dtype.bytes());
        let (b, c) = rest.split_at(33 * inputs * dtype.bytes());
        let w = PackedMatrix::pack(&pool, outputs, inputs, dtype, &[a, b, &[], c]);
        let mut row = vec![0.0; inputs];
        for (output, expected) in wide.chunks_exact(inputs).enumerate() {
            w.unpack_row(output, &mut row);
            assert_eq!(row, expected);
        }
    }
}

#[test]
fn nothing_to_do() {
    let pool = ThreadPool::new(2);
    let w = PackedMatrix::pack(&pool, 3, 2, Dtype::F32, &[&[0; 24]]);
    assert!(product(&pool, &[], &w).is_empty());
}

#[test]
#[should_panic(expected = "the same number of rows")]
fn sizes_are_checked() {
    let pool = ThreadPool::new(1);
    let w = PackedMatrix::pack(&pool, 3, 2, Dtype::F32, &[&[0; 24]]);
    matmul(&pool, &[0.0; 4], &w, &mut [0.0; 3]);
}
