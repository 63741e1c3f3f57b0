use baton_kernels::cuda::{Buffer, DeviceError, Factors, Gemm, Matmul, Stream, Target, testing};
use half::bf16;

use crate::support::{BF16, Random, assert_close, e4m3_to_f64, f64s};

/// `x wᵀ` of `[rows, inputs]` and `[outputs, inputs]`.
fn reference(x: &[f64], w: &[f64], inputs: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(inputs).flat_map(|x| w.chunks(inputs).map(move |w| dot(x, w))).collect()
}

const SHAPES: [(usize, usize, usize); 5] =
    [(1, 16, 16), (3, 48, 64), (17, 8, 40), (130, 96, 32), (5, 1000, 24)];

#[test]
fn products_are_sums_of_products() {
    let Some(stream) = testing::products_stream() else { return };
    let gemm = Gemm::new(stream.device()).unwrap();
    let mut random = Random::new(5);
    let mut drawn = Random::new(8);
    let drawn = drawn.shapes(140, 200).into_iter().zip(drawn.shapes(1, 300));
    let drawn = drawn.map(|((rows, outputs), (_, inputs))| (rows, outputs, inputs));
    for (rows, outputs, inputs) in SHAPES.into_iter().chain(drawn) {
        let (x, w) = (random.bf16s(rows * inputs), random.bf16s(outputs * inputs));
        let (bias, residual) = (random.bf16s(outputs), random.bf16s(rows * outputs));
        let plain = reference(&f64s(&x), &f64s(&w), inputs);
        let [x, w] = [&x, &w].map(|values| stream.buffer(values).unwrap());
        let bias_there = stream.buffer(&bias).unwrap();
        let factors = Factors::Bf16 { x: x.all(), w: w.all() };
        for (with_bias, add) in [(false, false), (true, false), (false, true), (true, true)] {
            let y = stream.buffer(&residual).unwrap();
            let bias_there = with_bias.then(|| bias_there.all());
            let product = Matmul { factors, inputs, y: y.all(), bias: bias_there, add };
            gemm.multiply(&stream, &product).unwrap();
            let expected = plain.iter().enumerate().map(|(i, sum)| {
                let bias = if with_bias { bias[i % outputs].to_f64() } else { 0.0 };
                sum + bias + if add { residual[i].to_f64() } else { 0.0 }
            });
            let expected: Vec<_> = expected.collect();
            assert_close(&f64s(&stream.read(y.all()).unwrap()), &expected, BF16);
        }
        let logits = stream.buffer(&vec![f32::NAN; rows * outputs]).unwrap();
        let product = Matmul { factors, inputs, y: logits.all(), bias: None, add: false };
        gemm.multiply(&stream, &product).unwrap();
        let found: Vec<_> = stream.read(logits.all()).unwrap().into_iter().map(f64::from).collect();
        assert_close(&found, &plain, 1e-4);
    }
}

#[test]
fn e4m3_products_are_scaled_by_row() {
    let Some(stream) = testing::products_stream() else { return };
    // Scales by row exist there only.
    if stream.device().target() != Target::Hopper {
        eprintln!("skipped: no fp8 scaled by row on this device");
        return;
    }
    let gemm = Gemm::new(stream.device()).unwrap();
    let mut random = Random::new(6);
    for (rows, outputs, inputs) in [(1, 16, 32), (5, 48, 64), (33, 32, 128)] {
        let mut bytes = |len| -> Vec<u8> { (0..len).map(|_| random.bits() as u8 & 0xbf).collect() };
        let (x, w) = (bytes(rows * inputs), bytes(outputs * inputs));
        let mut scales =
            |len| -> Vec<f32> { (0..len).map(|_| 0.1 + random.number().abs()).collect() };
        let (x_scales, w_scales) = (scales(rows), scales(outputs));
        let [x_f64, w_f64] =
            [&x, &w].map(|v| v.iter().map(|v| e4m3_to_f64(*v)).collect::<Vec<_>>());
        let plain = reference(&x_f64, &w_f64, inputs);
        let expected = plain.iter().enumerate().map(|(i, sum)| {
            sum * f64::from(x_scales[i / outputs]) * f64::from(w_scales[i % outputs])
        });
        let [x, w] = [&x, &w].map(|values| stream.buffer(values).unwrap());
        let [xs, ws] = [&x_scales, &w_scales].map(|values| stream.buffer(values).unwrap());
        let y = stream.buffer(&vec![bf16::NAN; rows * outputs]).unwrap();
        let factors =
            Factors::E4m3 { x: x.all(), x_scales: xs.all(), w: w.all(), w_scales: ws.all() };
        let product = Matmul { factors, inputs, y: y.all(), bias: None, add: false };
        gemm.multiply(&stream, &product).unwrap();
        let found = f64s(&stream.read(y.all()).unwrap());
        // e4m3 sums are kept in less than f32.
        assert_close(&found, &expected.collect::<Vec<_>>(), 2.0 * BF16);
    }
}

