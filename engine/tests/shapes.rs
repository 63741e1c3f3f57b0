//! Models of awkward shapes, against the naive forward pass.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::iter::zip;

use baton_engine::model::LoadFormat;

use common::naive::Naive;
use common::tiny::{PLAIN, Shape, checkpoint};
use common::{Numbers, Runner, load};

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
        let theirs = Naive::new(&shape, &tensors).logits(&tokens);
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
