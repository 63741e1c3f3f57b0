//! What a step computes on the way, in memory that is reserved once.

use std::sync::Arc;

use baton_kernels::cuda::{Buffer, Device, DeviceError, DeviceSampler, Element, Slice};
use half::bf16;

use super::{Sizes, WeightDtype};
use crate::config::ModelConfig;

/// Buffers of a step's rows, each for the largest step.
pub(super) struct Activations {
    /// The tokens of the rows.
    pub(super) tokens: Rows<u32>,
    /// Cosines and sines of each row's position: `[rows, head_dim / 2]`.
    pub(super) cos: Rows<f32>,
    pub(super) sin: Rows<f32>,
    /// `[rows, hidden]`
    pub(super) residual: Rows<bf16>,
    /// The residual stream after a norm.
    pub(super) normed: Rows<bf16>,
    /// `[rows, (heads + 2 kv_heads) head_dim]`: queries, keys and values.
    pub(super) qkv: Rows<bf16>,
    /// What attention gives: `[rows, heads, head_dim]`.
    pub(super) mixed: Rows<bf16>,
    /// `[rows, 2 ffn]`, then `[rows, ffn]`.
    pub(super) gate_up: Rows<bf16>,
    pub(super) inner: Rows<bf16>,
    /// What a layer adds to the residual stream.
    pub(super) update: Rows<bf16>,
    /// Rows of `normed` whose logits are wanted.
    pub(super) wanted: Rows<bf16>,
    /// `[rows, vocab]` with the stride of the sampler; fewer rows than the others.
    pub(super) logits: Rows<f32>,
    /// Where weights are e4m3: what they are multiplied with.
    rounded: Option<Rounded>,
}

/// Rows as e4m3, each with a scale.
struct Rounded {
    values: Buffer<u8>,
    scales: Buffer<f32>,
}

/// A matrix with room for many rows.
pub(super) struct Rows<T: Element> {
    buffer: Buffer<T>,
    pub(super) width: usize,
}

impl<T: Element> Rows<T> {
    fn new(device: &Arc<Device>, rows: usize, width: usize) -> Result<Self, DeviceError> {
        Ok(Self { buffer: Buffer::new(device, rows * width)?, width })
    }

    /// The first `rows` rows.
    pub(super) fn first(&self, rows: usize) -> Slice<'_, T> {
        self.buffer.slice(0..rows * self.width)
    }
}

impl Activations {
    pub(super) fn new(
        device: &Arc<Device>,
        c: &ModelConfig,
        dtype: WeightDtype,
        sizes: &Sizes,
    ) -> Result<Self, DeviceError> {
        let wide = |width| Rows::new(device, sizes.rows, width);
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let stride = DeviceSampler::stride(c.vocab_size);
        let rounded = || {
            let values = Buffer::new(device, sizes.rows * c.hidden.max(q).max(c.ffn))?;
            Ok(Rounded { values, scales: Buffer::new(device, sizes.rows)? })
        };
        Ok(Self {
            tokens: Rows::new(device, sizes.rows, 1)?,
            cos: Rows::new(device, sizes.rows, c.head_dim / 2)?,
            sin: Rows::new(device, sizes.rows, c.head_dim / 2)?,
            residual: wide(c.hidden)?,
            normed: wide(c.hidden)?,
            qkv: wide(q + 2 * kv)?,
            mixed: wide(q)?,
            gate_up: wide(2 * c.ffn)?,
            inner: wide(c.ffn)?,
            update: wide(c.hidden)?,
            wanted: wide(c.hidden)?,
            logits: Rows::new(device, sizes.logit_rows, stride)?,
            rounded: (dtype == WeightDtype::Fp8).then(rounded).transpose()?,
        })
    }

    /// Room for rows of `width` elements as e4m3, and for their scales. There is one such room.
    ///
    /// # Panics
    /// If no weights are e4m3.
    pub(super) fn rounded(&self, rows: usize, width: usize) -> (Slice<'_, u8>, Slice<'_, f32>) {
        let Rounded { values, scales } = self.rounded.as_ref().expect("weights are e4m3");
        (values.slice(0..rows * width), scales.slice(0..rows))
    }
}
