//! The coordinator: admission, placement, the life of requests, the index of cached blocks, and
//! the front that clients talk to.

pub mod alerts;
pub mod aliases;
pub mod cluster;
pub mod config;
pub mod control;
pub mod core;
pub mod decision;
pub mod driver;
mod embedding;
pub mod events;
pub mod front;
pub mod history;
pub mod index;
pub mod orders;
pub mod peers;
pub mod placement;
pub mod requests;
pub mod roles;
pub mod server;
pub mod settings;

mod accept;
mod block_map;
mod exchange;
mod join;
mod life;
mod metrics;
mod node_map;
mod request;
#[cfg(test)]
mod testing;
mod vllm;
