//! The forward pass on a device: one program for every family.

use baton_kernels::cuda::{
    self, AttentionInput, DecodeScratch, DeviceError, Event, Factors, Gemm, Matmul, PagedKv, Slice,
    Stream, Turning,
};
use half::bf16;

use super::activations::Activations;
use super::cache::{Cache, Widened};
use super::group::Member;
use super::packing::Inputs;
use super::places::{AttentionShape, Places};
use super::weights::{Layer, Linear, Matrix, Weights};
use crate::config::ModelConfig;

/// What a pass reads and writes.
pub(super) struct Pass<'a> {
    pub(super) stream: &'a Stream,
    pub(super) gemm: &'a Gemm,
    pub(super) config: &'a ModelConfig,
    pub(super) weights: &'a Weights,
    /// Radians per position of each pair of elements.
    pub(super) frequencies: Slice<'a, f32>,
    pub(super) shape: &'a AttentionShape,
    pub(super) scratch: &'a DecodeScratch,
    pub(super) cache: &'a Cache,
    /// If the cache is e4m3.
    pub(super) widened: Option<&'a Widened>,
    pub(super) inputs: &'a Inputs,
    pub(super) activations: &'a Activations,
    /// Its place among the devices of the model, if they are several.
    pub(super) member: Option<&'a Member>,
    /// What the step before sampled.
    pub(super) sampled: Slice<'a, u32>,
}

