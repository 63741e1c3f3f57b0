//! What happened, as text: for people, or hashed, to see whether two runs were the same.

use std::fmt::Arguments;
use std::time::Duration;

use super::memory::mix;

/// What becomes of the event log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Logging {
    /// Nothing.
    Off,
    /// It is hashed.
    Hash,
    /// It is printed to standard output.
    Print,
}

/// The event log of one run.
pub(crate) struct Log {
    logging: Logging,
    hash: u64,
}

impl Log {
    pub(crate) fn new(logging: Logging) -> Self {
        Self { logging, hash: 0 }
    }

    /// Whether lines are wanted at all: making them costs more than the events.
    pub(crate) fn wanted(&self) -> bool {
        self.logging != Logging::Off
    }

    pub(crate) fn line(&mut self, at: Duration, line: Arguments<'_>) {
        let line = format!("{:12.6} {line}", at.as_secs_f64());
        if self.logging == Logging::Print {
            println!("{line}");
        }
        self.hash = line.bytes().fold(self.hash, |hash, byte| mix(hash, byte.into()));
    }

    /// Of all lines so far.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }
}

/// Writes a line to a net's log, if anybody wants one.
macro_rules! note {
    ($net:expr, $($line:tt)*) => {
        if $net.log.wanted() {
            let at = $net.timeline.elapsed();
            $net.log.line(at, format_args!($($line)*));
        }
    };
}
pub(crate) use note;
