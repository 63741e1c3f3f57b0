//! What one node was asked to do and has not done yet, in milliseconds of its time.
//!
//! A node computes prompts one after the other, so its queue is the time until it will be through
//! with those that it was given: known from what was sent to it, corrected each time it ends one,
//! and by what its reports show beyond that, which others gave it. A prompt that has nearly had its
//! predicted time is not believed to be nearly done: the node's predictions are as wrong as they
//! were lately. Else the next request would be sent to it too early, and be stuck there.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_proto::ids::TransferId;
use baton_proto::message::{BlockCounts, Report};
use baton_proto::share::SharedLoad;

/// A report shows what was sent to the node this long before it arrived.
pub const REPORT_LAG: Duration = Duration::from_millis(50);
const REPORT_LAG_MS: f64 = REPORT_LAG.as_millis() as f64;
/// Promises of this age are in the reports to every coordinator.
const SHARED_MS: f64 = 1000.0;

/// More work of others than this is not believed: a day.
const MAX_FOREIGN_MS: f64 = 86_400_000.0;

/// How much the last prediction counts in how wrong they are.
const ERROR_WEIGHT: f64 = 0.05;

/// One attempt's demand on one node. Times are milliseconds of the caller's clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Work {
    /// Tokens of the sequence when it was sent.
    pub(super) tokens: usize,
    /// How many of them were cached, to all that is known.
    pub(super) cached: usize,
    /// Predicted time to compute the others here; 0 if somebody else does.
    pub(super) prefill_ms: f64,
    /// Blocks that it will hold here.
    pub(super) blocks: u64,
}

#[derive(Clone, Copy, Debug)]
struct Promised {
    work: Work,
    sent: f64,
    /// The prompt is still to be computed here.
    computing: bool,
    /// The last report includes it.
    reported: bool,
}

/// A node's load. Pure.
#[derive(Clone, Debug, Default)]
pub(super) struct Load {
    promised: BTreeMap<TransferId, Promised>,
    /// Whose prompt it computes, since when, and the time predicted for that.
    running: Option<TransferId>,
    since: f64,
    running_ms: f64,
    /// Predicted time of the prompts that it computes after that.
    behind_ms: f64,
    /// Share of a predicted time by which predictions were wrong lately, on average; at most 1.
    error: f64,
    /// Prompts promised and not computed.
    prompts: u32,
    /// Predicted time of work that others gave it, at the last report.
    foreign_ms: f64,
    report_at: f64,
    /// Of the last report.
    reported_sequences: u32,
    reported_room: u64,
    reported_kv_blocks: u64,
    /// Promised since.
    new_sequences: u32,
    new_blocks: u64,
}

impl Load {
    /// The load of a node that has `room` free blocks and nothing to do.
    #[must_use]
    pub(super) fn idle(room: u64) -> Self {
        Self { reported_room: room, ..Self::default() }
    }

    /// The node is asked for this.
    pub(super) fn promise(&mut self, id: TransferId, work: Work, now: f64) {
        let computing = work.prefill_ms > 0.0;
        if computing {
            self.prompts += 1;
            match self.running {
                Some(_) => self.behind_ms += work.prefill_ms,
                None => {
                    (self.running, self.since, self.running_ms) = (Some(id), now, work.prefill_ms)
                }
            }
        }
        self.new_sequences += 1;
        self.new_blocks += work.blocks;
        let promised = Promised { work, sent: now, computing, reported: false };
        self.promised.insert(id, promised);
    }

    /// The node found so many of the attempt's tokens cached. Returns what is known of it now.
    pub(super) fn started(&mut self, id: TransferId, cached: usize) -> Option<Work> {
        let promised = self.promised.get_mut(&id)?;
        promised.work.cached = cached.min(promised.work.tokens.saturating_sub(1));
        Some(promised.work)
    }

    /// The node has computed the attempt's prompt. Returns what was promised, the first time.
    pub(super) fn prefilled(&mut self, id: TransferId, now: f64) -> Option<Work> {
        if self.running == Some(id) {
            let error = ((now - self.since) / self.running_ms - 1.0).abs().min(1.0);
            self.error += ERROR_WEIGHT * (error - self.error);
        }
        self.through(id, now)
    }

