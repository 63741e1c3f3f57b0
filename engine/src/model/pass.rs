//! The forward pass.
//!
//! Every output element is computed from its own row in one fixed order, so results do not depend
//! on which rows are computed together.

#![expect(unsafe_code, reason = "the KV cache is shared; see `Forward::forward`")]

use std::ops::ControlFlow;

use baton_kernels::cpu::{self, AttentionRow, Heads, KvStore, PackedMatrix, Queries, ThreadPool};
use baton_proto::geometry::KvGeometry;

use super::Model;
use super::layer::Layer;
use super::rows::Rows;
use crate::config::ModelConfig;
use crate::forward::{Chunk, Forward};

/// Rows that are told of at a time, so that the log-probabilities of a long prompt need no
/// buffer of its length.
const LOGIT_ROWS: usize = 64;

/// Activations, kept between steps; they grow to the largest step.
#[derive(Default)]
pub(super) struct Scratch {
    rows: Rows,
    /// Cosines and sines of each row's position: `[rows, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The residual stream: `[rows, hidden]`.
    stream: Vec<f32>,
    /// The stream after a norm.
    normed: Vec<f32>,
    /// `[rows, (heads + 2 kv_heads) head_dim]`: queries, keys and values.
    qkv: Vec<f32>,
    /// What attention gives: `[rows, heads, head_dim]`.
    mixed: Vec<f32>,
    /// `[rows, 2 ffn]`, then `[rows, ffn]`.
    gate_up: Vec<f32>,
    inner: Vec<f32>,
    /// What a layer adds to the stream.
    update: Vec<f32>,
    /// `[LOGIT_ROWS, vocab]`
    logits: Vec<f32>,
}

/// The first `length` elements of a buffer, which grows if it is shorter. Their content is
/// whatever an earlier step left.
fn sized(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if buffer.len() < length {
        buffer.resize(length, 0.0);
    }
    &mut buffer[..length]
}

/// Where queries, keys and values lie in a row of `qkv`, which is `width` elements long.
struct Parts {
    q: Heads,
    k: Heads,
    v: Heads,
    width: usize,
}

impl Parts {
    fn of(config: &ModelConfig) -> Self {
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        let width = (heads + 2 * kv_heads) * dim;
        let part = |first: usize, count| Heads { stride: width, offset: first * dim, count, dim };
        let (k, v) = (part(heads, kv_heads), part(heads + kv_heads, kv_heads));
        Self { q: part(0, heads), k, v, width }
    }
}

/// What a pass reads.
struct Context<'a> {
    config: &'a ModelConfig,
    pool: &'a ThreadPool,
    kv: &'a KvStore,
    chunks: &'a [Chunk<'a>],
}

impl Forward for Model {
    fn geometry(&self, block_tokens: u32) -> KvGeometry {
        KvGeometry {
            layers: self.config.layers() as u32,
            kv_heads: self.config.kv_heads as u32,
            head_dim: self.config.head_dim as u32,
            dtype: self.kv_dtype,
            block_tokens,
        }
    }

