//! `config.json` of a checkpoint, as transformers 4 and transformers 5 write it. Strict: what this
//! program would compute differently from transformers is refused, naming the key and its value.

mod keys;

use serde_json::{Value, json};

pub(crate) use self::keys::Keys;
use crate::rope::Rope;
use baton_kernels::Dtype;

/// Bounds far above real models, so that sizes computed from a config cannot overflow.
const MOST_WIDTH: usize = 1 << 20;
const MOST_VOCAB: usize = 1 << 24;
const MOST_POSITIONS: usize = 1 << 30;
/// What a KV geometry on the wire may state at most.
const MOST_LAYERS: usize = 4096;
const MOST_HEADS: usize = 4096;

/// A checkpoint's configuration cannot be served. The text is one line that names the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A key without which the model is not defined.
    #[error("{0} is missing")]
    Missing(String),
    /// A value that no model can have.
    #[error("{key} is {value}; expected {expected}")]
    Invalid {
        /// Path of the key, such as `rope_scaling.factor`.
        key: String,
        /// Its value as JSON.
        value: String,
        /// What it must be.
        expected: String,
    },
    /// A value that some model has, and that is not served.
    #[error("{key} is {value}; supported: {supported}")]
    Unsupported {
        /// Path of the key.
        key: String,
        /// Its value as JSON.
        value: String,
        /// The values that are served.
        supported: String,
    },
}

/// Model families; what differs between them is spelled out in [`ModelConfig`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// Llama 2 and 3.x, and everything saved as `llama`.
    Llama,
    /// Mistral: a sliding window in every layer, if in any.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: a norm on each head of q and k.
    Qwen3,
}

/// A decoder of grouped-query attention and SwiGLU layers, with all that varies between families.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelConfig {
    /// Whose conventions the checkpoint follows.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Most positions that the rotary embedding is meant for.
    pub max_positions: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// One entry per layer: the sliding window in tokens (a query sees that many keys, its own
    /// included), or none.
    pub windows: Vec<Option<usize>>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on the output projection of attention.
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMS norms on each head of q and k.
    pub qk_norm: bool,
    /// The output layer is the embedding.
    pub tied: bool,
    /// What the file says the weights' type is; the tensors decide.
    pub dtype: Option<Dtype>,
    /// End-of-sequence tokens of this file; `generation_config.json` wins over them.
    pub eos_token_ids: Vec<u32>,
}

/// Keys that change the computation in other architectures, with the value that means "not here".
fn neutral_keys() -> [(&'static str, Value); 13] {
    [
        ("attn_logit_softcapping", Value::Null),
        ("final_logit_softcapping", Value::Null),
        ("clip_qkv", Value::Null),
        ("partial_rotary_factor", json!(1.0)),
        ("num_experts", json!(0)),
        ("num_local_experts", json!(0)),
        ("n_routed_experts", json!(0)),
        ("moe_intermediate_size", Value::Null),
        ("is_encoder_decoder", json!(false)),
        ("use_bidirectional_attention", json!(false)),
        ("no_rope_layers", Value::Null),
        ("rope_interleaved", json!(false)),
        ("qk_layernorm", json!(false)),
    ]
}

impl ModelConfig {
    /// Reads a parsed `config.json`.
    pub fn parse(config: &Value) -> Result<Self, ConfigError> {
        let keys = Keys::of(config, "")?;
        let family = Family::parse(keys)?;
        refuse_what_changes_the_model(keys)?;
        let heads = keys.required_size("num_attention_heads", MOST_HEADS)?;
        let layers = keys.required_size("num_hidden_layers", MOST_LAYERS)?;
        let hidden = keys.required_size("hidden_size", MOST_WIDTH)?;
        let head_dim = head_dim(keys, family, hidden, heads)?;
        let max_positions = keys.required_size("max_position_embeddings", MOST_POSITIONS)?;
        let attention_bias = attention_bias(keys, family)?;
        Ok(Self {
            family,
            hidden,
            ffn: keys.required_size("intermediate_size", MOST_WIDTH)?,
            heads,
            kv_heads: kv_heads(keys, family, heads)?,
            head_dim,
            vocab_size: keys.required_size("vocab_size", MOST_VOCAB)?,
            max_positions,
            norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope: Rope::parse(config, head_dim, max_positions)?,
            windows: windows(keys, family, layers)?,
            qkv_bias: attention_bias || family == Family::Qwen2,
            output_bias: attention_bias,
            mlp_bias: mlp_bias(keys, family)?,
            qk_norm: family == Family::Qwen3,
            tied: keys.flag("tie_word_embeddings", false)?,
            dtype: dtype(keys)?,
            eos_token_ids: keys.token_ids("eos_token_id")?,
        })
    }

    /// Transformer layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.windows.len()
    }
}

