//! What happened in the cluster lately, numbered, so that a reader can go on where it was.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use baton_proto::ids::{NodeId, RequestId, Role};
use baton_proto::message::Report;

/// Events that are kept; a reader that is further behind is told what it missed.
pub const MOST_EVENTS: usize = 4096;
/// Refusals for the same reason are one event per this time.
const REFUSALS_EVERY: Duration = Duration::from_secs(1);

/// Why requests are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedFor {
    /// The coordinator holds all that it may.
    Overload,
    /// They would not be answered in time.
    Lateness,
    /// No node can take them.
    NoNodes,
}

impl RefusedFor {
    const ALL: [Self; 3] = [Self::Overload, Self::Lateness, Self::NoNodes];

    /// For people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overload => "the coordinator holds as many requests as it may",
            Self::Lateness => "they would not be answered in time",
            Self::NoNodes => "no node can take them",
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Happening {
    /// A node joined as this.
    Joined {
        /// Which.
        node: NodeId,
        /// As what.
        role: Role,
        /// Its model.
        model: String,
    },
    /// A node's stream ended.
    Left(NodeId),
    /// A node takes nothing new, or takes work again.
    Draining(NodeId, bool),
    /// A node changed its role to this.
    Role(NodeId, Role),
    /// An attempt failed, and the request is tried again.
    Retried {
        /// Which.
        request: RequestId,
        /// The attempt that failed.
        attempt: u32,
        /// Why.
        reason: String,
    },
    /// A request ended without its result, by no wish of its client.
    Failed {
        /// Which.
        request: RequestId,
        /// Why.
        reason: String,
    },
    /// An operator ended a request.
    Cancelled(RequestId),
    /// So many requests were refused for the same reason, within a second.
    Refused(RefusedFor, u64),
}

/// A numbered event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// 1 for the first since the coordinator's start.
    pub sequence: u64,
    /// When.
    pub at: Instant,
    /// What.
    pub what: Happening,
}

/// The last events. Pure: the caller says what happened and when.
#[derive(Debug, Default)]
pub struct Events {
    kept: VecDeque<Event>,
    newest: u64,
    /// By reason: refusals not told yet, and when the last were told.
    refused: [(u64, Option<Instant>); 3],
}

impl Events {
    /// Something happened.
    pub fn push(&mut self, what: Happening, now: Instant) {
        if self.kept.len() == MOST_EVENTS {
            self.kept.pop_front();
        }
        self.newest += 1;
        self.kept.push_back(Event { sequence: self.newest, at: now, what });
    }

    /// A node reports; it was and drained as given until now.
    pub fn reported(
        &mut self,
        node: &NodeId,
        (role, draining): (Role, bool),
        report: &Report,
        now: Instant,
    ) {
        if report.role != role {
            self.push(Happening::Role(node.clone(), report.role), now);
        }
        if report.draining != draining {
            self.push(Happening::Draining(node.clone(), report.draining), now);
        }
    }

    /// A request was refused. A flood of refusals is told as few events.
    pub fn refused(&mut self, why: RefusedFor, now: Instant) {
        self.refused[why as usize].0 += 1;
        self.tell_refusals(now);
    }

    /// Number of the newest event; 0 before the first.
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Up to `most` events after number `after`, the oldest first; the first one's number says
    /// whether some in between are gone.
    #[must_use]
    pub fn after(&self, after: u64, most: usize) -> Vec<Event> {
        let oldest = self.newest - self.kept.len() as u64;
        let skip = after.saturating_sub(oldest).min(self.kept.len() as u64);
        self.kept.iter().skip(skip as usize).take(most).cloned().collect()
    }

    /// All that are kept, the newest first.
    pub fn latest(&self) -> impl Iterator<Item = &Event> {
        self.kept.iter().rev()
    }

    /// When [`Self::handle_timeout`] must be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let untold = self.refused.iter().filter(|(count, _)| *count > 0);
        untold.filter_map(|(_, told)| told.map(|told| told + REFUSALS_EVERY)).min()
    }

    /// Tells refusals that are due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.tell_refusals(now);
    }

    fn tell_refusals(&mut self, now: Instant) {
        for why in RefusedFor::ALL {
            let (count, told) = &mut self.refused[why as usize];
            if *count > 0 && told.is_none_or(|told| now >= told + REFUSALS_EVERY) {
                let count = std::mem::take(count);
                *told = Some(now);
                self.push(Happening::Refused(why, count), now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::node;

    fn numbers(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn a_reader_goes_on_where_it_was_and_sees_what_it_missed() {
        let (mut events, now) = (Events::default(), Instant::now());
        assert!(events.after(0, 10).is_empty());
        for _ in 0..5 {
            events.push(Happening::Left(node("d")), now);
        }
        assert_eq!(numbers(&events.after(0, 3)), [1, 2, 3]);
        assert_eq!(numbers(&events.after(3, 9)), [4, 5]);
        assert!(events.after(5, 9).is_empty());
        assert!(events.after(99, 9).is_empty(), "of an earlier life of the coordinator");
        for _ in 0..MOST_EVENTS {
            events.push(Happening::Left(node("d")), now);
        }
        assert_eq!(numbers(&events.after(3, 2)), [6, 7], "4 and 5 are gone");
        assert_eq!(events.newest(), 5 + MOST_EVENTS as u64);
    }

    #[test]
    fn a_flood_of_refusals_is_one_event_per_second() {
        let (mut events, start) = (Events::default(), Instant::now());
        for ms in 0..900 {
            events.refused(RefusedFor::Overload, start + Duration::from_millis(ms));
        }
        events.refused(RefusedFor::NoNodes, start);
        let due = start + REFUSALS_EVERY;
        assert_eq!(events.poll_timeout(), Some(due));
        events.handle_timeout(due);
        assert_eq!(events.poll_timeout(), None);
        let told: Vec<_> = events.after(0, 9).into_iter().map(|event| event.what).collect();
        let refused = Happening::Refused;
        let wanted =
            [(RefusedFor::Overload, 1), (RefusedFor::NoNodes, 1), (RefusedFor::Overload, 899)];
        assert_eq!(told, wanted.map(|(why, count)| refused(why, count)));
    }
}
