//! [`Pace`]: how fast steps are, and how large one may be.

use std::time::Duration;

/// How long a step should take at most: generating sequences and cancels wait for it to end.
const STEP_TARGET: Duration = Duration::from_millis(50);
/// Fewest prompt tokens of a step beside generating sequences, whatever it takes.
const MIN_PREFILL: usize = 16;
/// Fewest prompt tokens of a step in which nothing generates: matrix products of fewer rows lose much of their speed.
/// So many, too, before any speed is known.
const MIN_PREFILL_ALONE: usize = 64;
/// Measurements lose half of their weight with every so many prompt tokens.
const HALF_LIFE_TOKENS: f64 = 1024.0;
/// Share of the newest decode step in the average.
const DECODE_SHARE: f64 = 0.1;

/// Measured speeds. They change when tokens are computed, never which ones.
#[derive(Debug, Default)]
pub struct Pace {
    /// Prompt tokens and the seconds that they took, older ones with less weight.
    tokens: f64,
    seconds: f64,
    decode_seconds: Option<f64>,
}

impl Pace {
    /// A step of `prefill` prompt tokens and `decode` generating sequences took so long.
    pub fn observe(&mut self, prefill: usize, decode: usize, took: Duration) {
        let took = took.as_secs_f64();
        if prefill == 0 {
            let before = self.decode_seconds.unwrap_or(took);
            self.decode_seconds = Some(before + DECODE_SHARE * (took - before));
            return;
        }
        // A few tokens take as long as many: they say little about the speed of long prompts.
        if prefill < MIN_PREFILL && self.tokens > 0.0 {
            return;
        }
        let decoding = if decode > 0 { self.decode_seconds.unwrap_or(0.0) } else { 0.0 };
        let keep = 0.5_f64.powf(prefill as f64 / HALF_LIFE_TOKENS);
        self.tokens = self.tokens * keep + prefill as f64;
        self.seconds = self.seconds * keep + (took - decoding).max(took / 2.0);
    }

    /// Most prompt tokens of the next step for it to end in time.
    #[must_use]
    pub fn prefill_limit(&self, decoding: bool) -> usize {
        let speed = self.prefill_tokens_per_second();
        if speed == 0.0 {
            return MIN_PREFILL_ALONE;
        }
        let (taken, least) = if decoding {
            (self.decode_seconds.unwrap_or(0.0), MIN_PREFILL)
        } else {
            (0.0, MIN_PREFILL_ALONE)
        };
        let left = (STEP_TARGET.as_secs_f64() - taken).max(0.0);
        ((left * speed) as usize).max(least)
    }

    /// 0 until measured.
    #[must_use]
    pub fn prefill_tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }

    /// 0 until measured.
    #[must_use]
    pub fn decode_step_ms(&self) -> f64 {
        self.decode_seconds.unwrap_or(0.0) * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_settle_below_the_target() {
        // 10 ms for a step, and 0.5 ms for each of its tokens.
        let model = |tokens: usize| Duration::from_secs_f64(0.01 + 0.0005 * tokens as f64);
        let mut pace = Pace::default();
        assert_eq!((pace.prefill_limit(false), pace.decode_step_ms()), (MIN_PREFILL_ALONE, 0.0));
        for _ in 0..200 {
            let tokens = pace.prefill_limit(false);
            pace.observe(tokens, 0, model(tokens));
        }
        let took = model(pace.prefill_limit(false));
        assert!(took <= STEP_TARGET && took >= STEP_TARGET * 8 / 10, "{took:?}");
    }

    #[test]
    fn decoding_sequences_leave_less_time_for_prompts() {
        let mut pace = Pace::default();
        pace.observe(100, 0, Duration::from_millis(100));
        assert_eq!(pace.prefill_limit(true), 50);
        pace.observe(0, 3, Duration::from_millis(20));
        assert_eq!(pace.decode_step_ms(), 20.0);
        assert_eq!((pace.prefill_limit(true), pace.prefill_limit(false)), (30, MIN_PREFILL_ALONE));
        pace.observe(0, 3, Duration::from_millis(20) * 100);
        assert_eq!(pace.prefill_limit(true), MIN_PREFILL, "prompts never starve");
        pace.observe(1, 0, Duration::from_secs(9));
        assert_eq!(pace.prefill_tokens_per_second(), 1000.0, "too few tokens to measure by");
    }
}
