//! Requests as operators see them: those that ended or were refused lately are kept.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::ids::{NodeId, RequestId};

use crate::core::{Timings, Usage};
use crate::decision::Decision;
use crate::placement::Class;

/// Requests kept that ended.
pub const MOST_ENDED: usize = 1024;
/// Requests kept that were refused: apart, so that a flood of them hides none that ran.
pub const MOST_REFUSED: usize = 256;
/// Failures kept of one request, the last ones.
pub const MOST_FAILURES: usize = 8;
/// Percentiles are of requests that ended within this time, as far as they are kept.
pub const RECENT: Duration = Duration::from_secs(60);

/// How far a request is, or how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// No node can take it; it is tried again.
    NoNodes,
    /// Waits here for its turn on a node.
    Queued,
    /// On nodes, and the first token of this attempt is not there.
    Prefill,
    /// Tokens come.
    Decode,
    /// Ended with its result.
    Finished,
    /// Ended without.
    Failed,
    /// Its client, or an operator, wanted no more.
    Cancelled,
    /// Was not taken in.
    Refused,
}

impl Stage {
    /// Its name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoNodes => "no_nodes",
            Self::Queued => "queued",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
        }
    }
}

/// One request, running or ended.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestView {
    /// Its name.
    pub id: RequestId,
    /// Its model.
    pub model: String,
    /// Whose it is; empty if it names nobody.
    pub tenant: Arc<str>,
    /// How urgent.
    pub class: Class,
    /// How far it is, or how it ended.
    pub stage: Stage,
    /// Who computes the prompt; `None`: the decode node, or nobody yet.
    pub prefill: Option<NodeId>,
    /// Who generates the tokens.
    pub decode: Option<NodeId>,
    /// Attempts so far.
    pub attempts: u32,
    /// Tokens so far.
    pub usage: Usage,
    /// Times so far.
    pub timings: Timings,
    /// From its arrival to its last attempt's start: the part of [`Timings::queue`] spent here.
    pub held: Duration,
    /// When it arrived.
    pub arrived: Instant,
    /// When it ended.
    pub ended: Option<Instant>,
    /// Why it failed or was refused.
    pub error: Option<String>,
}

/// One request, and what explains its course.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// As in a list.
    pub view: RequestView,
    /// How its last attempt was placed.
    pub decision: Option<Decision>,
    /// Why attempts failed, the last [`MOST_FAILURES`].
    pub failures: Vec<String>,
}

/// The first hexadecimal digits of a request's id, or all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdPrefix {
    low: u128,
    high: u128,
}

impl IdPrefix {
    const DIGITS: usize = 32;

    /// 1 to 32 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = (1..=Self::DIGITS).contains(&text.len());
        if !digits || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        let number = u128::from_str_radix(text, 16).ok()?;
        let open_bits = 4 * (Self::DIGITS - text.len()) as u32;
        let low = number << open_bits;
        Some(Self { low, high: low | ((1_u128 << open_bits) - 1) })
    }

    /// The ids that begin so.
    #[must_use]
    pub fn range(self) -> std::ops::RangeInclusive<RequestId> {
        RequestId(self.low)..=RequestId(self.high)
    }
}

/// No single request is meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// None that runs, or that is still remembered.
    #[error("no request of that id runs or is remembered")]
    Unknown,
    /// Several begin so.
    #[error("several requests begin with these digits; give more of them")]
    Ambiguous,
    /// It cannot be cancelled any more.
    #[error("request {0} has ended")]
    Ended(RequestId),
    /// The coordinator is going down.
    #[error("the coordinator is shutting down")]
    ShuttingDown,
}

/// The middle and the slow end of some times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// Half took at most this.
    pub p50: Duration,
    /// 95 of 100 took at most this.
    pub p95: Duration,
    /// 99 of 100 took at most this.
    pub p99: Duration,
}

impl Percentiles {
    /// Of these times, by nearest rank; zeros of none.
    #[must_use]
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100);
            times.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: at(50), p95: at(95), p99: at(99) }
    }
}

/// How requests went that finished lately.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recent {
    /// How many are counted.
    pub requests: usize,
    /// Arrival to first token.
    pub first_token: Percentiles,
    /// Between two tokens, on average in each request of at least two.
    pub per_token: Percentiles,
}

