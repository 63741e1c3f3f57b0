//! A node: engine, KV endpoint, streams to coordinators, and what brings them together.
//!
//! All decisions are in one pure machine, [`worker::Worker`]; a [`node::Node`] drives it. Any node
//! does any work. The daemons differ in the role that they begin with.

pub mod config;
pub mod daemon;
pub mod epoch;
pub mod join;
pub mod node;
pub mod settings;
pub mod worker;

mod driver;
mod load;
mod memory;
mod metrics;
mod outbox;
mod spans;
mod supervisor;

pub use driver::{Event, MAX_EVENTS};
pub use outbox::MAX_OUTBOX;
