//! A naive forward pass in double precision that shares nothing with the engine: no cache, no
//! blocks, no packing, no kernels.

use std::collections::BTreeMap;
use std::iter::zip;

use half::bf16;

use super::tiny::{Shape, Tensors};

/// What is rounded on the way, as devices do; by default nothing is.
#[derive(Clone, Copy, Default)]
pub struct Rounding {
    /// Everything that leaves an operation, but for logits, and all weights: to bf16.
    pub bf16: bool,
    /// The matrices of layers and what they are multiplied with: to e4m3 after that, each row by a
    /// scale that takes its greatest element to 448.
    pub fp8_weights: bool,
    /// Keys and values: to e4m3.
    pub fp8_kv: bool,
}

/// The nearest e4m3 number, ties to even: 3 bits of mantissa, exponents from -6 to 8, at most 448.
pub fn e4m3(x: f64) -> f64 {
    let exponent = x.abs().log2().floor().max(-6.0);
    let step = (exponent - 3.0).exp2();
    ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
}

/// A row in e4m3 with a scale.
fn scaled_e4m3(row: &[f64]) -> Vec<f64> {
    let greatest = row.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let scale = (greatest / 448.0).max(1e-30);
    row.iter().map(|x| e4m3(x / scale) * scale).collect()
}

/// The naive model.
pub struct Naive<'a> {
    shape: &'a Shape,
    /// Rounded.
    tensors: BTreeMap<&'a str, Vec<f64>>,
    rounding: Rounding,
}

impl<'a> Naive<'a> {
    pub fn new(shape: &'a Shape, tensors: &'a Tensors) -> Self {
        Self::rounded(shape, tensors, Rounding::default())
    }

    pub fn rounded(shape: &'a Shape, tensors: &'a Tensors, rounding: Rounding) -> Self {
        let tensor = |(name, (shape, values)): (&'a String, &(Vec<usize>, Vec<f32>))| {
            let values = values.iter().map(|x| f64::from(*x)).collect();
            let mut values = kept(rounding, values);
            if rounding.fp8_weights && name.ends_with("_proj.weight") {
                values = values.chunks(shape[1]).flat_map(scaled_e4m3).collect();
            }
            (&name[..], values)
        };
        Self { shape, tensors: tensors.iter().map(tensor).collect(), rounding }
    }

    fn tensor(&self, name: &str) -> &[f64] {
        &self.tensors[name]
    }

    /// What an operation leaves.
    fn kept(&self, values: Vec<f64>) -> Vec<f64> {
        kept(self.rounding, values)
    }

