//! A trace served by modelled nodes under a placement policy, as a discrete-event simulation.
//!
//! Prefill nodes are first in, first out, one prompt at a time; decode nodes run continuous batches
//! and may compute prompts in chunks inside them; both keep KV blocks in LRU caches. The first token
//! leaves at the end of the prefill, so time to first token holds no transfer; what of the hand-over
//! the prefill did not hide shows in the time per output token.
//!
//! A decode node sets room for the whole answer aside when the prefill begins, as if the answer's
//! length were known, so nothing is ever preempted. The cost models are in [`PrefillCost`] and
//! [`DecodeCost`]; the model follows Mooncake's published simulator where they overlap.

mod batch;
mod cache;
mod cluster;
mod cost;
mod decode;
mod events;
mod job;
mod network;
mod outcome;
mod policies;
mod policy;
mod prefill;
mod run;
mod serving;
mod settings;

pub use cache::Changes;
pub use cluster::Cluster;
pub use cost::{DecodeCost, PrefillCost};
pub use outcome::{Distribution, Outcome, Record, Summary};
pub use policies::PolicyKind;
pub use policy::{Admission, Decision, Dispatch, News, Policy};
pub use run::{Stuck, replay};
pub use settings::{Disturbance, Link, Settings};

/// A node of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// A prefill node, by number.
    Prefill(usize),
    /// A decode node, by number.
    Decode(usize),
}

#[cfg(test)]
mod tests;