    fn revision(&self) -> [u8; 32] {
        self.revision
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn hidden_size(&self) -> usize {
        self.config.hidden
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    unsafe fn forward(
        &mut self,
        chunks: &[Chunk<'_>],
        kv: &KvStore,
        after_layer: &mut dyn FnMut(usize) -> ControlFlow<()>,
        each: &mut dyn FnMut(usize, &mut [f32]),
    ) -> ControlFlow<()> {
        let context = &Context { config: &self.config, pool: &self.pool, kv, chunks };
        let scratch = &mut self.scratch;
        scratch.rows.list(chunks, kv.layout().block_tokens);
        scratch.embed(context, self.embedding.as_ref().unwrap_or(&self.head));
        for (index, layer) in self.layers.iter().enumerate() {
            scratch.project(context, layer);
            // SAFETY: the caller's promise; rows of one sequence have positions of their own.
            unsafe { scratch.store(context, index) };
            after_layer(index)?;
            if index + 1 == self.layers.len() {
                scratch.keep_wanted(context);
            }
            // SAFETY: the caller's promise; the keys and values of this step are written.
            unsafe { scratch.attend(context, index, layer) };
            scratch.feed_forward(context, layer);
        }
        scratch.tell(context, &self.norm, &self.head, each);
        ControlFlow::Continue(())
    }
}

impl Scratch {
    fn embed(&mut self, context: &Context<'_>, table: &PackedMatrix) {
        let Context { config, pool, .. } = *context;
        let stream = sized(&mut self.stream, self.rows.len() * config.hidden);
        pool.for_each_chunk(stream, config.hidden, &|row, out| {
            table.unpack_row(self.rows.tokens[row] as usize, out);
        });
        config.rope.angles(&self.rows.positions, &mut self.cos, &mut self.sin);
    }

    /// Queries, keys and values of every row, queries and keys turned to their positions.
    fn project(&mut self, context: &Context<'_>, layer: &Layer) {
        let Context { config, pool, .. } = *context;
        let (rows, hidden) = (self.rows.len(), config.hidden);
        let normed = sized(&mut self.normed, rows * hidden);
        let stream = &self.stream[..rows * hidden];
        cpu::rms_norm(pool, stream, &layer.attention_norm, config.norm_eps, normed);
        let Parts { q, k, width, .. } = Parts::of(config);
        let qkv = sized(&mut self.qkv, rows * width);
        layer.qkv.apply(pool, normed, qkv);
        if let Some(norms) = &layer.head_norms {
            cpu::rms_norm_heads(pool, qkv, q, &norms.q, config.norm_eps);
            cpu::rms_norm_heads(pool, qkv, k, &norms.k, config.norm_eps);
        }
        cpu::rotate_heads(pool, qkv, q, &self.cos, &self.sin);
        cpu::rotate_heads(pool, qkv, k, &self.cos, &self.sin);
    }

    /// Writes keys and values to the cache.
    ///
    /// # Safety
    /// As for [`Forward::forward`].
    unsafe fn store(&self, context: &Context<'_>, layer: usize) {
        let Parts { k, v, width, .. } = Parts::of(context.config);
        let qkv = &self.qkv[..self.rows.len() * width];
        let Context { pool, kv, .. } = *context;
        // SAFETY: the caller's promise.
        unsafe { cpu::write_kv(pool, kv, layer, &self.rows.kv, qkv, (k, v)) };
    }

    /// Drops the rows of which nobody wants anything: past the last layer's keys and values, nothing
    /// reads them.
    fn keep_wanted(&mut self, context: &Context<'_>) {
        let (hidden, width) = (context.config.hidden, Parts::of(context.config).width);
        for (to, from) in self.rows.keep_wanted().enumerate() {
            self.stream.copy_within(from * hidden..(from + 1) * hidden, to * hidden);
            self.qkv.copy_within(from * width..(from + 1) * width, to * width);
        }
    }

    /// Adds what attention gives to the stream.
    ///
    /// # Safety
    /// As for [`Forward::forward`].
    unsafe fn attend(&mut self, context: &Context<'_>, index: usize, layer: &Layer) {
        let Context { config, pool, kv, chunks } = *context;
        let rows = self.rows.len();
        let seen: Vec<_> = std::iter::zip(&self.rows.positions, &self.rows.chunks)
            .map(|(position, chunk)| AttentionRow {
                position: *position,
                first_key: layer.window.map_or(0, |window| (position + 1).saturating_sub(window)),
                blocks: chunks[*chunk].blocks,
            })
            .collect();
        let Parts { q, width, .. } = Parts::of(config);
        let mixed = sized(&mut self.mixed, rows * q.width());
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let queries = Queries { matrix: &self.qkv[..rows * width], heads: q, scale };
        // SAFETY: the caller's promise.
        unsafe { cpu::attention(pool, kv, index, &seen, queries, mixed) };
        let update = sized(&mut self.update, rows * config.hidden);
        layer.attention_out.apply(pool, mixed, update);
        cpu::add(pool, &mut self.stream[..rows * config.hidden], update);
    }

    /// Adds what the MLP gives to the stream.
    fn feed_forward(&mut self, context: &Context<'_>, layer: &Layer) {
        let Context { config, pool, .. } = *context;
        let (rows, hidden) = (self.rows.len(), config.hidden);
        let stream = &mut self.stream[..rows * hidden];
        let normed = sized(&mut self.normed, rows * hidden);
        cpu::rms_norm(pool, stream, &layer.mlp_norm, config.norm_eps, normed);
        let gate_up = sized(&mut self.gate_up, rows * 2 * config.ffn);
        layer.gate_up.apply(pool, normed, gate_up);
        let inner = sized(&mut self.inner, rows * config.ffn);
        cpu::silu_mul(pool, gate_up, config.ffn, inner);
        let update = sized(&mut self.update, rows * hidden);
        layer.down.apply(pool, inner, update);
        cpu::add(pool, stream, update);
    }

    /// Hidden states or logits of all rows left, some at a time.
    fn tell(
        &mut self,
        context: &Context<'_>,
        norm: &[f32],
        head: &PackedMatrix,
        each: &mut dyn FnMut(usize, &mut [f32]),
    ) {
        let Context { config, pool, .. } = *context;
        let alike = self.rows.hidden.chunk_by(|one, next| one == next);
        let mut first = 0;
        for rows in alike.flat_map(|rows| rows.chunks(LOGIT_ROWS)) {
            let end = first + rows.len();
            let stream = &self.stream[first * config.hidden..end * config.hidden];
            let normed = sized(&mut self.normed, stream.len());
            cpu::rms_norm(pool, stream, norm, config.norm_eps, normed);
            let (values, width) = if rows[0] {
                (normed, config.hidden)
            } else {
                let logits = sized(&mut self.logits, rows.len() * config.vocab_size);
                cpu::matmul(pool, normed, head, logits);
                (logits, config.vocab_size)
            };
            (first..).zip(values.chunks_mut(width)).for_each(|(row, values)| each(row, values));
            first = end;
        }
    }
}
