//! What a replay showed.

use super::Settings;
use crate::trace::Trace;

/// What became of every request, in the order of the trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// One each.
    pub records: Vec<Record>,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Record {
    /// When it came.
    pub arrival_ms: f64,
    /// Whether it was refused.
    pub refused: bool,
    /// Whether a prefill node computed it.
    pub remote: bool,
    /// Full blocks that were there when the prefill began, pulled ones included.
    pub cached_blocks: u32,
    /// Tokens that were not computed.
    pub cached_tokens: u32,
    /// Tokens fetched from another node for the prefill.
    pub pulled_tokens: u32,
    /// Tokens handed over to the decode node.
    pub moved_tokens: u32,
    /// When its first token was out.
    pub first_token_ms: Option<f64>,
    /// When its last token was out.
    pub end_ms: Option<f64>,
}

/// The figures that a replay is judged by.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Requests in the trace.
    pub requests: usize,
    /// Of them served to the end.
    pub completed: usize,
    /// Of them refused.
    pub rejected: usize,
    /// Share of the served prompts' blocks that were cached, partial blocks counted as asked for.
    pub hit_blocks_ratio: f64,
    /// Share of the served prompts' tokens that were not computed.
    pub hit_tokens_ratio: f64,
    /// Time to first token.
    pub ttft_ms: Distribution,
    /// Mean time per output token after the first, of each request with more than one.
    pub tpot_ms: Distribution,
    /// Share of the served prompts that prefill nodes computed.
    pub remote_ratio: f64,
    /// Share of the served prompts' tokens that were handed over to a decode node.
    pub kv_moved_ratio: f64,
    /// Share of the served prompts' tokens that were pulled; only where pulls are possible.
    pub pulled_ratio: Option<f64>,
    /// Share of the served requests that met the deadline; only with one.
    pub met_deadline: Option<f64>,
}

/// Of a sample; all 0 if it is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distribution {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Record {
    /// Time to first token.
    #[must_use]
    pub fn ttft_ms(&self) -> Option<f64> {
        Some(self.first_token_ms? - self.arrival_ms)
    }

    /// Mean time per token after the first.
    #[must_use]
    pub fn tpot_ms(&self, output_tokens: u32) -> Option<f64> {
        let steps = output_tokens.checked_sub(1).filter(|&steps| steps > 0)?;
        Some((self.end_ms? - self.first_token_ms?) / f64::from(steps))
    }
}

impl Outcome {
    /// The figures.
    #[must_use]
    pub fn summary(&self, settings: &Settings, trace: &Trace) -> Summary {
        let all = self.records.iter().zip(&trace.requests);
        let served: Vec<_> = all.filter(|(record, _)| record.end_ms.is_some()).collect();
        let ttft: Vec<f64> = served.iter().filter_map(|(record, _)| record.ttft_ms()).collect();
        let tpot = served.iter().filter_map(|(record, r)| record.tpot_ms(r.output_tokens));
        let tpot = if settings.decode_nodes > 0 { tpot.collect() } else { Vec::new() };
        let sum = |value: &dyn Fn(&Record) -> u32| {
            served.iter().map(|(record, _)| f64::from(value(record))).sum::<f64>()
        };
        let (mut tokens, mut blocks) = (0.0, 0.0);
        for (_, request) in &served {
            tokens += f64::from(request.input_tokens);
            blocks += f64::from(request.input_tokens.div_ceil(trace.block_tokens));
        }
        let met = |deadline| {
            let met = ttft.iter().filter(|&&ttft| ttft <= deadline).count();
            ratio(met as f64, served.len() as f64)
        };
        Summary {
            requests: self.records.len(),
            completed: served.len(),
            rejected: self.records.iter().filter(|record| record.refused).count(),
            hit_blocks_ratio: ratio(sum(&|record| record.cached_blocks), blocks),
            hit_tokens_ratio: ratio(sum(&|record| record.cached_tokens), tokens),
            ttft_ms: Distribution::of(ttft.clone()),
            tpot_ms: Distribution::of(tpot),
            remote_ratio: ratio(sum(&|record| record.remote.into()), served.len() as f64),
            kv_moved_ratio: ratio(sum(&|record| record.moved_tokens), tokens),
            pulled_ratio: settings.link.map(|_| ratio(sum(&|r| r.pulled_tokens), tokens)),
            met_deadline: settings.deadline_ms.map(met),
        }
    }
}

impl Distribution {
    /// Sorts and looks, with linear interpolation between ranks.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let Some(last) = values.len().checked_sub(1) else { return Self::default() };
        let percentile = |share: f64| {
            let place = share * last as f64;
            let below = place as usize;
            let above = (below + 1).min(last);
            values[below] + (place - below as f64) * (values[above] - values[below])
        };
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(0.5),
            p90: percentile(0.9),
            p99: percentile(0.99),
        }
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
