//! Models of awkward shapes, against a naive forward pass in double precision that shares nothing
//! with the engine: no cache, no blocks, no packing, no kernels.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::iter::zip;

use baton_engine::model::LoadFormat;

use common::tiny::{PLAIN, Shape, Tensors, checkpoint};
use common::{Numbers, Runner, load};

/// The naive model.
struct Naive<'a> {
    shape: &'a Shape,
    tensors: &'a Tensors,
}

impl Naive<'_> {
    fn tensor(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }

    /// `W x + b` for one row.
    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.tensor(&format!("{name}.weight"));
        let mut y: Vec<f64> = weight
            .chunks(x.len())
            .map(|row| zip(row, x).map(|(w, x)| f64::from(*w) * x).sum())
            .collect();
        if let Some((_, bias)) = self.tensors.get(&format!("{name}.bias")) {
            zip(&mut y, bias).for_each(|(y, b)| *y += f64::from(*b));
        }
        y
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.tensor(&format!("{name}.weight"));
        let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (square + 1e-5).sqrt();
        zip(x, weight).map(|(x, w)| x * scale * f64::from(*w)).collect()
    }

    /// One projection of a row cut into heads, normed if the family does, turned to `position`.
    fn heads(&self, at: &str, part: &str, x: &[f64], position: usize) -> Vec<Vec<f64>> {
        let d = self.shape.head_dim;
        let all = self.linear(&format!("{at}.self_attn.{part}_proj"), x);
        let turn = |head: &[f64]| {
            let mut head = head.to_vec();
            if part == "v" {
                return head;
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
            out
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
            self.linear(&format!("{at}.self_attn.o_proj"), &mixed)
        };
        (0..rows.len()).map(row).collect()
    }

    fn mlp(&self, at: &str, x: &[f64]) -> Vec<f64> {
        let gate = self.linear(&format!("{at}.mlp.gate_proj"), x);
        let up = self.linear(&format!("{at}.mlp.up_proj"), x);
        let inner: Vec<_> = zip(gate, up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        self.linear(&format!("{at}.mlp.down_proj"), &inner)
    }

    fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let table = self.tensor("model.embed_tokens.weight");
        let embed = |token: &u32| {
            let row = table.chunks(self.shape.hidden).nth(*token as usize).unwrap();
            row.iter().map(|x| f64::from(*x)).collect()
        };
        let mut rows: Vec<Vec<f64>> = tokens.iter().map(embed).collect();
        for layer in 0..self.shape.layers {
            let at = format!("model.layers.{layer}");
            let norm = |rows: &[Vec<f64>], name| -> Vec<_> {
                rows.iter().map(|x| self.norm(&format!("{at}.{name}"), x)).collect()
            };
            let attended = self.attention(&at, &norm(&rows, "input_layernorm"));
            add(&mut rows, attended);
            let normed = norm(&rows, "post_attention_layernorm");
            add(&mut rows, normed.iter().map(|x| self.mlp(&at, x)).collect());
        }
        let head = if self.shape.tied { "model.embed_tokens" } else { "lm_head" };
        rows.iter().map(|x| self.linear(head, &self.norm("model.norm", x))).collect()
    }
}

fn add(rows: &mut [Vec<f64>], more: Vec<Vec<f64>>) {
    for (row, more) in zip(rows, more) {
        zip(row, more).for_each(|(x, y)| *x += y);
    }
}

#[test]
fn awkward_shapes_agree_with_the_naive_model() {
    let odd = Shape { hidden: 52, ffn: 77, vocab: 101, head_dim: 10, ..PLAIN };
    let shapes = [
        PLAIN,
        odd,
        Shape { biases: true, tied: true, ..odd },
        Shape { qwen3: true, biases: true, head_dim: 48, kv_heads: 1, ..odd },
        Shape { qwen3: true, head_dim: 80, heads: 3, kv_heads: 3, vocab: 17, ..odd },
        Shape { head_dim: 96, heads: 6, kv_heads: 2, hidden: 33, ffn: 5, ..PLAIN },
        Shape { head_dim: 2, heads: 1, kv_heads: 1, hidden: 1, ffn: 1, layers: 1, ..PLAIN },
        Shape { head_dim: 128, heads: 7, kv_heads: 1, hidden: 65, ffn: 129, ..PLAIN },
        Shape { head_dim: 256, heads: 2, kv_heads: 1, qwen3: true, ..PLAIN },
    ];
    for shape in shapes {
        let tensors = shape.tensors(7);
        let dir = checkpoint(&shape, &tensors);
        let mut numbers = Numbers(3);
        let tokens: Vec<_> = (0..41).map(|_| numbers.below(shape.vocab) as u32).collect();
        let theirs = Naive { shape: &shape, tensors: &tensors }.logits(&tokens);
        let model = load(dir.path(), LoadFormat::Safetensors, 2, None);
        let ours = Runner::new(model, 16, tokens.len(), 1)
            .all_logits(&tokens, &mut || 1 + numbers.below(20));
        let most = theirs.iter().flatten().fold(1.0, |m: f64, x| m.max(x.abs()));
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in zip(ours.iter().flatten(), theirs.iter().flatten()) {
            let off = (f64::from(*ours) - theirs).abs();
            assert!(off < 1e-4 * most, "{shape:?}: {ours} is not {theirs}");
        }
    }
}
