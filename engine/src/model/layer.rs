//! The weights of one transformer layer.

use baton_kernels::cpu::{self, PackedMatrix, ThreadPool};

use super::load::Loader;
use crate::config::ModelConfig;

/// `y = W x + b`. Matrices that read the same input are stacked into one.
pub(super) struct Linear {
    pub(super) matrix: PackedMatrix,
    pub(super) bias: Option<Vec<f32>>,
}

/// Norms on each head of q and k, `head_dim` weights each.
pub(super) struct HeadNorms {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
}

pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    /// q, k and v stacked: `[(heads + 2 kv_heads) head_dim, hidden]`.
    pub(super) qkv: Linear,
    pub(super) head_norms: Option<HeadNorms>,
    pub(super) attention_out: Linear,
    pub(super) mlp_norm: Vec<f32>,
    /// Gate and up stacked: `[2 ffn, hidden]`.
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
    /// Keys that a query sees, its own included; all if none.
    pub(super) window: Option<usize>,
}

impl Linear {
    /// `x: [rows, inputs]` to `y: [rows, outputs]`.
    pub(super) fn apply(&self, pool: &ThreadPool, x: &[f32], y: &mut [f32]) {
        cpu::matmul(pool, x, &self.matrix, y);
        if let Some(bias) = &self.bias {
            cpu::add_bias(y, bias);
        }
    }
}

impl Layer {
    pub(super) fn load(loader: &mut Loader<'_>, layer: usize, config: &ModelConfig) -> Self {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let qkv = ["q", "k", "v"].map(|part| at(&format!("self_attn.{part}_proj")));
        let gate_up = ["gate", "up"].map(|part| at(&format!("mlp.{part}_proj")));
        Self {
            attention_norm: loader.vector(&at("input_layernorm.weight")),
            qkv: loader.linear(&qkv, config.hidden, config.qkv_bias),
            head_norms: config.qk_norm.then(|| HeadNorms {
                q: loader.vector(&at("self_attn.q_norm.weight")),
                k: loader.vector(&at("self_attn.k_norm.weight")),
            }),
            attention_out: loader.linear(
                &[at("self_attn.o_proj")],
                config.heads * config.head_dim,
                config.output_bias,
            ),
            mlp_norm: loader.vector(&at("post_attention_layernorm.weight")),
            gate_up: loader.linear(&gate_up, config.hidden, config.mlp_bias),
            down: loader.linear(&[at("mlp.down_proj")], config.ffn, config.mlp_bias),
            window: config.windows[layer],
        }
    }
}
