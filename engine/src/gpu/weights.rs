//! The weights of a model in device memory, and which tensors of a checkpoint they are.

use std::ops::Range;
use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, DeviceSampler, Slice, Stream};
use half::bf16;

use super::WeightDtype;
use super::shard::Shard;
use crate::config::ModelConfig;

/// `y = W x + b`. Matrices that read the same input are stacked into one.
pub(super) struct Linear {
    pub(super) matrix: Matrix,
    pub(super) bias: Option<Buffer<bf16>>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// `[outputs, inputs]`
pub(super) enum Matrix {
    Bf16(Buffer<bf16>),
    /// Each row with the scale that its elements are multiplied by. A device that has some of the
    /// columns scales the parts of rows that it has.
    E4m3 {
        values: Buffer<u8>,
        scales: Buffer<f32>,
    },
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
    pub(super) to: Place<'a>,
}

/// Where a tensor goes, and as what.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    Bf16(Slice<'a, bf16>),
    /// Rows, with as many scales.
    E4m3 {
        values: Slice<'a, u8>,
        scales: Slice<'a, f32>,
    },
}

impl Place<'_> {
    /// Elements.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bf16(to) => to.len(),
            Self::E4m3 { values, .. } => values.len(),
        }
    }

    /// The most elements up to `most` that are whole rows, if rows matter.
    pub(super) fn whole_rows(&self, most: usize) -> usize {
        match self {
            Self::Bf16(_) => most,
            Self::E4m3 { values, scales } => {
                let width = values.len() / scales.len();
                most / width * width
            }
        }
    }

    /// Some of its elements; whole rows, if rows matter.
    pub(super) fn part(&self, elements: Range<usize>) -> Self {
        match *self {
            Self::Bf16(to) => Self::Bf16(to.slice(elements)),
            Self::E4m3 { values, scales } => {
                let width = values.len() / scales.len();
                let rows = elements.start / width..elements.end / width;
                Self::E4m3 { values: values.slice(elements), scales: scales.slice(rows) }
            }
        }
    }
}

impl Weights {
    /// Memory for a device's weights, as `config` says; what it holds is undefined.
    pub(super) fn reserve(
        stream: &Stream,
        config: &ModelConfig,
        dtype: WeightDtype,
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
        let layer = |window: &Option<usize>| Layer::reserve(device, config, dtype, *window, shard);
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
        let mut add = |name: &str, to| {
            parts.push(Part { name: name.to_owned(), to: Place::Bf16(to) });
        };
        add("model.embed_tokens.weight", self.embedding.slice(0..self.used));
        add("model.norm.weight", self.norm.all());
        if let Some(head) = &self.head {
            add("lm_head.weight", head.slice(0..self.used));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.add_parts(&format!("model.layers.{index}"), &mut parts);
        }
        parts.retain(|part| part.to.len() > 0);
        parts
    }
}

impl Layer {
    fn reserve(
        device: &Arc<Device>,
        c: &ModelConfig,
        dtype: WeightDtype,
        window: Option<usize>,
        shard: Shard,
    ) -> Result<Self, DeviceError> {
        // Of outputs that are added up, one device adds the bias.
        let added = |bias: bool| bias && shard.is_first();
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let vector = |len| Buffer::new(device, len);
        let linear = |outputs, inputs, bias: bool| {
            let matrix = Matrix::reserve(device, dtype, (outputs, inputs))?;
            let bias = if bias { Some(Buffer::new(device, outputs)?) } else { None };
            Ok(Linear { matrix, bias, outputs, inputs })
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
        let mut add = |name: &str, to| {
            parts.push(Part { name: format!("{at}.{name}"), to: Place::Bf16(to) });
        };
        add("input_layernorm.weight", self.attention_norm.all());
        add("post_attention_layernorm.weight", self.mlp_norm.all());
        if let Some((q, k)) = &self.head_norms {
            add("self_attn.q_norm.weight", q.all());
            add("self_attn.k_norm.weight", k.all());
        }
        let heads = self.attention_out.inputs;
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

impl Matrix {
    fn reserve(
        device: &Arc<Device>,
        dtype: WeightDtype,
        (outputs, inputs): (usize, usize),
    ) -> Result<Self, DeviceError> {
        Ok(match dtype {
            WeightDtype::Bf16 => Self::Bf16(Buffer::new(device, outputs * inputs)?),
            WeightDtype::Fp8 => Self::E4m3 {
                values: Buffer::new(device, outputs * inputs)?,
                scales: Buffer::new(device, outputs)?,
            },
        })
    }

    /// Some rows, each of `inputs` elements.
    fn rows(&self, rows: Range<usize>, inputs: usize) -> Place<'_> {
        let elements = rows.start * inputs..rows.end * inputs;
        match self {
            Self::Bf16(matrix) => Place::Bf16(matrix.slice(elements)),
            Self::E4m3 { values, scales } => {
                Place::E4m3 { values: values.slice(elements), scales: scales.slice(rows) }
            }
        }
    }
}

impl Linear {
    /// The matrices that it stacks, with their outputs.
    fn add_parts<'a>(&'a self, at: &str, stacked: &[(&str, usize)], parts: &mut Vec<Part<'a>>) {
        let mut first = 0;
        for (name, outputs) in stacked {
            let range = first..first + outputs;
            let to = self.matrix.rows(range.clone(), self.inputs);
            parts.push(Part { name: format!("{at}.{name}.weight"), to });
            if let Some(bias) = &self.bias {
                let to = Place::Bf16(bias.slice(range));
                parts.push(Part { name: format!("{at}.{name}.bias"), to });
            }
            first += outputs;
        }
    }
}
