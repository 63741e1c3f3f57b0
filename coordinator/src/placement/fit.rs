//! What a node's speed is, learnt from what it measures.
//!
//! Prefill: `S = a + b (L - m) + c (L^2 - m^2)` milliseconds for a prompt of `L` tokens of which `m`
//! are cached. Decode: `T = d0 + d1 B + d2 K` milliseconds per step with `B` sequences that hold
//! `K` tokens. Both are linear in three coefficients, fitted by recursive least squares with
//! forgetting (Ljung, System Identification, 2nd ed., section 11.2), in relative error, so that a
//! long prompt does not outweigh a hundred short ones.

/// How much of what was learnt is kept per observation.
const KEEP: f64 = 0.99;
/// Variances of the coefficients, relative to their priors, before anything was observed. The
/// constant one may be anything: starting costs differ more between machines than proportions do.
const FIRST_VARIANCE: [f64; 3] = [1e4, 1.0, 4.0];
/// Least predicted duration, and the longest that is believed.
const LEAST_MS: f64 = 0.01;
const MOST_MS: f64 = 1e8;
/// Once so much was observed, one more moves a prediction as if it were at most so many times as
/// long, or as short.
const SETTLED: u32 = 32;
const MOST_SURPRISE: f64 = 8.0;
/// From so many observations on, what was learnt is more than a guess.
const LEAST_OBSERVATIONS: u32 = 3;

/// A duration that is linear in three known quantities.
#[derive(Clone, Debug)]
pub struct Fit {
    /// Coefficients at the start; none is 0.
    prior: [f64; 3],
    /// Factors of them.
    factors: [f64; 3],
    covariance: [[f64; 3]; 3],
    observations: u32,
}

impl Fit {
    /// A fit that predicts from `prior` until it has observed something. No coefficient may be 0.
    #[must_use]
    pub fn new(prior: [f64; 3]) -> Self {
        let mut covariance = [[0.0; 3]; 3];
        (0..3).for_each(|at| covariance[at][at] = FIRST_VARIANCE[at]);
        Self { prior, factors: [1.0; 3], covariance, observations: 0 }
    }

    /// Observations so far.
    #[must_use]
    pub fn observations(&self) -> u32 {
        self.observations
    }

    /// Whether it is worth more than a guess.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.observations >= LEAST_OBSERVATIONS
    }

    /// The three coefficients, none negative.
    #[must_use]
    pub fn coefficients(&self) -> [f64; 3] {
        [0, 1, 2].map(|at| self.prior[at] * self.factors[at])
    }

    /// Milliseconds for these quantities.
    #[must_use]
    pub fn predict(&self, quantities: [f64; 3]) -> f64 {
        let [a, b, c] = self.coefficients();
        (a * quantities[0] + b * quantities[1] + c * quantities[2]).max(LEAST_MS)
    }

    /// These quantities took `ms`.
    pub fn observe(&mut self, quantities: [f64; 3], ms: f64) {
        let expected = self.predict(quantities);
        if !(ms > 0.0 && ms <= MOST_MS && expected <= MOST_MS) {
            return;
        }
        if self.observations == 0 {
            // The prior knows proportions at best, and nothing of this machine.
            self.prior = self.prior.map(|coefficient| coefficient * ms / expected);
        }
        self.observations = self.observations.saturating_add(1);
        let most = if self.observations > SETTLED { MOST_SURPRISE } else { f64::INFINITY };
        let ms = ms.clamp(expected / most, expected * most);
        let expected = self.predict(quantities);
        let mut row = [0, 1, 2].map(|at| self.prior[at] * quantities[at] / expected);
        let (spread, denominator) = loop {
            let spread = self.covariance.map(|line| dot(line, row));
            let denominator = KEEP + dot(spread, row);
            let error = ms / expected - dot(self.factors, row);
            let after = [0, 1, 2].map(|at| self.factors[at] + spread[at] * error / denominator);
            // No machine has a negative coefficient. One that would become negative takes no part:
            // else it would make up for what the others have wrong, and they would learn nothing.
            if let Some(at) = (0..3).find(|&at| after[at] < 0.0 && row[at] != 0.0) {
                (self.factors[at], row[at]) = (0.0, 0.0);
                continue;
            }
            self.factors = after.map(|factor| factor.max(0.0));
            break (spread, denominator);
        };
        let old = self.covariance;
        for (line, row) in self.covariance.iter_mut().enumerate() {
            for (column, value) in row.iter_mut().enumerate() {
                *value = (old[line][column] - spread[line] * spread[column] / denominator) / KEEP;
            }
        }
        self.bound();
    }

    /// Forgetting lets the variance of what is never excited grow without end.
    fn bound(&mut self) {
        for (at, most) in FIRST_VARIANCE.into_iter().enumerate() {
            if self.covariance[at][at] > most {
                let shrink = (most / self.covariance[at][at]).sqrt();
                for other in 0..3 {
                    self.covariance[at][other] *= shrink;
                    self.covariance[other][at] *= shrink;
                }
            }
        }
    }
}

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// The quantities of a prefill of `tokens` tokens, `cached` of them found in a cache.
#[must_use]
pub fn prefill(tokens: usize, cached: usize) -> [f64; 3] {
    let (all, cached) = (tokens as f64, cached as f64);
    [1.0, all - cached, all * all - cached * cached]
}

