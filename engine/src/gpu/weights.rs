//! The weights of a model in device memory, in bf16, and which tensors of a checkpoint they are.

use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, DeviceSampler, Slice, Stream};
use half::bf16;

use super::shard::Shard;
use crate::config::ModelConfig;

/// `y = W x + b`. Matrices that read the same input are stacked into one.
pub(super) struct Linear {
    /// `[outputs, inputs]`
    pub(super) matrix: Buffer<bf16>,
    pub(super) bias: Option<Buffer<bf16>>,
    pub(super) outputs: usize,
}

/// The weights of one transformer layer.
pub(super) struct Layer {
    pub(super) attention_norm: Buffer<bf16>,
    /// q, k and v stacked.
    pub(super) qkv: Linear,
    /// Norms on each head of q and k.
    pub(super) head_norms: Option<(Buffer<bf16>, Buffer<bf16>)>,
    pub(super) attention_out: Linear,
    pub(super) mlp_norm: Buffer<bf16>,
    /// Gate and up stacked.
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
    /// Keys that a query sees, its own included; all if none.
    pub(super) window: Option<usize>,
}

/// All weights.
pub(super) struct Weights {
    /// Elements of the tables that the checkpoint has.
    used: usize,
    /// `[vocab, hidden]`, with rows of zeros after them. Empty but on the first device.
    pub(super) embedding: Buffer<bf16>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Buffer<bf16>,
    /// The same; the embedding if none.
    head: Option<Buffer<bf16>>,
}

/// A tensor of a checkpoint, and where it goes.
pub(super) struct Part<'a> {
    pub(super) name: String,
    pub(super) to: Slice<'a, bf16>,
}

impl Weights {
    /// Memory for a device's weights, as `config` says; what it holds is undefined.
    pub(super) fn reserve(
        stream: &Stream,
        config: &ModelConfig,
        shard: Shard,
    ) -> Result<Self, DeviceError> {
        let device = stream.device();
        // Rows of logits are as long as the sampler wants them.
        let outputs = if shard.is_first() { DeviceSampler::stride(config.vocab_size) } else { 0 };
        let used = outputs.min(config.vocab_size) * config.hidden;
        let table = || {
            let table = Buffer::new(device, outputs * config.hidden)?;
            stream.zero(table.slice(used..table.len()))?;
            Ok(table)
        };
        let layer = |window: &Option<usize>| Layer::reserve(device, config, *window, shard);
        Ok(Self {
            used,
            embedding: table()?,
            layers: config.windows.iter().map(layer).collect::<Result<_, _>>()?,
            norm: Buffer::new(device, config.hidden)?,
            head: if config.tied { None } else { Some(table()?) },
        })
    }

    /// The output layer: `[vocab, hidden]`, with rows of zeros after them.
    pub(super) fn head(&self) -> &Buffer<bf16> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Every tensor that is to be read, whole or in part.
    pub(super) fn parts(&self) -> Vec<Part<'_>> {
        let mut parts = Vec::new();
        let mut add = |name: &str, to| parts.push(Part { name: name.to_owned(), to });
        add("model.embed_tokens.weight", self.embedding.slice(0..self.used));
        add("model.norm.weight", self.norm.all());
        if let Some(head) = &self.head {
            add("lm_head.weight", head.slice(0..self.used));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.add_parts(&format!("model.layers.{index}"), &mut parts);
        }
        parts.retain(|part| !part.to.is_empty());
        parts
    }
}

impl Layer {
    fn reserve(
        device: &Arc<Device>,
        c: &ModelConfig,
        window: Option<usize>,
        shard: Shard,
    ) -> Result<Self, DeviceError> {
        // Of outputs that are added up, one device adds the bias.
        let added = |bias: bool| bias && shard.is_first();
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let vector = |len| Buffer::new(device, len);
        let linear = |outputs, inputs, bias: bool| {
            let bias = if bias { Some(Buffer::new(device, outputs)?) } else { None };
            Ok(Linear { matrix: Buffer::new(device, outputs * inputs)?, bias, outputs })
        };
        let head_norms =
            if c.qk_norm { Some((vector(c.head_dim)?, vector(c.head_dim)?)) } else { None };
        Ok(Self {
            attention_norm: vector(c.hidden)?,
            qkv: linear(q + 2 * kv, c.hidden, c.qkv_bias)?,
            head_norms,
            attention_out: linear(c.hidden, q, added(c.output_bias))?,
            mlp_norm: vector(c.hidden)?,
            gate_up: linear(2 * c.ffn, c.hidden, c.mlp_bias)?,
            down: linear(c.hidden, c.ffn, added(c.mlp_bias))?,
            window,
        })
    }

    fn add_parts<'a>(&'a self, at: &str, parts: &mut Vec<Part<'a>>) {
        let mut add = |name: &str, to| parts.push(Part { name: format!("{at}.{name}"), to });
        add("input_layernorm.weight", self.attention_norm.all());
        add("post_attention_layernorm.weight", self.mlp_norm.all());
        if let Some((q, k)) = &self.head_norms {
            add("self_attn.q_norm.weight", q.all());
            add("self_attn.k_norm.weight", k.all());
        }
        let heads = self.attention_out.matrix.len() / self.attention_out.outputs;
        let kv = (self.qkv.outputs - heads) / 2;
        self.qkv.add_parts(
            at,
            &[("self_attn.q_proj", heads), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
            parts,
        );
        self.attention_out.add_parts(
            at,
            &[("self_attn.o_proj", self.attention_out.outputs)],
            parts,
        );
        let ffn = self.gate_up.outputs / 2;
        self.gate_up.add_parts(at, &[("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)], parts);
        self.down.add_parts(at, &[("mlp.down_proj", self.down.outputs)], parts);
    }
}

impl Linear {
    /// Elements of a row of its input.
    pub(super) fn inputs(&self) -> usize {
        self.matrix.len() / self.outputs
    }

    /// The matrices that it stacks, with their outputs.
    fn add_parts<'a>(&'a self, at: &str, stacked: &[(&str, usize)], parts: &mut Vec<Part<'a>>) {
        let mut first = 0;
        for (name, outputs) in stacked {
            let range = first..first + outputs;
            let rows = range.start * self.inputs()..range.end * self.inputs();
            parts.push(Part { name: format!("{at}.{name}.weight"), to: self.matrix.slice(rows) });
            if let Some(bias) = &self.bias {
                parts.push(Part { name: format!("{at}.{name}.bias"), to: bias.slice(range) });
            }
            first += outputs;
        }
    }
}
