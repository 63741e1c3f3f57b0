//! Devices with a model on them, as constants of the cost models.

use crate::replay::{DecodeCost, PrefillCost};

/// A model on a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Device {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it is.
    pub description: &'static str,
    /// Time of a prefill.
    pub prefill_cost: PrefillCost,
    /// Time of a decode step.
    pub decode_cost: DecodeCost,
    /// Bytes of KV per token.
    pub kv_bytes_per_token: f64,
    /// Tokens of KV that there is room for.
    pub kv_tokens: u64,
}

/// A model of 70 B parameters on eight A800, as in the published study that replays are compared
/// with: 12,000 tokens in 1.37 s, 128,000 in 29 s. The KV is 80 layers of 8 heads of 2 x 128 numbers
/// of 16 bits, and lies in the host's memory too: 10,000 blocks of 512 tokens.
pub const A800X8_70B: Device = Device {
    name: "a800x8-70b",
    description: "70B model on 8 A800, the setting of published comparisons",
    prefill_cost: PrefillCost { start_ms: 20.0, token_ms: 0.1, square_ms: 1e-6 },
    decode_cost: DecodeCost { step_ms: 18.0, sequence_ms: 0.1, kv_token_ms: 2.9e-5 },
    kv_bytes_per_token: 327_680.0,
    kv_tokens: 10_000 * 512,
};

/// Llama-3.1-8B in bf16 on an H200 (SXM: 141 GB, 4.8 TB/s, 989 TFLOP/s dense). Derived, not
/// measured:
///
/// - 8.03 B parameters, 16.1 GB; 6.98 B of them take part in every token of a prompt, at 2 operations
///   each and 600 TFLOP/s: `b` = 0.0233 ms.
/// - Attention takes 4 x 4096 operations per layer and pair of tokens, over 32 layers, and there are
///   `L^2 / 2` pairs: `c` = 4.4e-7 ms.
/// - `a` = 5 ms: the weights are read once (3.3 ms), kernels launched, a token sampled.
/// - `d0`: the weights at 85 % of the bandwidth, 3.9 ms. `d1`: 2 x 8.03 G operations, 0.027 ms.
/// - KV: 32 layers of 8 heads of 2 x 128 numbers of 2 bytes are 128 KiB per token; `d2` = 3.2e-5 ms.
/// - 90 % of the memory less the weights is 111 GB of KV.
pub const H200_8B: Device = Device {
    name: "h200-8b",
    description: "8B model in bf16 on an H200, derived from its data sheet",
    prefill_cost: PrefillCost { start_ms: 5.0, token_ms: 0.0233, square_ms: 4.4e-7 },
    decode_cost: DecodeCost { step_ms: 3.9, sequence_ms: 0.027, kv_token_ms: 3.2e-5 },
    kv_bytes_per_token: 131_072.0,
    kv_tokens: 846_000,
};

/// Qwen3-0.6B's shape in bf16 on two cores of a Sapphire-Rapids-class Xeon, fitted to
/// `docs/performance.md`: prompts of 512 and 2,048 tokens at 178 and 140 tokens/s give `b` and `c`;
/// steps of 1, 8 and 16 sequences take 48, 85 and 130 ms. `d2` is the KV's 112 KiB per token at the
/// 34 GB/s of the weights. 8 GB of KV are assumed.
pub const CPU_06B: Device = Device {
    name: "cpu-0.6b",
    description: "0.6B model on two CPU cores, fitted to this program's own measurements",
    prefill_cost: PrefillCost { start_ms: 5.0, token_ms: 5.1, square_ms: 9.9e-4 },
    decode_cost: DecodeCost { step_ms: 42.4, sequence_ms: 4.9, kv_token_ms: 3.3e-3 },
    kv_bytes_per_token: 114_688.0,
    kv_tokens: 70_000,
};

/// All of them.
pub const DEVICES: [Device; 3] = [A800X8_70B, H200_8B, CPU_06B];

#[cfg(test)]
mod tests {
    use super::*;

    fn near(value: f64, expected: f64) {
        assert!((value / expected - 1.0).abs() < 0.03, "{value} and {expected}");
    }

    #[test]
    fn presets_give_the_figures_they_are_derived_from() {
        near(A800X8_70B.prefill_cost.ms(12_000, 0), 1370.0);
        near(A800X8_70B.prefill_cost.ms(128_000, 0), 29_200.0);
        let h200 = H200_8B;
        near(h200.prefill_cost.token_ms, 2.0 * 6.98e9 / 600e12 * 1e3);
        near(h200.prefill_cost.square_ms, 4.0 * 4096.0 * 32.0 / 2.0 / 600e12 * 1e3);
        near(h200.decode_cost.step_ms, 16.06e9 / (0.85 * 4.8e12) * 1e3);
        near(h200.decode_cost.kv_token_ms, h200.kv_bytes_per_token / (0.85 * 4.8e12) * 1e3);
        near(h200.kv_tokens as f64 * h200.kv_bytes_per_token, 0.9 * 141e9 - 16.06e9);
        near(512e3 / CPU_06B.prefill_cost.ms(512, 0), 178.0);
        near(2048e3 / CPU_06B.prefill_cost.ms(2048, 0), 140.0);
        for (sequences, tokens_per_second) in [(1, 20.9), (8, 94.0), (16, 123.0)] {
            let step_ms = CPU_06B.decode_cost.ms(sequences, sequences * 180, 0.0);
            near(sequences as f64 * 1e3 / step_ms, tokens_per_second);
        }
    }
}
