//! Which tensors a configuration calls for: their names and shapes in a Hugging Face checkpoint.

use std::collections::BTreeMap;

use crate::config::ModelConfig;

/// Tensors by name, with their shapes.
pub(crate) struct Expected(BTreeMap<String, Vec<usize>>);

impl Expected {
    pub(crate) fn of(config: &ModelConfig) -> Self {
        let mut all = Self(BTreeMap::new());
        let table = [config.vocab_size, config.hidden];
        all.add("model.embed_tokens.weight", &table);
        all.add("model.norm.weight", &[config.hidden]);
        if !config.tied {
            all.add("lm_head.weight", &table);
        }
        for layer in 0..config.layers() {
            all.add_layer(&format!("model.layers.{layer}"), config);
        }
        all
    }

    fn add_layer(&mut self, at: &str, c: &ModelConfig) {
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            self.add(&format!("{at}.{norm}.weight"), &[c.hidden]);
        }
        if c.qk_norm {
            for norm in ["q_norm", "k_norm"] {
                self.add(&format!("{at}.self_attn.{norm}.weight"), &[c.head_dim]);
            }
        }
        let linears = [
            ("self_attn.q_proj", q, c.hidden, c.qkv_bias),
            ("self_attn.k_proj", kv, c.hidden, c.qkv_bias),
            ("self_attn.v_proj", kv, c.hidden, c.qkv_bias),
            ("self_attn.o_proj", c.hidden, q, c.output_bias),
            ("mlp.gate_proj", c.ffn, c.hidden, c.mlp_bias),
            ("mlp.up_proj", c.ffn, c.hidden, c.mlp_bias),
            ("mlp.down_proj", c.hidden, c.ffn, c.mlp_bias),
        ];
        for (name, outputs, inputs, bias) in linears {
            self.add(&format!("{at}.{name}.weight"), &[outputs, inputs]);
            if bias {
                self.add(&format!("{at}.{name}.bias"), &[outputs]);
            }
        }
    }

    fn add(&mut self, name: &str, shape: &[usize]) {
        self.0.insert(name.to_owned(), shape.to_vec());
    }

    /// In the order of names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.0.iter().map(|(name, shape)| (&name[..], &shape[..]))
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.0.get(name).map(|shape| &shape[..])
    }
}

/// Tensors that checkpoints carry and that no computation reads.
pub(crate) fn ignored(name: &str, config: &ModelConfig) -> bool {
    // Old Llama checkpoints hold their rotary frequencies, which follow from the configuration;
    // some with tied embeddings hold the table twice.
    name.ends_with("rotary_emb.inv_freq") || config.tied && name == "lm_head.weight"
}
