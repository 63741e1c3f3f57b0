//! Clusters under virtual time.
//!
//! - `trace`: requests that somebody's service once received.
//! - `replay`: a cluster of modelled nodes that serves a trace under a placement policy. It answers
//!   how good a placement is, and how many nodes a trace needs.

pub mod replay;
pub mod trace;