impl Family {
    const ALL: [(&'static str, &'static str, Self); 4] = [
        ("llama", "LlamaForCausalLM", Self::Llama),
        ("mistral", "MistralForCausalLM", Self::Mistral),
        ("qwen2", "Qwen2ForCausalLM", Self::Qwen2),
        ("qwen3", "Qwen3ForCausalLM", Self::Qwen3),
    ];

    fn is_qwen(self) -> bool {
        matches!(self, Self::Qwen2 | Self::Qwen3)
    }

    fn parse(keys: Keys<'_>) -> Result<Self, ConfigError> {
        let supported = || {
            let types: Vec<_> = Self::ALL.iter().map(|(model_type, ..)| *model_type).collect();
            types.join(", ")
        };
        let model_type = keys.text("model_type")?.ok_or_else(|| keys.missing("model_type"))?;
        let (_, architecture, family) = Self::ALL
            .into_iter()
            .find(|(name, ..)| *name == model_type)
            .ok_or_else(|| keys.unsupported("model_type", &supported()))?;
        // A classifier or a reward model has the same layers, and another head.
        if let Some(architectures) = keys.get("architectures")
            && !architectures.as_array().is_some_and(|list| list.contains(&json!(architecture)))
        {
            return Err(keys.unsupported("architectures", architecture));
        }
        Ok(family)
    }
}

fn refuse_what_changes_the_model(keys: Keys<'_>) -> Result<(), ConfigError> {
    if let Some(quantization) = keys.get("quantization_config") {
        return Err(match Keys::of(quantization, "quantization_config.") {
            Ok(inner) if inner.get("quant_method").is_some() => {
                inner.unsupported("quant_method", "unquantized weights")
            }
            _ => keys.unsupported("quantization_config", "unquantized weights"),
        });
    }
    for key in ["hidden_act", "hidden_activation"] {
        // transformers knows SiLU by both names.
        if !matches!(keys.text(key)?, None | Some("silu" | "swish")) {
            return Err(keys.unsupported(key, "silu"));
        }
    }
    neutral_keys().iter().try_for_each(|(key, neutral)| keys.only(key, neutral))
}

fn head_dim(
    keys: Keys<'_>,
    family: Family,
    hidden: usize,
    heads: usize,
) -> Result<usize, ConfigError> {
    const MOST: usize = baton_kernels::cpu::MAX_HEAD_DIM;
    let head_dim = match keys.size("head_dim", MOST_WIDTH)? {
        Some(head_dim) => head_dim,
        // The default of transformers' Qwen3Config, which does not depend on the hidden size.
        None if family == Family::Qwen3 => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(keys.invalid("num_attention_heads", "a divisor of hidden_size")),
    };
    if !head_dim.is_multiple_of(2) || head_dim > MOST {
        return Err(ConfigError::Invalid {
            key: "head_dim".to_owned(),
            value: head_dim.to_string(),
            expected: format!("an even number up to {MOST}"),
        });
    }
    Ok(head_dim)
}

fn kv_heads(keys: Keys<'_>, family: Family, heads: usize) -> Result<usize, ConfigError> {
    const KEY: &str = "num_key_value_heads";
    let kv_heads = match keys.size(KEY, MOST_HEADS)? {
        Some(kv_heads) => kv_heads,
        // Llama before grouped queries had no such key; transformers' defaults for the others
        // are some published model's, so absence there is more likely a mistake.
        None if family == Family::Llama => heads,
        None => return Err(keys.missing(KEY)),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(keys.invalid(KEY, "a divisor of num_attention_heads"));
    }
    Ok(kv_heads)
}

