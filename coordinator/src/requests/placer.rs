//! What requests want of placement, and what they tell it of what nodes do for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{NodeId, RequestId, TransferId};
use baton_proto::message::Peer;

use crate::cluster::NodeRef;
use crate::core::ModelInfo;
use crate::decision::Decision;
use crate::placement::Standing;

/// An attempt that needs nodes.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The attempt.
    pub id: TransferId,
    /// The model.
    pub model: &'a ModelInfo,
    /// Tokens of prompt and output so far.
    pub tokens: usize,
    /// Most tokens that it can come to.
    pub longest: usize,
    /// Its prompt is embedded: one node computes it, and its KV goes nowhere.
    pub embeds: bool,
    /// Hashes of their full blocks.
    pub chain: &'a Arc<Vec<BlockHash>>,
    /// Lives of nodes that must not be used.
    pub avoid: &'a [NodeRef],
    /// Whose it is, and how urgent.
    pub standing: Standing,
    /// When the request arrived.
    pub arrived: Instant,
    /// When it is over.
    pub deadline: Option<Instant>,
    /// It arrives now, and may be refused.
    pub arrives: bool,
}

/// Where an attempt goes.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Who computes the prompt; `None`: the other node itself.
    pub prefill: Option<Peer>,
    /// Who generates the tokens, or embeds.
    pub decode: Peer,
    /// Who has a cached prefix that is to be fetched first, and its tokens.
    pub pull: Option<(Peer, usize)>,
    /// What it was compared with.
    pub decision: Decision,
}

/// What becomes of an attempt that needs nodes.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It is sent to these now.
    Go(Placed),
    /// It waits for its turn, which [`Requests::turn`] brings; this is how it would go now.
    Held(Decision),
    /// No node can take it; this is why.
    NoNodes(Decision),
    /// It would not be answered in time.
    TooLate {
        /// When it might.
        retry_after: Duration,
        /// The best that there is.
        decision: Decision,
    },
}

/// Chooses nodes and keeps account of what they were given.
pub trait Placer {
    /// Chooses nodes for an attempt.
    fn place(&mut self, wanted: &Wanted<'_>, now: Instant) -> Answer;
    /// A request that is held needs no nodes any more.
    fn withdraw(&mut self, request: RequestId);
    /// The node begins with the attempt and has so many of its tokens cached.
    fn started(&mut self, node: &NodeId, id: TransferId, cached: usize);
    /// The node has computed the attempt's prompt.
    fn prefilled(&mut self, node: &NodeId, id: TransferId, took: Duration, now: Instant);
    /// The attempt's KV arrived, so long after it was computed.
    fn handed_over(&mut self, id: TransferId, exposed: Duration, bytes: u64, now: Instant);
    /// The attempt's pull is over and brought so many tokens.
    fn pulled(&mut self, id: TransferId, tokens: usize, took: Duration, now: Instant);
    /// The node has nothing to do with the attempt any more.
    fn ended(&mut self, node: &NodeId, id: TransferId, now: Instant);
    /// The node failed an attempt by its own fault.
    fn failed(&mut self, node: &NodeId, now: Instant);
    /// A request of this model was answered with so many tokens, the last of them by this node, or
    /// with an embedding if there are none.
    fn answered(&mut self, by: &NodeId, root: ModelRoot, tokens: usize, now: Instant);
}
