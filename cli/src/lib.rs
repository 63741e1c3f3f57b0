//! Clusters on one machine, each daemon its own process: what `baton up` and `baton demo` run,
//! and what tests start.

pub mod launcher;
pub mod up;

mod process;
mod signals;
