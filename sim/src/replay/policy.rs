//! What decides where requests go.

use super::{Changes, Cluster, Node};

/// A placement policy. Requests are numbered by their place in the trace.
pub trait Policy {
    /// A request came.
    fn arrive(&mut self, now_ms: f64, request: usize, cluster: &Cluster<'_>) -> Admission;

    /// What to do now. Asked after every event until there is nothing, so a policy may hold
    /// requests for as long as it likes.
    fn next(&mut self, now_ms: f64, cluster: &Cluster<'_>) -> Option<Decision>;

    /// A node said something.
    fn heard(&mut self, _now_ms: f64, _node: Node, _news: &News) {}

    /// When to ask again if nothing happens before.
    fn wake(&self) -> Option<f64> {
        None
    }
}

/// Whether a request that came is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It will be dispatched or refused later.
    Taken,
    /// It is refused now.
    Refused,
}

/// What to do with a request that was taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Serve it.
    Dispatch(Dispatch),
    /// Refuse it after all.
    Refuse(usize),
}

/// Where a request is served.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dispatch {
    /// Which request.
    pub request: usize,
    /// The prefill node; `None`: the decode node computes the prompt.
    pub prefill: Option<usize>,
    /// The decode node; `None` only in a cluster without any.
    pub decode: Option<usize>,
    /// Leading blocks to be fetched from another node's cache, to the node that computes, first.
    pub pull: Option<(Node, usize)>,
}

/// What a node says. Changes of its cache and reports are late by the event lag, the rest comes
/// on the way of the request's own tokens and does not.
#[derive(Clone, Debug, PartialEq)]
pub enum News {
    /// A prompt was computed; the first token is out.
    PrefillDone {
        /// Which request.
        request: usize,
        /// Its tokens that were cached or pulled.
        cached_tokens: u32,
        /// How long computing the rest took; on a decode node, steps of the whole batch.
        service_ms: f64,
    },
    /// A transfer arrived, at the node that received it.
    Transferred {
        /// For which request.
        request: usize,
        /// The node that sent it.
        from: Node,
        /// Tokens whose KV moved.
        tokens: u32,
        /// How long it took.
        ms: f64,
    },
    /// The last token is out.
    Ended {
        /// Which request.
        request: usize,
    },
    /// The node's cache changed.
    Cache(Changes),
    /// How the node is doing, every so often.
    Report {
        /// Prompt tokens of requests that wait or are being computed.
        queued_tokens: u64,
        /// Sequences that are being decoded.
        sequences: u64,
        /// Tokens of KV that they hold.
        kv_tokens: u64,
        /// Duration of a decode step without a chunk of a prompt now; 0 without one.
        step_ms: f64,
        /// KV blocks in use by requests.
        active_blocks: usize,
    },
}
