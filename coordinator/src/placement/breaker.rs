//! Keeps requests away from a node that fails them, and lets a new node warm up.

/// Failures in a row after which a node gets nothing for a while.
const MOST_FAILURES: u32 = 5;
/// How long that is the first time; doubles each time.
const FIRST_PAUSE_MS: f64 = 1000.0;
/// The longest that it is.
const LONGEST_PAUSE_MS: f64 = 60_000.0;
/// Time in which a node that joined comes to its full share.
const WARM_UP_MS: f64 = 10_000.0;

/// A circuit breaker. Pure; times are milliseconds of the caller's clock.
#[derive(Clone, Debug)]
pub(super) struct Breaker {
    failures: u32,
    pauses: u32,
    closed_until: f64,
    /// One request tests a node that was paused.
    probing: bool,
    since: f64,
}

impl Breaker {
    /// A node that joins now.
    #[must_use]
    pub(super) fn new(now: f64) -> Self {
        Self { failures: 0, pauses: 0, closed_until: now, probing: false, since: now }
    }

    /// Whether the node may be given a request.
    #[must_use]
    pub(super) fn admits(&self, now: f64) -> bool {
        self.pauses == 0 || (now >= self.closed_until && !self.probing)
    }

    /// It was given one.
    pub(super) fn sent(&mut self) {
        self.probing = self.pauses > 0;
    }

    /// It failed one, by its own fault.
    pub(super) fn failed(&mut self, now: f64) {
        self.failures += 1;
        if self.probing || self.failures >= MOST_FAILURES {
            let pause = FIRST_PAUSE_MS * 2_f64.powi(self.pauses.min(16) as i32);
            self.closed_until = now + pause.min(LONGEST_PAUSE_MS);
            self.pauses += 1;
            self.failures = 0;
        }
        self.probing = false;
    }

    /// It did what it was asked.
    pub(super) fn succeeded(&mut self, now: f64) {
        if self.pauses > 0 {
            self.since = now;
        }
        (self.failures, self.pauses, self.probing) = (0, 0, false);
    }

    /// It did a part of what it was asked: enough for a node that is tested, which is not to get
    /// nothing else until a long answer ends.
    pub(super) fn did_part(&mut self, now: f64) {
        if self.probing {
            self.succeeded(now);
        }
    }

    /// It was not asked to do the rest.
    pub(super) fn released(&mut self) {
        self.probing = false;
    }

    /// How much longer everything is taken to last there: 2 for a node that just came, 1 in the end.
    #[must_use]
    pub(super) fn caution(&self, now: f64) -> f64 {
        2.0 - ((now - self.since) / WARM_UP_MS).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_probes_and_recovers() {
        let mut breaker = Breaker::new(0.0);
        (0..MOST_FAILURES - 1).for_each(|_| breaker.failed(1.0));
        assert!(breaker.admits(1.0));
        breaker.failed(1.0);
        assert!(!breaker.admits(1000.0));
        assert!(breaker.admits(1001.0));
        breaker.sent();
        assert!(!breaker.admits(1002.0), "one probe at a time");
        breaker.failed(1100.0);
        assert!(!breaker.admits(3000.0), "the pause doubles");
        assert!(breaker.admits(3100.0));
        breaker.sent();
        breaker.succeeded(3200.0);
        assert!(breaker.admits(3200.0));
        assert_eq!(breaker.caution(3200.0), 2.0, "it warms up again");
        assert_eq!(breaker.caution(3200.0 + WARM_UP_MS), 1.0);
    }

    #[test]
    fn a_part_ends_a_test_but_does_not_excuse_failures() {
        let mut breaker = Breaker::new(0.0);
        for _ in 0..MOST_FAILURES {
            breaker.did_part(1.0);
            breaker.failed(1.0);
        }
        assert!(!breaker.admits(1000.0));
        breaker.sent();
        breaker.did_part(1100.0);
        assert!(breaker.admits(1100.0));
    }
}