    /// The node does not compute the attempt's prompt any more.
    fn through(&mut self, id: TransferId, now: f64) -> Option<Work> {
        let promised = self.promised.get_mut(&id).filter(|promised| promised.computing)?;
        promised.computing = false;
        let work = promised.work;
        self.prompts -= 1;
        if self.running != Some(id) {
            self.behind_ms -= work.prefill_ms;
            return Some(work);
        }
        let left = self.promised.iter().filter(|(_, promised)| promised.computing);
        let next = left.clone().min_by(|(_, one), (_, other)| one.sent.total_cmp(&other.sent));
        // Whatever the last one took, the next starts now.
        self.since = now;
        self.running = next.map(|(&id, _)| id);
        self.running_ms = next.map_or(0.0, |(_, promised)| promised.work.prefill_ms);
        let all: f64 = left.map(|(_, promised)| promised.work.prefill_ms).sum();
        self.behind_ms = all - self.running_ms;
        Some(work)
    }

    /// The node has nothing to do with the attempt any more.
    pub(super) fn ended(&mut self, id: TransferId, now: f64) {
        self.through(id, now);
        if let Some(promised) = self.promised.remove(&id)
            && !promised.reported
        {
            self.new_sequences -= 1;
            self.new_blocks -= promised.work.blocks;
        }
    }

    /// The node's own view replaces ours for all that it can know of. `foreign_token_ms`: its time
    /// for a token that others gave it; 0 if there are no others.
    pub(super) fn report(&mut self, report: &Report, foreign_token_ms: f64, now: f64) {
        let mut own = 0.0;
        for promised in self.promised.values_mut() {
            if promised.sent + REPORT_LAG_MS > now {
                continue;
            }
            if !promised.reported {
                promised.reported = true;
                self.new_sequences -= 1;
                self.new_blocks -= promised.work.blocks;
            }
            if promised.computing {
                own += (promised.work.tokens - promised.work.cached) as f64;
            }
        }
        let foreign = (report.queued_tokens as f64 - own).max(0.0) * foreign_token_ms;
        self.foreign_ms = foreign.min(MAX_FOREIGN_MS);
        self.report_at = now;
        self.reported_sequences = report.running.saturating_add(report.waiting);
        if report.blocks != BlockCounts::default() {
            let unused = report.blocks.free.saturating_add(report.blocks.cached);
            self.reported_room = unused.saturating_sub(report.waiting_blocks);
        }
        self.reported_kv_blocks = report.blocks.active.saturating_add(report.blocks.leased);
    }

    /// Promises that a report of the node to another coordinator may not show yet, and when they
    /// were made.
    pub(super) fn recent(&self, now: f64) -> impl Iterator<Item = (f64, SharedLoad)> {
        let recent =
            self.promised.values().filter(move |p| !p.reported || p.sent + SHARED_MS > now);
        recent.map(|&Promised { work, sent, computing, .. }| {
            let tokens = if computing { (work.tokens - work.cached) as u64 } else { 0 };
            let prefill_ms = if computing { work.prefill_ms } else { 0.0 };
            (sent, SharedLoad { prefill_ms, tokens, blocks: work.blocks, sequences: 1 })
        })
    }

    /// Time until the node is through with the prompts that it was given.
    #[must_use]
    pub(super) fn queue_ms(&self, now: f64) -> f64 {
        let foreign = (self.foreign_ms - (now - self.report_at)).max(0.0);
        if self.running.is_none() {
            return foreign;
        }
        let ran = now - self.since;
        let left = self.running_ms - ran;
        // What takes longer than predicted takes, as a rule, as long again as it is late.
        let late = (-left).min(ran);
        let unsure = self.error * self.running_ms;
        left.max(late).max(unsure) + self.behind_ms.max(0.0) + foreign
    }

    /// Prompts promised and not computed.
    #[must_use]
    pub(super) fn prompts(&self) -> u32 {
        self.prompts
    }

    /// Sequences on the node, or on their way to it.
    #[must_use]
    pub(super) fn sequences(&self) -> u32 {
        self.reported_sequences.saturating_add(self.new_sequences)
    }

    /// Blocks that no sequence uses or was promised.
    #[must_use]
    pub(super) fn room(&self) -> u64 {
        self.reported_room.saturating_sub(self.new_blocks)
    }

    /// Blocks that sequences use or were promised.
    #[must_use]
    pub(super) fn kv_blocks(&self) -> u64 {
        self.reported_kv_blocks.saturating_add(self.new_blocks)
    }