    /// `W x + b` for one row, of a layer.
    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        if self.rounding.fp8_weights {
            return self.kept(self.exact_linear(name, &scaled_e4m3(x)));
        }
        self.kept(self.exact_linear(name, x))
    }

    fn exact_linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.tensor(&format!("{name}.weight"));
        let mut y: Vec<f64> =
            weight.chunks(x.len()).map(|row| zip(row, x).map(|(w, x)| w * x).sum()).collect();
        if let Some(bias) = self.tensors.get(&format!("{name}.bias")[..]) {
            zip(&mut y, bias).for_each(|(y, b)| *y += b);
        }
        y
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.tensor(&format!("{name}.weight"));
        let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (square + 1e-5).sqrt();
        zip(x, weight).map(|(x, w)| x * scale * w).collect()
    }

    /// What the cache keeps of keys and values.
    fn cached(&self, head: Vec<f64>) -> Vec<f64> {
        if self.rounding.fp8_kv { head.into_iter().map(e4m3).collect() } else { self.kept(head) }
    }

    /// One projection of a row cut into heads, normed if the family does, turned to `position`.
    fn heads(&self, at: &str, part: &str, x: &[f64], position: usize) -> Vec<Vec<f64>> {
        let d = self.shape.head_dim;
        let all = self.linear(&format!("{at}.self_attn.{part}_proj"), x);
        let turn = |head: &[f64]| {
            let mut head = head.to_vec();
            if part == "v" {
                return self.cached(head);
            }
            if self.shape.qwen3 {
                head = self.norm(&format!("{at}.self_attn.{part}_norm"), &head);
            }
            let mut out = head.clone();
            for i in 0..d / 2 {
                let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / d as f64);
                let (sin, cos) = angle.sin_cos();
                out[i] = head[i] * cos - head[i + d / 2] * sin;
                out[i + d / 2] = head[i + d / 2] * cos + head[i] * sin;
            }
            if part == "k" { self.cached(out) } else { self.kept(out) }
        };
        all.chunks(d).map(turn).collect()
    }

    fn attention(&self, at: &str, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let all = |part| -> Vec<_> {
            rows.iter().enumerate().map(|(p, x)| self.heads(at, part, x, p)).collect()
        };
        let (q, k, v): (Vec<_>, Vec<_>, Vec<_>) = (all("q"), all("k"), all("v"));
        let group = self.shape.heads / self.shape.kv_heads;
        let scale = 1.0 / (self.shape.head_dim as f64).sqrt();
        let head = |position: usize, head: usize| -> Vec<f64> {
            let (q, kv) = (&q[position][head], head / group);
            let score = |k: &Vec<Vec<f64>>| -> f64 { zip(q, &k[kv]).map(|(q, k)| q * k).sum() };
            let weights: Vec<_> = k[..=position].iter().map(|k| (score(k) * scale).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let element = |i| zip(&weights, &v).map(|(w, v)| w * v[kv][i]).sum::<f64>() / sum;
            (0..self.shape.head_dim).map(element).collect()
        };
        let row = |position| {
            let mixed: Vec<_> = (0..self.shape.heads).flat_map(|h| head(position, h)).collect();
            self.linear(&format!("{at}.self_attn.o_proj"), &self.kept(mixed))
        };
        (0..rows.len()).map(row).collect()
    }

    fn mlp(&self, at: &str, x: &[f64]) -> Vec<f64> {
        let gate = self.linear(&format!("{at}.mlp.gate_proj"), x);
        let up = self.linear(&format!("{at}.mlp.up_proj"), x);
        let inner: Vec<_> = zip(gate, up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        self.linear(&format!("{at}.mlp.down_proj"), &self.kept(inner))
    }

    /// The logits of every token.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let table = self.tensor("model.embed_tokens.weight");
        let embed = |token: &u32| {
            let row = table.chunks(self.shape.hidden).nth(*token as usize).unwrap();
            row.to_vec()
        };
        let mut rows: Vec<Vec<f64>> = tokens.iter().map(embed).collect();
        for layer in 0..self.shape.layers {
            let at = format!("model.layers.{layer}");
            let norm = |rows: &[Vec<f64>], name| -> Vec<_> {
                rows.iter().map(|x| self.kept(self.norm(&format!("{at}.{name}"), x))).collect()
            };
            let attended = self.attention(&at, &norm(&rows, "input_layernorm"));
            self.add(&mut rows, attended);
            let normed = norm(&rows, "post_attention_layernorm");
            self.add(&mut rows, normed.iter().map(|x| self.mlp(&at, x)).collect());
        }
        let head = if self.shape.tied { "model.embed_tokens" } else { "lm_head" };
        let score = |x: &Vec<f64>| self.exact_linear(head, &self.kept(self.norm("model.norm", x)));
        rows.iter().map(score).collect()
    }

    fn add(&self, rows: &mut [Vec<f64>], more: Vec<Vec<f64>>) {
        for (row, more) in zip(rows, more) {
            *row = self.kept(zip(&*row, more).map(|(x, y)| x + y).collect());
        }
    }
}

fn kept(rounding: Rounding, mut values: Vec<f64>) -> Vec<f64> {
    if rounding.bf16 {
        values.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64());
    }
    values
}
