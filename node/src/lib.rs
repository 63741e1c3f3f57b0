//! What the two node daemons share: configuration, joining coordinators, reporting, draining.
//!
//! A node is an engine, a KV endpoint and a hub. The [`hub`] is the one place where what
//! coordinators say meets what the engine and the transfers report; each role's crate takes the
//! hub's inputs one by one and acts on engine and endpoint.

pub mod config;
pub mod daemon;
pub mod epoch;
pub mod hub;
pub mod join;
pub mod node;
pub mod settings;
pub mod streams;
pub mod telemetry;

mod load;