/// Biases on q, k, v and the output projection. (Qwen2 has them on q, k and v whatever it says.)
fn attention_bias(keys: Keys<'_>, family: Family) -> Result<bool, ConfigError> {
    match family {
        Family::Llama | Family::Qwen3 => keys.flag("attention_bias", false),
        Family::Qwen2 => Ok(false),
        Family::Mistral => keys.only("attention_bias", &json!(false)).map(|()| false),
    }
}

fn mlp_bias(keys: Keys<'_>, family: Family) -> Result<bool, ConfigError> {
    match family {
        Family::Llama => keys.flag("mlp_bias", false),
        _ => keys.only("mlp_bias", &json!(false)).map(|()| false),
    }
}

fn dtype(keys: Keys<'_>) -> Result<Option<Dtype>, ConfigError> {
    let key = if keys.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match keys.text(key)?.map(|name| name.trim_start_matches("torch.")) {
        None => Ok(None),
        Some("float32") => Ok(Some(Dtype::F32)),
        Some("bfloat16") => Ok(Some(Dtype::Bf16)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some(_) => Err(keys.unsupported(key, "float32, bfloat16, float16")),
    }
}

/// The sliding window of every layer, as the family's config class in transformers derives it.
fn windows(
    keys: Keys<'_>,
    family: Family,
    layers: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = window(keys, family)?;
    let first = first_sliding_layer(keys, family)?;
    let derived: Vec<bool> = (0..layers).map(|i| window.is_some() && i >= first).collect();
    let slides = match layer_types(keys, layers)? {
        None => derived,
        Some(listed) if listed == derived => listed,
        // Of these families, only Qwen reads the list; other programs read it for all.
        Some(listed) if family.is_qwen() && window.is_some() => listed,
        Some(_) => return Err(keys.unsupported("layer_types", "what sliding_window says")),
    };
    Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
}

/// The sliding window of the layers that have one.
fn window(keys: Keys<'_>, family: Family) -> Result<Option<usize>, ConfigError> {
    const KEY: &str = "sliding_window";
    let used = match family {
        // transformers' Llama has no window, whatever its config says.
        Family::Llama => false,
        Family::Mistral => true,
        Family::Qwen2 | Family::Qwen3 => keys.flag("use_sliding_window", false)?,
    };
    if !used || keys.is_null(KEY) {
        return Ok(None);
    }
    // The default of these families' config classes.
    Ok(Some(keys.size(KEY, MOST_POSITIONS)?.unwrap_or(4096)))
}

/// The first layer with a sliding window, where `layer_types` does not say.
fn first_sliding_layer(keys: Keys<'_>, family: Family) -> Result<usize, ConfigError> {
    const KEY: &str = "max_window_layers";
    match keys.get(KEY) {
        _ if !family.is_qwen() => Ok(0),
        None => Ok(28),
        Some(value) => match value.as_u64() {
            Some(first) => Ok(first as usize),
            None => Err(keys.invalid(KEY, "a whole number")),
        },
    }
}

/// `layer_types`, if the file has it: whether each layer's attention slides.
fn layer_types(keys: Keys<'_>, layers: usize) -> Result<Option<Vec<bool>>, ConfigError> {
    const KEY: &str = "layer_types";
    let Some(value) = keys.get(KEY) else {
        return Ok(None);
    };
    let list = value.as_array().filter(|list| list.len() == layers).ok_or_else(|| {
        keys.invalid(KEY, &format!("a list of num_hidden_layers = {layers} names"))
    })?;
    list.iter()
        .map(|name| match name.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(ConfigError::Unsupported {
                key: KEY.to_owned(),
                value: name.to_string(),
                supported: "full_attention, sliding_attention".to_owned(),
            }),
        })
        .collect::<Result<_, _>>()
        .map(Some)
}
