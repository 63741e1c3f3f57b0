//! `rms_norm` and `add_rms_norm` against their definition in double precision.

use baton_kernels::cuda::{Stream, add_rms_norm, rms_norm, testing};
use half::bf16;

use crate::support::{Random, assert_rounded, read, upload};

const EPS: f32 = 1e-3;
/// Rows and their width: one vector, less than a warp, whole warps, several pieces a thread, the
/// widest.
const SHAPES: [(usize, usize); 6] =
    [(1, 8), (3, 136), (5, 1024), (2, 5120), (2, 9224), (1, 32_768)];

fn assert_normed(x: &[bf16], weight: &[bf16], got: &[bf16]) {
    for (row, (x, got)) in x.chunks(weight.len()).zip(got.chunks(weight.len())).enumerate() {
        let squares: f64 = x.iter().map(|x| x.to_f64().powi(2)).sum();
        let factor = 1.0 / (squares / weight.len() as f64 + f64::from(EPS)).sqrt();
        for (i, got) in got.iter().enumerate() {
            let want = x[i].to_f64() * factor * weight[i].to_f64();
            assert_rounded(*got, want, want.abs() * 3e-6, || {
                format!("row {row} of {} elements, element {i}", weight.len())
            });
        }
    }
}

struct Case {
    x: Vec<bf16>,
    update: Vec<bf16>,
    weight: Vec<bf16>,
}

impl Case {
    fn new(rows: usize, width: usize) -> Self {
        let mut random = Random::new((rows * width) as u64);
        // Rows of different sizes, and one so small that epsilon decides.
        let sizes = [1.0, 30.0, 1e-3, 0.1, 5.0];
        let row = |random: &mut Random, row: usize| random.sized(width, sizes[row % 5]);
        let x = (0..rows).flat_map(|i| row(&mut random, i)).collect();
        let update = (0..rows).flat_map(|i| row(&mut random, i + 1)).collect();
        Self { x, update, weight: random.sized(width, 2.0) }
    }
}

fn plain(stream: &Stream, case: &Case) {
    let (x, weight) = (upload(stream, &case.x), upload(stream, &case.weight));
    let normed = upload(stream, &vec![bf16::NAN; case.x.len()]);
    rms_norm(stream, normed.all(), x.all(), weight.all(), EPS).unwrap();
    assert_normed(&case.x, &case.weight, &read(stream, &normed));
}

fn fused(stream: &Stream, case: &Case) {
    let (x, update) = (upload(stream, &case.x), upload(stream, &case.update));
    let weight = upload(stream, &case.weight);
    let normed = upload(stream, &vec![bf16::NAN; case.x.len()]);
    add_rms_norm(stream, normed.all(), x.all(), update.all(), weight.all(), EPS).unwrap();
    let sum = |(x, y): (&bf16, &bf16)| bf16::from_f32(x.to_f32() + y.to_f32());
    let want: Vec<bf16> = case.x.iter().zip(&case.update).map(sum).collect();
    assert_eq!(read(stream, &x), want, "the stream is the rounded sum");
    assert_normed(&want, &case.weight, &read(stream, &normed));
}

#[test]
fn norms_follow_their_definition() {
    testing::schedules(|stream| {
        let random = Random::new(1).shapes(5, 4096);
        for (rows, width) in SHAPES.into_iter().chain(random) {
            let case = Case::new(rows, width);
            plain(stream, &case);
            fused(stream, &case);
        }
    });
}

#[test]
fn a_row_is_normed_the_same_in_any_batch() {
    testing::schedules(|stream| {
        let case = Case::new(4, 1032);
        let norm = |x: &[bf16]| {
            let (x, weight) = (upload(stream, x), upload(stream, &case.weight));
            let normed = upload(stream, &vec![bf16::NAN; x.len()]);
            rms_norm(stream, normed.all(), x.all(), weight.all(), EPS).unwrap();
            read(stream, &normed)
        };
        let together = norm(&case.x);
        let alone: Vec<bf16> = case.x.chunks(1032).flat_map(norm).collect();
        assert_eq!(together, alone);
    });
}
