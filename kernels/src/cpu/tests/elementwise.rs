use std::array::from_fn;

use super::{DTYPES, assert_near, bits, numbers, pools, rounded};
use crate::Dtype;
use crate::cpu::simd::{F32x16, Isa, Kernel, exp, run};
use crate::cpu::{Heads, ThreadPool, add, add_bias, embed, rms_norm, rms_norm_heads};
use crate::cpu::{rotate_heads, silu_mul};

const EPS: f32 = 1e-5;

/// The result of `operation` with each pool; all must be the same bits.
fn on_all_pools(operation: impl Fn(&ThreadPool) -> Vec<f32>) -> Vec<f32> {
    let results: Vec<_> = pools().iter().map(operation).collect();
    for result in &results[1..] {
        assert_eq!(bits(result), bits(&results[0]));
    }
    results.into_iter().next().expect("there are pools")
}

fn norm(x: &[f32], weight: &[f32]) -> Vec<f64> {
    let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let mean = wide.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
    wide.iter().zip(weight).map(|(x, w)| x * factor * f64::from(*w)).collect()
}

#[test]
fn rms_norm_is_the_formula() {
    for (rows, width) in [(1, 1), (3, 5), (2, 16), (40, 1000), (7, 4096)] {
        let (x, weight) = (numbers(1, rows * width), numbers(2, width));
        let expected: Vec<f64> = x.chunks_exact(width).flat_map(|x| norm(x, &weight)).collect();
        let got = on_all_pools(|pool| {
            let mut y = vec![f32::NAN; x.len()];
            rms_norm(pool, &x, &weight, EPS, &mut y);
            y
        });
        assert_near(&got, &expected, 1e-6);
    }
}

#[test]
fn rms_norm_of_heads_touches_only_these() {
    for (rows, dim) in [(1, 64), (9, 24), (200, 128)] {
        let heads = Heads { stride: 7 * dim + 3, offset: 2 * dim, count: 4, dim };
        let (x, weight) = (numbers(3, rows * heads.stride), numbers(4, dim));
        let mut expected: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        for row in 0..rows {
            for head in 0..heads.count {
                let at = row * heads.stride + heads.offset + head * dim;
                expected[at..at + dim].copy_from_slice(&norm(&x[at..at + dim], &weight));
            }
        }
        let got = on_all_pools(|pool| {
            let mut x = x.clone();
            rms_norm_heads(pool, &mut x, heads, &weight, EPS);
            x
        });
        assert_near(&got, &expected, 1e-6);
    }
}

#[test]
fn rotation_is_that_of_rotate_half() {
    for (rows, dim) in [(1, 64), (5, 20), (150, 128)] {
        let heads = Heads { stride: 5 * dim, offset: dim, count: 3, dim };
        let x = numbers(5, rows * heads.stride);
        let (cos, sin) = (numbers(6, rows * dim / 2), numbers(7, rows * dim / 2));
        let mut expected: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        for row in 0..rows {
            for head in 1..4 {
                for i in 0..dim / 2 {
                    let at = row * heads.stride + head * dim + i;
                    let (a, b) = (f64::from(x[at]), f64::from(x[at + dim / 2]));
                    let (c, s) = (cos[row * dim / 2 + i], sin[row * dim / 2 + i]);
                    let (c, s) = (f64::from(c), f64::from(s));
                    expected[at] = a * c - b * s;
                    expected[at + dim / 2] = b * c + a * s;
                }
            }
        }
        let got = on_all_pools(|pool| {
            let mut x = x.clone();
            rotate_heads(pool, &mut x, heads, &cos, &sin);
            x
        });
        assert_near(&got, &expected, 1e-6);
    }
}

#[test]
fn silu_mul_is_the_formula() {
    for (rows, width) in [(1, 7), (3, 48), (30, 3000)] {
        let x: Vec<f32> = numbers(8, rows * 2 * width).iter().map(|x| x * 100.0).collect();
        let mut expected = Vec::new();
        for row in x.chunks_exact(2 * width) {
            for i in 0..width {
                let (gate, up) = (f64::from(row[i]), f64::from(row[width + i]));
                expected.push(gate / (1.0 + (-gate).exp()) * up);
            }
        }
        let got = on_all_pools(|pool| {
            let mut y = vec![f32::NAN; rows * width];
            silu_mul(pool, &x, width, &mut y);
            y
        });
        assert_near(&got, &expected, 1e-6);
    }
}

#[test]
fn sums_and_biases() {
    let (x, y) = (numbers(9, 50_000), numbers(10, 50_000));
    let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
    let got = on_all_pools(|pool| {
        let mut x = x.clone();
        add(pool, &mut x, &y);
        x
    });
    assert_eq!(got, expected);
    let mut rows = vec![1.0, 2.0, 3.0, 4.0];
    add_bias(&mut rows, &[10.0, 20.0]);
    assert_eq!(rows, [11.0, 22.0, 13.0, 24.0]);
}

#[test]
fn embedding_gathers_rows() {
    for dtype in DTYPES {
        let (bytes, wide) = rounded(dtype, &numbers(11, 10 * 6));
        let mut out = vec![0.0; 18];
        embed(dtype, &bytes, &[9, 0, 9], &mut out);
        assert_eq!(out, [&wide[54..], &wide[..6], &wide[54..]].concat());
    }
}

#[test]
fn narrowing_rounds_to_the_nearest_ties_to_even() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        // 1 + step/2 lies between two numbers of the type, of which 1 is even.
        let step = if dtype == Dtype::Bf16 { 2_f32.powi(-7) } else { 2_f32.powi(-10) };
        let above = (1.0 + step / 2.0).next_up();
        let values = [1.0 + step / 2.0, above, 1.0 + step * 1.5, -1.0 - step * 0.4];
        let (_, wide) = rounded(dtype, &values);
        assert_eq!(wide, [1.0, 1.0 + step, 1.0 + step * 2.0, -1.0]);
    }
}

/// `exp` of 16 numbers.
struct Exp<'a>(&'a mut [f32; 16]);

impl Kernel for Exp<'_> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "implements an unsafe interface")]
    unsafe fn run<V: F32x16>(self) {
        // SAFETY: the array has 16 numbers.
        unsafe { exp(V::load(self.0.as_ptr())).store(self.0.as_mut_ptr()) }
    }
}

fn exp_of(isa: Isa, x: [f32; 16]) -> [f32; 16] {
    let mut lanes = x;
    // SAFETY: only available instruction sets are tested.
    #[expect(unsafe_code, reason = "runs vector instructions")]
    unsafe {
        run(isa, Exp(&mut lanes));
    }
    lanes
}

#[test]
fn exp_is_near_and_the_same_everywhere() {
    for i in 0..20_000 {
        let x: [f32; 16] = from_fn(|j| (i * 16 + j) as f32 * (175.0 / 320_000.0) - 87.0);
        let scalar = exp_of(Isa::Scalar, x);
        for (x, y) in x.iter().zip(scalar) {
            let exact = f64::from(*x).exp();
            assert!((f64::from(y) / exact - 1.0).abs() < 3e-7, "exp({x}) = {y}");
        }
        for isa in Isa::available() {
            assert_eq!(bits(&exp_of(isa, x)), bits(&scalar));
        }
    }
    for isa in Isa::available() {
        assert_eq!(exp_of(isa, [f32::NEG_INFINITY; 16]), [0.0; 16]);
        assert_eq!(exp_of(isa, [0.0; 16]), [1.0; 16]);
        assert!(exp_of(isa, [f32::INFINITY; 16])[0] > 1e38);
    }
}