    /// Whether nothing is promised.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.promised.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::ids::RequestId;

    use super::*;

    fn id(request: u128) -> TransferId {
        TransferId { request: RequestId(request), attempt: 1 }
    }

    fn work(prefill_ms: f64) -> Work {
        Work { tokens: 100, cached: 0, prefill_ms, blocks: 7 }
    }

    #[test]
    fn the_queue_drains_with_time_and_is_corrected_by_what_happens() {
        let mut load = Load::idle(100);
        load.promise(id(1), work(100.0), 0.0);
        load.promise(id(2), work(50.0), 10.0);
        assert_eq!(load.queue_ms(10.0), 140.0);
        assert_eq!(load.queue_ms(60.0), 90.0);
        // The first was faster than predicted.
        assert!(load.prefilled(id(1), 80.0).is_some());
        assert!(load.prefilled(id(1), 80.0).is_none());
        assert_eq!(load.queue_ms(80.0), 50.0);
        // The second is late: as long again.
        assert_eq!(load.queue_ms(150.0), 20.0);
        load.ended(id(2), 160.0);
        load.ended(id(1), 160.0);
        assert_eq!(load.queue_ms(160.0), 0.0);
        assert!(load.is_empty());
    }

    #[test]
    fn a_node_whose_predictions_are_wrong_is_not_believed_to_be_nearly_done() {
        let mut load = Load::idle(100);
        for n in 0..100_u32 {
            let start = f64::from(n) * 1000.0;
            load.promise(id(n.into()), work(100.0), start);
            load.prefilled(id(n.into()), start + if n % 2 == 0 { 50.0 } else { 150.0 });
        }
        load.promise(id(100), work(100.0), 100_000.0);
        load.promise(id(101), work(30.0), 100_000.0);
        assert_eq!(load.queue_ms(100_020.0), 110.0, "80 and 30");
        let unsure = load.queue_ms(100_090.0);
        assert!((75.0..85.0).contains(&unsure), "half of 100, and 30: {unsure}");
        // One that was stopped says nothing of predictions, and its successor begins.
        load.ended(id(100), 100_090.0);
        assert_eq!(load.queue_ms(100_090.0), 30.0);
    }

    #[test]
    fn one_that_waits_and_is_stopped_takes_no_time_from_the_one_that_runs() {
        let mut load = Load::idle(100);
        load.promise(id(1), work(100.0), 0.0);
        load.promise(id(2), work(50.0), 0.0);
        load.ended(id(2), 60.0);
        assert_eq!(load.queue_ms(60.0), 40.0);
    }

    #[test]
    fn blocks_count_once_before_and_after_the_report_that_shows_them() {
        let mut load = Load::idle(100);
        load.promise(id(1), work(0.0), 0.0);
        assert_eq!((load.room(), load.sequences(), load.kv_blocks()), (93, 1, 7));
        let blocks = BlockCounts { free: 100, ..BlockCounts::default() };
        // This report left the node before the work arrived there.
        load.report(&Report { blocks, ..Report::default() }, 1.0, 1.0);
        assert_eq!((load.room(), load.sequences(), load.kv_blocks()), (93, 1, 7));
        let blocks = BlockCounts { free: 93, active: 7, ..BlockCounts::default() };
        let report = Report { blocks, running: 1, ..Report::default() };
        load.report(&report, 1.0, REPORT_LAG_MS);
        assert_eq!((load.room(), load.sequences(), load.kv_blocks()), (93, 1, 7));
        load.ended(id(1), 60.0);
        assert_eq!(load.room(), 93, "the next report says that they are free");
    }

    #[test]
    fn what_others_gave_the_node_counts_until_it_is_done() {
        let mut load = Load::idle(100);
        load.promise(id(1), work(100.0), 0.0);
        let report = Report { queued_tokens: 150, ..Report::default() };
        load.report(&report, 2.0, 50.0);
        assert_eq!(load.queue_ms(50.0), 50.0 + 100.0);
        assert_eq!(load.queue_ms(100.0), 50.0);
        assert_eq!(load.queue_ms(150.0), 50.0, "late by 50, and nothing foreign is left");
        load.report(&Report { queued_tokens: u64::MAX, ..Report::default() }, 2.0, 150.0);
        assert!(load.queue_ms(150.0) <= 50.0 + MAX_FOREIGN_MS, "what cannot be is not believed");
    }
}
