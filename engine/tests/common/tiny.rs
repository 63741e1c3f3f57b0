//! Tiny random checkpoints of any shape, written as a hub repository would hold them.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use super::Numbers;

/// Shape of a tiny model of the `qwen3` or the `llama` family.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub qwen3: bool,
    pub hidden: usize,
    pub ffn: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Biases wherever the family can have them.
    pub biases: bool,
    pub tied: bool,
}

pub const PLAIN: Shape = Shape {
    qwen3: false,
    hidden: 32,
    ffn: 48,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 8,
    vocab: 64,
    biases: false,
    tied: false,
};

/// Tensors by name: shape and values.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

impl Shape {
    pub fn config(&self) -> Value {
        let (model_type, architecture) =
            if self.qwen3 { ("qwen3", "Qwen3ForCausalLM") } else { ("llama", "LlamaForCausalLM") };
        json!({
            "architectures": [architecture], "model_type": model_type, "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "attention_bias": self.biases, "mlp_bias": self.biases && !self.qwen3,
            "tie_word_embeddings": self.tied, "torch_dtype": "float32", "eos_token_id": [1, 2]
        })
    }

    /// Random weights under the names that transformers gives them.
    pub fn tensors(&self, seed: u64) -> Tensors {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = Tensors::new();
        let mut numbers = Numbers(seed);
        let mut add = |name: String, shape: &[usize]| {
            let norm = name.contains("norm");
            let value =
                |_| if norm { 1.0 + 0.2 * numbers.normal() } else { 0.3 * numbers.normal() };
            let values = (0..shape.iter().product()).map(value).collect();
            tensors.insert(name, (shape.to_vec(), values));
        };
        add("model.embed_tokens.weight".into(), &[self.vocab, self.hidden]);
        add("model.norm.weight".into(), &[self.hidden]);
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocab, self.hidden]);
        }
        for layer in 0..self.layers {
            let at = format!("model.layers.{layer}");
            add(format!("{at}.input_layernorm.weight"), &[self.hidden]);
            add(format!("{at}.post_attention_layernorm.weight"), &[self.hidden]);
            if self.qwen3 {
                add(format!("{at}.self_attn.q_norm.weight"), &[self.head_dim]);
                add(format!("{at}.self_attn.k_norm.weight"), &[self.head_dim]);
            }
            let matrices = [
                ("self_attn.q_proj", q, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, q),
                ("mlp.gate_proj", self.ffn, self.hidden),
                ("mlp.up_proj", self.ffn, self.hidden),
                ("mlp.down_proj", self.hidden, self.ffn),
            ];
            for (name, outputs, inputs) in matrices {
                add(format!("{at}.{name}.weight"), &[outputs, inputs]);
                if self.biases && (name.starts_with("self_attn") || !self.qwen3) {
                    add(format!("{at}.{name}.bias"), &[outputs]);
                }
            }
        }
        tensors
    }
}

pub fn write_config(dir: &Path, config: &Value) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Writes one safetensors file in single precision.
pub fn write_tensors(path: &Path, tensors: &Tensors) {
    write_typed(path, tensors, |_| Dtype::F32);
}

/// Writes one safetensors file, each tensor in its own type: F32, BF16 or F64.
pub fn write_typed(path: &Path, tensors: &Tensors, dtype: impl Fn(&str) -> Dtype) {
    let encode = |name: &str, values: &[f32]| -> Vec<u8> {
        match dtype(name) {
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect(),
        }
    };
    let bytes: BTreeMap<_, Vec<u8>> =
        tensors.iter().map(|(name, (_, values))| (name, encode(name, values))).collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        (name, TensorView::new(dtype(name), shape.clone(), &bytes[name]).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A folder with `config.json` and `model.safetensors`.
pub fn checkpoint(shape: &Shape, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &shape.config());
    write_tensors(&dir.path().join("model.safetensors"), tensors);
    dir
}
