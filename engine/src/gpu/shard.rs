//! [`Shard`]: which part of a model one of several devices has (tensor parallelism).
//!
//! As in Megatron-LM (Shoeybi et al. 2019): each device has some of the heads and some of the
//! MLP's inner width. q, k, v, gate and up are split by outputs, the matrices after them by inputs;
//! so devices only have to add up what attention and MLP add to the residual stream.
//!
//! Embedding and output layer are the first device's alone. The others get looked-up rows by the
//! same kind of sum, and need no tokens, as only the first samples: so nobody can disagree, and
//! logits are made as on a single device. The price is that reading the output layer is not shared:
//! of a model of 70 billion parameters on 4 devices, about 5 % of the time of a decode step.

use std::ops::Range;

use crate::config::ModelConfig;

/// One device's part, of `ranks` equal ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shard {
    pub(super) rank: usize,
    pub(super) ranks: usize,
}

/// How devices share a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// Not at all.
    Whole,
    /// Each has some rows.
    Outputs,
    /// Each has some columns.
    Inputs,
}

impl Shard {
    /// All of a model.
    pub(super) const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// Whether it has embedding, output layer and the biases after sums.
    pub(super) fn is_first(self) -> bool {
        self.rank == 0
    }

    /// # Errors
    /// Why a model cannot be shared by so many devices.
    pub(super) fn check(config: &ModelConfig, ranks: usize) -> Result<(), String> {
        let parts = [
            ("key/value heads", config.kv_heads),
            ("query heads", config.heads),
            ("elements inside the MLP", config.ffn),
        ];
        match parts.into_iter().find(|(_, count)| !count.is_multiple_of(ranks)) {
            Some((what, count)) => {
                Err(format!("{ranks} devices cannot share {count} {what} equally"))
            }
            None => Ok(()),
        }
    }

    /// The model as this device sees it: with fewer heads, and narrower inside.
    pub(super) fn config(self, whole: &ModelConfig) -> ModelConfig {
        ModelConfig {
            heads: whole.heads / self.ranks,
            kv_heads: whole.kv_heads / self.ranks,
            ffn: whole.ffn / self.ranks,
            ..whole.clone()
        }
    }

    /// The elements of a checkpoint's tensor that this device has, in their order.
    pub(super) fn runs(self, name: &str, shape: &[usize]) -> Vec<Range<usize>> {
        let len = shape.iter().product::<usize>();
        let (rows, own) = match split(name) {
            Split::Whole => (1, 0..len),
            Split::Outputs => (1, self.of(len)),
            Split::Inputs => (shape[0], self.of(shape[1])),
        };
        let starts = (0..rows).map(|row| row * (len / rows));
        starts.map(|start| start + own.start..start + own.end).collect()
    }

    /// This device's part of so many.
    fn of(self, count: usize) -> Range<usize> {
        let own = count / self.ranks;
        self.rank * own..(self.rank + 1) * own
    }
}

fn split(name: &str) -> Split {
    let has = |part: &&str| name.contains(part);
    if ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"].iter().any(has) {
        Split::Outputs
    } else if ["o_proj.weight", "down_proj.weight"].iter().any(has) {
        Split::Inputs
    } else {
        Split::Whole
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::weights::Expected;

    fn config() -> ModelConfig {
        let config = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"],
            "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 11,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
            "hidden_act": "silu", "attention_bias": true, "mlp_bias": true,
            "tie_word_embeddings": false,
        });
        ModelConfig::parse(&config).expect("it is complete")
    }

    #[test]
    fn shards_have_the_shapes_of_their_models_and_together_everything_once() {
        let whole = config();
        for ranks in [1, 2, 4] {
            let shards = (0..ranks).map(|rank| Shard { rank, ranks });
            for (name, shape) in Expected::of(&whole).iter() {
                let mut times = vec![0; shape.iter().product()];
                for shard in shards.clone() {
                    let runs = shard.runs(name, shape);
                    let own = Expected::of(&shard.config(&whole));
                    let elements: usize = own.shape(name).expect("as all").iter().product();
                    assert_eq!(runs.iter().map(Range::len).sum::<usize>(), elements, "{name}");
                    runs.into_iter().flatten().for_each(|i| times[i] += 1);
                }
                let shared = split(name) != Split::Whole;
                let expected = if shared { 1 } else { ranks };
                assert!(times.iter().all(|n| *n == expected), "{name}: {times:?}");
                // Matrices in layers are what a model weighs.
                assert_eq!(
                    shared,
                    name.contains("_proj") && shape.len() == 2 || {
                        shape.len() == 1 && split(name) == Split::Outputs
                    }
                );
            }
        }
    }

    /// Two matrices in a row, each split its way, give parts that add up to the whole.
    #[test]
    fn parts_add_up_to_the_whole() {
        let (inputs, inner, outputs) = (5, 8, 3);
        let weight = |seed: usize, len| (0..len).map(move |i| ((i * 7 + seed) % 11) as f64 - 5.0);
        let up: Vec<f64> = weight(1, inner * inputs).collect();
        let down: Vec<f64> = weight(4, outputs * inner).collect();
        let x: Vec<f64> = weight(9, inputs).collect();
        let multiply = |w: &[f64], x: &[f64]| -> Vec<f64> {
            w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let expected = multiply(&down, &multiply(&up, &x));
        let mut sum = vec![0.0; outputs];
        for rank in 0..4 {
            let shard = Shard { rank, ranks: 4 };
            let part = |name, shape: &[usize], all: &[f64]| -> Vec<f64> {
                shard.runs(name, shape).into_iter().flat_map(|run| all[run].to_vec()).collect()
            };
            let up = part("mlp.up_proj.weight", &[inner, inputs], &up);
            let down = part("mlp.down_proj.weight", &[outputs, inner], &down);
            let y = multiply(&down, &multiply(&up, &x));
            sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
        }
        assert_eq!(sum, expected);
    }

    #[test]
    fn what_cannot_be_shared_is_said() {
        let refused = |ranks| Shard::check(&config(), ranks).unwrap_err();
        assert_eq!(refused(8), "8 devices cannot share 4 key/value heads equally");
        assert_eq!(refused(3), "3 devices cannot share 4 key/value heads equally");
        assert_eq!(Shard::check(&config(), 4), Ok(()));
    }
}