/// Plans of one shape serve products at other addresses, aligned otherwise too.
#[test]
fn plans_are_for_shapes_and_not_for_addresses() {
    let Some(stream) = testing::products_stream() else { return };
    let gemm = Gemm::new(stream.device()).unwrap();
    let mut random = Random::new(7);
    let (rows, outputs, inputs) = (4, 24, 32);
    let (all_x, w) = (random.bf16s(3 * rows * inputs), random.bf16s(outputs * inputs));
    let (x_there, w_there) = (stream.buffer(&all_x).unwrap(), stream.buffer(&w).unwrap());
    let y = Buffer::<bf16>::new(stream.device(), 2 * rows * outputs).unwrap();
    for (x_at, y_at) in [(0, 0), (inputs, 8), (17, 1), (rows * inputs, rows * outputs)] {
        let x = x_there.slice(x_at..x_at + rows * inputs);
        let y = y.slice(y_at..y_at + rows * outputs);
        let factors = Factors::Bf16 { x, w: w_there.all() };
        gemm.multiply(&stream, &Matmul { factors, inputs, y, bias: None, add: false }).unwrap();
        let expected = reference(&f64s(&all_x[x_at..x_at + rows * inputs]), &f64s(&w), inputs);
        assert_close(&f64s(&stream.read(y).unwrap()), &expected, BF16);
    }
}

/// Products of all numbers of rows, most of which take the algorithm of another.
#[test]
fn numbers_of_rows_share_algorithms() {
    let Some(stream) = testing::products_stream() else { return };
    let gemm = Gemm::new(stream.device()).unwrap();
    let mut random = Random::new(9);
    let (most, outputs, inputs) = (70, 24, 16);
    let (x, w) = (random.bf16s(most * inputs), random.bf16s(outputs * inputs));
    let expected = reference(&f64s(&x), &f64s(&w), inputs);
    let [x, w] = [&x, &w].map(|values| stream.buffer(values).unwrap());
    for rows in (1..=most).rev() {
        let y = stream.buffer(&vec![bf16::NAN; rows * outputs]).unwrap();
        let factors = Factors::Bf16 { x: x.slice(0..rows * inputs), w: w.all() };
        let product = Matmul { factors, inputs, y: y.all(), bias: None, add: false };
        gemm.multiply(&stream, &product).unwrap();
        let found = f64s(&stream.read(y.all()).unwrap());
        assert_close(&found, &expected[..rows * outputs], BF16);
    }
}

/// Not 16 outputs, as the library wants of e4m3.
#[test]
fn a_product_without_an_algorithm_is_named() {
    let Some(stream) = testing::products_stream() else { return };
    let gemm = Gemm::new(stream.device()).unwrap();
    let (x, w) = (stream.buffer(&[0_u8; 32]).unwrap(), stream.buffer(&[0_u8; 7 * 32]).unwrap());
    let scales = stream.buffer(&[1_f32; 8]).unwrap();
    let factors = Factors::E4m3 {
        x: x.all(),
        x_scales: scales.slice(0..1),
        w: w.all(),
        w_scales: scales.slice(0..7),
    };
    let y = Buffer::<bf16>::new(stream.device(), 7).unwrap();
    let product = Matmul { factors, inputs: 32, y: y.all(), bias: None, add: false };
    let error = gemm.multiply(&stream, &product).unwrap_err().to_string();
    assert!(error.contains("[1, 32] x [32, 7] of CUDA_R_8F_E4M3"), "{error}");
}

#[test]
fn tuning_keeps_the_product_and_graphs_hold_it() {
    let Some(stream) = testing::products_stream() else { return };
    let gemm = Gemm::new(stream.device()).unwrap();
    let mut random = Random::new(8);
    let (rows, outputs, inputs) = (8, 40, 48);
    let (x, w) = (random.bf16s(rows * inputs), random.bf16s(outputs * inputs));
    let expected = reference(&f64s(&x), &f64s(&w), inputs);
    let [x, w] = [&x, &w].map(|values| stream.buffer(values).unwrap());
    let y = Buffer::<bf16>::new(stream.device(), rows * outputs).unwrap();
    let factors = Factors::Bf16 { x: x.all(), w: w.all() };
    let product = Matmul { factors, inputs, y: y.all(), bias: None, add: false };
    let multiply = |stream: &Stream| gemm.multiply(stream, &product);
    gemm.start_tuning().unwrap();
    multiply(&stream).unwrap();
    multiply(&stream).unwrap();
    assert_close(&f64s(&stream.read(y.all()).unwrap()), &expected, BF16);
    let tuned = gemm.stop_tuning();
    assert_eq!(tuned.len(), 1, "{tuned:?}");
    assert!(tuned[0].candidates > 0 && tuned[0].best_us <= tuned[0].first_us, "{tuned:?}");
    let graph = stream.capture::<DeviceError>(multiply).unwrap();
    stream.zero(y.all()).unwrap();
    stream.replay(&graph).unwrap();
    assert_close(&f64s(&stream.read(y.all()).unwrap()), &expected, BF16);
    assert_eq!(gemm.stop_tuning(), []);
}
