//! A request on its way to nodes, and on them.

use baton_proto::hash::ModelRoot;
use baton_proto::ids::TransferId;

use super::cost::Demand;
use super::expected::Coming;
use super::queue::Class;
use super::tenants::TenantId;
use crate::cluster::NodeRef;
use crate::index::NodeKey;

/// A request to be placed. Times are milliseconds since the origin.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) id: TransferId,
    pub(super) root: ModelRoot,
    pub(super) demand: Demand,
    pub(super) longest: usize,
    /// One node computes it, and its KV goes nowhere.
    pub(super) embeds: bool,
    /// Its blocks, expected on the node that it waits for.
    pub(super) coming: Coming,
    pub(super) avoid: Vec<NodeRef>,
    pub(super) class: Class,
    pub(super) tenant: TenantId,
    pub(super) arrived: f64,
    pub(super) deadline: f64,
    /// For which node it waits.
    pub(super) node: NodeKey,
    pub(super) moves: u8,
    /// Whose next work it is: nobody there is asked whether it may go first.
    pub(super) turn: Option<NodeKey>,
    /// Not before.
    pub(super) retry_at: f64,
    /// Since when there is no room for it on decode nodes.
    pub(super) blocked: Option<f64>,
}

/// A request that was sent to nodes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) root: ModelRoot,
    pub(super) tenant: TenantId,
    /// Predicted.
    pub(super) prefill_ms: f64,
    /// With a transfer that has not ended.
    pub(super) prefill: Option<NodeKey>,
    pub(super) decode: NodeKey,
    /// With a pull that has not ended.
    pub(super) source: Option<NodeKey>,
    /// Transfers to the decode node when it was sent.
    pub(super) others: u32,
    pub(super) token_bytes: f64,
    /// Nodes that still have to do with it.
    pub(super) legs: u8,
}
