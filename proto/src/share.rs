//! What coordinators that serve the same nodes tell each other, in domain types.

use std::time::Duration;

use crate::ids::{Epoch, NodeId};

/// Most nodes in one share.
pub const MAX_SHARED_NODES: usize = 1024;
/// Most promises per node in one share.
pub const MAX_PROMISES: usize = 16;

/// All that a coordinator has promised nodes and that their reports may not show yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Share {
    /// Grows with every share; an earlier one that comes later is void.
    pub sequence: u64,
    /// At most [`MAX_SHARED_NODES`].
    pub nodes: Vec<NodePromises>,
}

/// What was promised to one node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodePromises {
    /// The node.
    pub node: NodeId,
    /// Which life of it.
    pub epoch: Epoch,
    /// At most [`MAX_PROMISES`], youngest first.
    pub promises: Vec<Promise>,
}

/// Work of about the same age.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Promise {
    /// Time since it was sent to the node.
    pub age: Duration,
    /// What it is.
    pub load: SharedLoad,
}

/// Work for a node.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SharedLoad {
    /// Predicted time to compute `tokens`; finite and not negative.
    pub prefill_ms: f64,
    /// Prompt tokens to compute.
    pub tokens: u64,
    /// Blocks to hold.
    pub blocks: u64,
    /// Sequences.
    pub sequences: u32,
}

impl std::ops::AddAssign for SharedLoad {
    /// Saturates: what others say must not overflow here.
    fn add_assign(&mut self, other: Self) {
        self.prefill_ms += other.prefill_ms;
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.blocks = self.blocks.saturating_add(other.blocks);
        self.sequences = self.sequences.saturating_add(other.sequences);
    }
}
