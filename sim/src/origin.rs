//! Where virtual time begins.

use std::time::Instant;

/// An arbitrary moment. An `Instant` can only be had from the clock; here only differences of times
/// mean something, so that this is the one look at it.
pub(crate) fn origin() -> Instant {
    Instant::now()
}
