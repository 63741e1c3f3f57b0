//! How long modelled devices take.

/// Time of a prefill of `L` tokens of which `m` are cached: `a + b (L - m) + c (L^2 - m^2)`.
///
/// The quadratic term is attention: token `i` attends to `i` tokens before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillCost {
    /// `a`, milliseconds.
    pub start_ms: f64,
    /// `b`, milliseconds per token.
    pub token_ms: f64,
    /// `c`, milliseconds per squared token.
    pub square_ms: f64,
}

/// Time of a decode step with `B` sequences that hold `K` tokens of KV and a chunk of prompt:
/// `max(d0, chunk) + d1 B + d2 K`. Computing the chunk hides behind reading the weights, or the
/// other way round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeCost {
    /// `d0`, milliseconds.
    pub step_ms: f64,
    /// `d1`, milliseconds per sequence.
    pub sequence_ms: f64,
    /// `d2`, milliseconds per token of KV.
    pub kv_token_ms: f64,
}

impl PrefillCost {
    /// Milliseconds for a prompt of which the first `cached` tokens are there.
    #[must_use]
    pub fn ms(&self, tokens: u32, cached: u32) -> f64 {
        self.start_ms + self.compute_ms(tokens, cached)
    }

    /// The same without the fixed part, which a chunk within a running batch does not have.
    #[must_use]
    pub fn compute_ms(&self, tokens: u32, cached: u32) -> f64 {
        let (tokens, cached) = (f64::from(tokens), f64::from(cached));
        self.token_ms * (tokens - cached) + self.square_ms * (tokens * tokens - cached * cached)
    }
}

impl DecodeCost {
    /// Milliseconds of a step.
    #[must_use]
    pub fn ms(&self, sequences: u64, kv_tokens: u64, chunk_ms: f64) -> f64 {
        let batch = self.sequence_ms * sequences as f64 + self.kv_token_ms * kv_tokens as f64;
        self.step_ms.max(chunk_ms) + batch
    }

    /// Milliseconds of `steps` steps in a row in which every sequence grows by a token each.
    #[must_use]
    pub fn steps_ms(&self, steps: u64, sequences: u64, kv_tokens: u64) -> f64 {
        let n = steps as f64;
        let growth = self.kv_token_ms * sequences as f64 * n * (n - 1.0) / 2.0;
        n * self.ms(sequences, kv_tokens, 0.0) + growth
    }

    /// How many of them end within `ms`.
    #[must_use]
    pub fn steps_within(&self, ms: f64, sequences: u64, kv_tokens: u64) -> u64 {
        // n first + growth n (n - 1) / 2 = ms
        let growth = self.kv_token_ms * sequences as f64;
        let linear = self.ms(sequences, kv_tokens, 0.0) - growth / 2.0;
        let root = (linear * linear + 2.0 * growth * ms).sqrt();
        let steps = (2.0 * ms / (linear + root)).floor() as u64;
        // Rounding may be one step off.
        let ends = |n: u64| self.steps_ms(n, sequences, kv_tokens) <= ms;
        if ends(steps + 1) {
            steps + 1
        } else if ends(steps) {
            steps
        } else {
            steps.saturating_sub(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_add_up() {
        let cost = DecodeCost { step_ms: 18.0, sequence_ms: 0.1, kv_token_ms: 0.000_029 };
        let (mut kv, mut sum) = (50_000, 0.0);
        for n in 1..500_u64 {
            sum += cost.ms(40, kv, 0.0);
            kv += 40;
            assert!((cost.steps_ms(n, 40, 50_000) - sum).abs() < 1e-6);
            assert_eq!(cost.steps_within(sum + 1e-6, 40, 50_000), n);
            assert_eq!(cost.steps_within(sum - 1e-6, 40, 50_000), n - 1);
        }
    }

    #[test]
    fn chunks_add_up_to_the_prompt() {
        let cost = PrefillCost { start_ms: 20.0, token_ms: 0.1, square_ms: 1e-6 };
        let parts = cost.compute_ms(512, 100) + cost.compute_ms(900, 512);
        assert!((cost.ms(900, 100) - 20.0 - parts).abs() < 1e-9);
        assert!((cost.ms(128_000, 0) - 29_204.0).abs() < 1e-6);
    }
}
