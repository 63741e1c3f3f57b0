//! Clusters under virtual time.
//!
//! - `trace`: requests that somebody's service once received.
//! - `replay`: a cluster of modelled nodes that serves a trace under a placement policy.
//! - `plan`: how many nodes a trace needs; `device`: what they can do.
//! - `world`: the real machines of a whole cluster, with a modelled device and network, and faults.

pub mod device;
pub mod plan;
pub mod replay;
pub mod trace;
pub mod world;

mod origin;
