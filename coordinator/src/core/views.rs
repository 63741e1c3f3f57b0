//! What operators see of the coordinator.

use std::time::Duration;

use baton_proto::hash::CacheSalt;
use baton_proto::ids::NodeId;
use baton_proto::message::{Hello, Report};

use crate::placement::Hits;

/// The coordinator as a whole.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct StatusView {
    /// A probe request would be served now.
    pub ready: bool,
    /// Why not, if not.
    pub reason: String,
    /// Names of models that can be served now.
    pub models: Vec<String>,
    /// Requests running.
    pub requests_active: usize,
    /// Of these, requests that wait here for their turn on a node.
    pub requests_waiting: usize,
    /// Joined prefill nodes.
    pub prefill_nodes: usize,
    /// Joined decode nodes.
    pub decode_nodes: usize,
    /// Other coordinators that are heard.
    pub peers: Vec<String>,
    /// Since the start.
    pub uptime: Duration,
    /// Requests that ended with a result.
    pub requests_finished: u64,
    /// Requests that ended without one, cancelled ones included.
    pub requests_failed: u64,
    /// Attempts after the first.
    pub requests_retried: u64,
}

/// A joined node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Its name.
    pub node: NodeId,
    /// What it said of itself.
    pub hello: Hello,
    /// Its last report.
    pub report: Report,
    /// Age of that report, or time since it joined.
    pub report_age: Duration,
}

/// What the prefix caches hold, as far as the coordinator knows.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CacheView {
    /// Of each node.
    pub nodes: Vec<NodeCacheView>,
    /// Blocks in the index.
    pub index_blocks: u64,
    /// Memory of the index.
    pub index_bytes: u64,
}

/// What one node's prefix cache holds.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeCacheView {
    /// The node.
    pub node: NodeId,
    /// Its blocks in the index.
    pub blocks: u64,
    /// Leading tokens of the prompt asked about.
    pub matched_tokens: u64,
    /// What it found there, and gave up.
    pub hits: Hits,
}

/// Whose cache a [`Core::cache`](super::Core::cache) call asks about.
#[derive(Clone, Debug, Default)]
pub struct CacheQuery {
    /// Only this node.
    pub node: Option<NodeId>,
    /// Match this prompt: model, salt and tokens.
    pub prompt: Option<(String, CacheSalt, Vec<u32>)>,
}
