//! Times of many decisions.

use std::time::Duration;

use serde_json::{Value, json};

use super::Figure;

/// Times, to be summed up.
#[derive(Default)]
pub(super) struct Times(Vec<Duration>);

impl Times {
    pub(super) fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Mean and quantiles, in microseconds.
    pub(super) fn figure(mut self, key: &'static str) -> Figure {
        self.0.sort_unstable();
        let us = |time: Duration| (time.as_secs_f64() * 1e7).round() / 10.0;
        let at = |share: f64| {
            let rank = (share * self.0.len() as f64).ceil() as usize;
            us(self.0.get(rank.saturating_sub(1)).copied().unwrap_or_default())
        };
        let mean = us(self.0.iter().sum::<Duration>() / self.0.len().max(1) as u32);
        let (p50, p99, p999, max) = (at(0.5), at(0.99), at(0.999), at(1.0));
        let value: Value =
            json!({ "mean": mean, "p50": p50, "p99": p99, "p999": p999, "max": max });
        let words = format!("mean {mean}, p50 {p50}, p99 {p99}, p99.9 {p999}, longest {max} µs");
        Figure { key, value, words }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let mut times = Times::default();
        (1..=1000).rev().for_each(|us| times.add(Duration::from_micros(us)));
        let value = times.figure("x").value;
        let expected =
            json!({ "mean": 500.5, "p50": 500.0, "p99": 990.0, "p999": 999.0, "max": 1000.0 });
        assert_eq!(value, expected);
    }
}