impl Pass<'_> {
    /// From tokens to the last norm of all rows. `layers`: events that are to be recorded when the
    /// keys and values of each layer are written.
    pub(super) fn run(&self, places: &Places, layers: Option<&[Event]>) -> Result<(), DeviceError> {
        self.embed(places)?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.norm(places.rows, &layer.attention_norm, index > 0)?;
            self.project(places, index, layer)?;
            if let Some(events) = layers {
                events[index].record(self.stream)?;
            }
            self.attend(places, index, layer)?;
            self.norm(places.rows, &layer.mlp_norm, true)?;
            self.feed_forward(places.rows, layer)?;
        }
        self.norm(places.rows, &self.weights.norm, true)
    }

    fn embed(&self, places: &Places) -> Result<(), DeviceError> {
        let (a, rows) = (self.activations, places.rows);
        let residual = a.residual.first(rows);
        if self.is_first() {
            let tokens = a.tokens.first(rows);
            let sources = self.inputs.array(&places.sources);
            cuda::resolve_tokens(self.stream, tokens, sources, self.sampled)?;
            let table = self.weights.embedding.all();
            cuda::take_rows(self.stream, residual, table, tokens, 0)?;
        } else {
            self.stream.zero(residual)?;
        }
        self.add_up(residual)?;
        let angles = (a.cos.first(rows), a.sin.first(rows));
        let positions = self.inputs.array(&places.positions);
        let scale = self.config.rope.scale;
        cuda::rope_angles(self.stream, angles, positions, self.frequencies, scale)
    }

    /// Adds the update, if there is one, to the residual stream, and normalises that.
    fn norm(
        &self,
        rows: usize,
        weight: &cuda::Buffer<bf16>,
        update: bool,
    ) -> Result<(), DeviceError> {
        let (a, epsilon) = (self.activations, self.config.norm_eps);
        let (normed, residual) = (a.normed.first(rows), a.residual.first(rows));
        if update {
            let update = a.update.first(rows);
            cuda::add_rms_norm(self.stream, normed, residual, update, weight.all(), epsilon)
        } else {
            cuda::rms_norm(self.stream, normed, residual, weight.all(), epsilon)
        }
    }

    /// Queries, keys and values: turned to their positions, and the latter two in the cache.
    fn project(&self, places: &Places, index: usize, layer: &Layer) -> Result<(), DeviceError> {
        let (a, rows) = (self.activations, places.rows);
        self.linear(&layer.qkv, a.normed.first(rows), a.qkv.first(rows))?;
        let turning = Turning {
            angles: (a.cos.first(rows), a.sin.first(rows)),
            norms: layer.head_norms.as_ref().map(|(q, k)| (q.all(), k.all())),
            epsilon: self.config.norm_eps,
        };
        let row_places = cuda::RowPlaces {
            positions: self.inputs.array(&places.positions),
            sequences: self.inputs.array(&places.sequences),
        };
        let kv = self.kv(places, index);
        let heads = self.shape.heads;
        cuda::turn_and_store(self.stream, a.qkv.first(rows), heads, &turning, &row_places, &kv)
    }

    /// Tables of all lengths lie one after the other: each is a column of width 1 from where it
    /// begins.
    fn kv(&self, places: &Places, index: usize) -> PagedKv<'_> {
        PagedKv {
            pieces: self.cache.layer(index),
            elements: self.cache.elements(),
            block_tokens: self.cache.block_tokens(),
            block_tables: self.inputs.array(&places.tables),
            max_blocks: 1,
        }
    }

    fn attend(&self, places: &Places, index: usize, layer: &Layer) -> Result<(), DeviceError> {
        let (a, rows) = (self.activations, places.rows);
        let window = layer.window.unwrap_or(0);
        let input = AttentionInput {
            qkv: a.qkv.first(rows),
            shape: self.shape.heads,
            kv: self.kv(places, index),
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            window,
        };
        let mixed = a.mixed.first(rows);
        let (items, shares) = &places.decode[&window];
        if !items.is_empty() {
            let plan = (self.inputs.array(items), self.inputs.array(shares));
            cuda::decode_attention(self.stream, mixed, &input, plan, self.scratch)?;
        }
        for runs in &places.long {
            let kv = match self.widened {
                Some(wide) => wide.fill(self.stream, &input.kv, self.inputs.array(&runs.blocks))?,
                None => input.kv,
            };
            let (input, tiles) = (AttentionInput { kv, ..input }, self.inputs.array(&runs.tiles));
            cuda::prefill_attention(self.stream, mixed, &input, tiles)?;
        }
        self.linear(&layer.attention_out, mixed, a.update.first(rows))?;
        self.add_up(a.update.first(rows))
    }

    fn feed_forward(&self, rows: usize, layer: &Layer) -> Result<(), DeviceError> {
        let a = self.activations;
        let (gate_up, inner) = (a.gate_up.first(rows), a.inner.first(rows));
        self.linear(&layer.gate_up, a.normed.first(rows), gate_up)?;
        cuda::silu_mul(self.stream, inner, gate_up, a.inner.width)?;
        self.linear(&layer.down, inner, a.update.first(rows))?;
        self.add_up(a.update.first(rows))
    }

    /// Whether this device has embedding and output layer.
    pub(super) fn is_first(&self) -> bool {
        self.member.is_none_or(|member| member.shard.is_first())
    }

    /// Adds up what all devices of the model have there.
    fn add_up(&self, data: Slice<'_, bf16>) -> Result<(), DeviceError> {
        self.member.map_or(Ok(()), |member| member.add_up(self.stream, data))
    }

    fn linear<'s>(
        &'s self,
        linear: &'s Linear,
        x: Slice<'s, bf16>,
        y: Slice<'s, bf16>,
    ) -> Result<(), DeviceError> {
        let (inputs, bias) = (linear.inputs, linear.bias.as_ref().map(|bias| bias.all()));
        let factors = match &linear.matrix {
            Matrix::Bf16(matrix) => Factors::Bf16 { x, w: matrix.all() },
            Matrix::E4m3 { values, scales } => {
                let (rounded, x_scales) = self.activations.rounded(x.len() / inputs, inputs);
                cuda::quantize_rows(self.stream, rounded, x_scales, x)?;
                let (w, w_scales) = (values.all(), scales.all());
                Factors::E4m3 { x: rounded, x_scales, w, w_scales }
            }
        };
        self.gemm.multiply(self.stream, &Matmul { factors, inputs, y, bias, add: false })
    }

    /// Logits of rows after the last norm, `x: [rows, hidden]`.
    pub(super) fn score<'s>(
        &'s self,
        x: Slice<'s, bf16>,
        logits: Slice<'s, f32>,
    ) -> Result<(), DeviceError> {
        let factors = Factors::Bf16 { x, w: self.weights.head().all() };
        let inputs = self.config.hidden;
        let product = Matmul { factors, inputs, y: logits, bias: None, add: false };
        self.gemm.multiply(self.stream, &product)
    }
}
