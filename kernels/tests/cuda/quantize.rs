//! Rows to e4m3 and back.

use baton_kernels::cuda::{E4M3_MAX, dequantize_rows, quantize_rows, testing};
use half::bf16;

use crate::support::{Random, assert_nearest_e4m3, assert_rounded, e4m3_to_f64, read, upload};

fn rows_of_many_sizes(rows: usize, width: usize) -> Vec<bf16> {
    let mut random = Random::new((rows * width) as u64);
    let sizes = [1.0, 1000.0, 1e-6, 0.0, 448.0];
    (0..rows).flat_map(|row| random.sized(width, sizes[row % 5])).collect()
}

#[test]
fn rows_are_rounded_to_the_nearest_with_their_own_scale() {
    testing::schedules(|stream| {
        let shapes = [(6, 8), (5, 520), (2, 8192), (1, 32_768)].into_iter();
        for (rows, width) in shapes.chain(Random::new(4).shapes(6, 3000)) {
            let x = rows_of_many_sizes(rows, width);
            let values = upload(stream, &vec![0xff_u8; rows * width]);
            let scales = upload(stream, &vec![f32::NAN; rows]);
            let on_device = upload(stream, &x);
            quantize_rows(stream, values.all(), scales.all(), on_device.all()).unwrap();
            let back = upload(stream, &vec![bf16::NAN; rows * width]);
            dequantize_rows(stream, back.all(), values.all(), scales.all()).unwrap();
            let (values, scales, back) =
                (read(stream, &values), read(stream, &scales), read(stream, &back));
            for (row, x) in x.chunks(width).enumerate() {
                let greatest = x.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
                let scale = f64::from(scales[row]);
                let want = f64::from(greatest / E4M3_MAX);
                assert!((scale - want).abs() <= want * 1e-6 + 2e-30, "row {row}: {scale} {want}");
                for (i, x) in x.iter().enumerate() {
                    let (got, what) = (values[row * width + i], || format!("row {row}, {i}"));
                    assert_nearest_e4m3(got, x.to_f64() / scale, 1e-6, what);
                    let want = e4m3_to_f64(got) * scale;
                    assert_rounded(back[row * width + i], want, want.abs() * 1e-6, what);
                }
            }
        }
    });
}
