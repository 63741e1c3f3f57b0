//! Virtual time: events in the order of their times, equal times in the order of their making.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use crate::origin::origin;

/// What will happen, and the time until then. `E` is what happens.
pub(crate) struct Timeline<E> {
    origin: Instant,
    now: Instant,
    made: u64,
    coming: BinaryHeap<Reverse<Coming<E>>>,
}

struct Coming<E> {
    at: Instant,
    number: u64,
    event: E,
}

impl<E> Timeline<E> {
    /// A timeline at whose start nothing is to come. Only differences of times mean something.
    pub(crate) fn new() -> Self {
        let origin = origin();
        Self { origin, now: origin, made: 0, coming: BinaryHeap::new() }
    }

    /// The time.
    pub(crate) fn now(&self) -> Instant {
        self.now
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.origin
    }

    /// `event` happens at `at`, or now if that is past.
    pub(crate) fn at(&mut self, at: Instant, event: E) {
        let (at, number) = (at.max(self.now), self.made);
        self.made += 1;
        self.coming.push(Reverse(Coming { at, number, event }));
    }

    /// `event` happens after `delay`.
    pub(crate) fn after(&mut self, delay: Duration, event: E) {
        self.at(self.now + delay, event);
    }

    /// Time goes on to the next event.
    pub(crate) fn next(&mut self) -> Option<E> {
        let Reverse(Coming { at, event, .. }) = self.coming.pop()?;
        self.now = at;
        Some(event)
    }

    /// Events made so far.
    pub(crate) fn made(&self) -> u64 {
        self.made
    }
}

impl<E> Coming<E> {
    fn key(&self) -> (Instant, u64) {
        (self.at, self.number)
    }
}

impl<E> PartialEq for Coming<E> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<E> Eq for Coming<E> {}

impl<E> PartialOrd for Coming<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Coming<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}