/// The quantities of a decode step.
#[must_use]
pub fn step(sequences: f64, kv_tokens: f64) -> [f64; 3] {
    [1.0, sequences, kv_tokens]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PRIOR: [f64; 3] = [1.0, 0.5, 1.5e-5];

    fn truth([a, b, c]: [f64; 3], q: [f64; 3]) -> f64 {
        a * q[0] + b * q[1] + c * q[2]
    }

    proptest! {
        #[test]
        fn learns_any_machine_from_what_it_does(
            a in 0.1..50.0_f64, b in 0.002..2.0_f64, parity in 2e3..1e5_f64,
        ) {
            let machine = [a, b, b / (2.0 * parity)];
            let mut fit = Fit::new(PRIOR);
            // From 16 to 60,000 tokens, evenly in the logarithm, up to nine tenths of them cached.
            let prompts = (0..300_usize).map(|n| {
                let tokens = (16.0 * 3750.0_f64.powf((n * 7 % 60) as f64 / 59.0)) as usize;
                prefill(tokens, tokens * (n % 10) / 10)
            });
            prompts.clone().for_each(|q| fit.observe(q, truth(machine, q)));
            for q in prompts {
                let (is, should) = (fit.predict(q), truth(machine, q));
                prop_assert!((is / should).max(should / is) < 1.1, "{is} instead of {should}");
            }
        }

        #[test]
        fn stays_finite_and_positive_whatever_it_is_told(
            told in proptest::collection::vec((0..1_000_000_usize, any::<f64>()), 0..200),
        ) {
            let mut fit = Fit::new(PRIOR);
            for (tokens, ms) in told {
                fit.observe(prefill(tokens, 0), ms);
                let predicted = fit.predict(prefill(1000, 0));
                prop_assert!(predicted.is_finite() && predicted > 0.0);
            }
        }
    }

    #[test]
    fn a_first_measurement_that_was_far_off_does_not_last() {
        let mut fit = Fit::new(PRIOR);
        fit.observe(prefill(100, 0), 5000.0);
        (0..30).for_each(|_| fit.observe(prefill(100, 0), 10.0));
        assert!(fit.predict(prefill(100, 0)) < 20.0, "{fit:?}");
    }

    #[test]
    fn follows_a_machine_that_becomes_slower() {
        let mut fit = Fit::new(PRIOR);
        let lengths = (1..).map(|n| prefill(100 + n * 617 % 9000, 0));
        for q in lengths.clone().take(500) {
            fit.observe(q, truth([5.0, 0.1, 1e-6], q));
        }
        for q in lengths.take(500) {
            fit.observe(q, truth([10.0, 0.2, 2e-6], q));
        }
        let q = prefill(4000, 0);
        let ratio = fit.predict(q) / truth([10.0, 0.2, 2e-6], q);
        assert!((0.95..1.05).contains(&ratio), "{ratio}");
    }
}
