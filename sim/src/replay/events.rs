//! What will happen, in order.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::{News, Node};

#[derive(Debug)]
pub(super) enum Event {
    Arrive(usize),
    PrefillEnd(usize),
    /// A decode node's batch changes, unless it has been rescheduled since.
    Batch(usize, u64),
    /// A transfer ends, unless transfers have been rescheduled since.
    Network(u64),
    Tell(Node, News),
    Report,
    Wake,
}

/// Events by time, those of the same time in the order in which they were planned.
#[derive(Debug, Default)]
pub(super) struct Events {
    heap: BinaryHeap<Planned>,
    planned: u64,
}

#[derive(Debug)]
struct Planned {
    ms: f64,
    number: u64,
    event: Event,
}

impl Events {
    pub(super) fn plan(&mut self, ms: f64, event: Event) {
        self.heap.push(Planned { ms, number: self.planned, event });
        self.planned += 1;
    }

    pub(super) fn next(&mut self) -> Option<(f64, Event)> {
        self.heap.pop().map(|planned| (planned.ms, planned.event))
    }
}

impl Ord for Planned {
    /// Reversed, for the heap gives the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.ms.total_cmp(&self.ms).then(other.number.cmp(&self.number))
    }
}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Planned {}
