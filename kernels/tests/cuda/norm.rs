use baton_kernels::cuda::{rms_norm, testing};
use half::bf16;

use crate::support::{BF16, Random, assert_close, f64s};

fn reference(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let rows = x.chunks(weight.len());
    let normed = rows.flat_map(|row| {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean + epsilon).sqrt();
        row.iter().zip(weight).map(move |(v, w)| v * scale * w)
    });
    normed.collect()
}

#[test]
fn rms_norm_is_that_of_its_formula() {
    testing::schedules(|stream| {
        let mut random = Random::new(1);
        let some = [(1 + random.below(4), 8 * (1 + random.below(600)))];
        for (rows, width) in [(1, 8), (3, 64), (1, 8200), (2, 16384)].into_iter().chain(some) {
            let (x, weight) = (random.bf16s(rows * width), random.bf16s(width));
            let (x_there, weight_there) =
                (stream.buffer(&x).unwrap(), stream.buffer(&weight).unwrap());
            let y = stream.buffer(&vec![bf16::NAN; x.len()]).unwrap();
            rms_norm(stream, y.all(), x_there.all(), weight_there.all(), 1e-5).unwrap();
            let found = stream.read(y.all()).unwrap();
            let expected = reference(&f64s(&x), &f64s(&weight), 1e-5);
            assert_close(&f64s(&found), &expected, BF16);
        }
    });
}