/// See the module's description.
#[derive(Debug, Default)]
pub struct History {
    ended: VecDeque<Record>,
    refused: VecDeque<Record>,
}

impl History {
    /// A request ended, or was refused.
    pub fn push(&mut self, record: Record) {
        let (ring, most) = match record.view.stage {
            Stage::Refused => (&mut self.refused, MOST_REFUSED),
            _ => (&mut self.ended, MOST_ENDED),
        };
        if ring.len() == most {
            ring.pop_front();
        }
        ring.push_back(record);
    }

    /// All that are kept, each kind the newest first.
    pub fn latest(&self) -> impl Iterator<Item = &Record> {
        self.ended.iter().rev().chain(self.refused.iter().rev())
    }

    /// How requests went that finished within [`RECENT`].
    #[must_use]
    pub fn recent(&self, now: Instant) -> Recent {
        let fresh = |record: &&Record| {
            record.view.ended.is_some_and(|ended| now.saturating_duration_since(ended) < RECENT)
        };
        let (mut first_token, mut per_token) = (Vec::new(), Vec::new());
        for Record { view, .. } in self.ended.iter().rev().take_while(fresh) {
            if view.stage != Stage::Finished || view.usage.completion_tokens == 0 {
                continue;
            }
            let times = &view.timings;
            first_token.push(times.first_token);
            if view.usage.completion_tokens > 1 {
                let rest = times.total.saturating_sub(times.first_token);
                per_token.push(rest / (view.usage.completion_tokens - 1));
            }
        }
        Recent {
            requests: first_token.len(),
            first_token: Percentiles::of(first_token),
            per_token: Percentiles::of(per_token),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u128, stage: Stage, now: Instant) -> Record {
        let view = RequestView {
            id: RequestId(id),
            model: "demo".to_owned(),
            tenant: "".into(),
            class: Class::Standard,
            stage,
            prefill: None,
            decode: None,
            attempts: 1,
            usage: Usage { completion_tokens: 3, ..Usage::default() },
            timings: Timings {
                first_token: Duration::from_millis(id as u64),
                total: Duration::from_millis(id as u64 + 20),
                ..Timings::default()
            },
            held: Duration::ZERO,
            arrived: now,
            ended: Some(now),
            error: None,
        };
        Record { view, decision: None, failures: Vec::new() }
    }

    #[test]
    fn refusals_drive_out_no_request_that_ran() {
        let (mut history, now) = (History::default(), Instant::now());
        history.push(record(1, Stage::Finished, now));
        (0..5000).for_each(|id| history.push(record(id, Stage::Refused, now)));
        assert_eq!(history.latest().count(), 1 + MOST_REFUSED);
        (2..5000).for_each(|id| history.push(record(id, Stage::Failed, now)));
        assert_eq!(history.latest().count(), MOST_ENDED + MOST_REFUSED);
        assert_eq!(history.latest().next().map(|record| record.view.id), Some(RequestId(4999)));
    }

    #[test]
    fn percentiles_are_of_what_finished_lately() {
        let (mut history, start) = (History::default(), Instant::now());
        history.push(record(9000, Stage::Finished, start));
        let now = start + RECENT;
        (1..=100).for_each(|id| history.push(record(id, Stage::Finished, now)));
        history.push(record(7000, Stage::Failed, now));
        let recent = history.recent(now);
        let ms = Duration::from_millis;
        assert_eq!(recent.requests, 100);
        let wanted = Percentiles { p50: ms(50), p95: ms(95), p99: ms(99) };
        assert_eq!(recent.first_token, wanted);
        assert_eq!(recent.per_token.p99, ms(10));
        assert_eq!(history.recent(now + RECENT), Recent::default());
    }

    #[test]
    fn a_prefix_is_a_range_of_ids() {
        let range = |text| IdPrefix::parse(text).map(IdPrefix::range);
        let id = |number| RequestId(number);
        assert_eq!(range("00ff"), Some(id(0xff << 112)..=id((0x100 << 112) - 1)));
        let all = "0123456789abcdef0123456789ABCDEF";
        let number = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef;
        assert_eq!(range(all), Some(id(number)..=id(number)));
        assert_eq!(range("0").map(|range| *range.end()), Some(id(u128::MAX >> 4)));
        for wrong in ["", "x", "+1", &format!("{all}0")] {
            assert_eq!(range(wrong), None, "{wrong:?}");
        }
    }
}
