//! Numbers for the nodes that are joined.

use baton_proto::ids::NodeId;

use super::NodeKey;
use crate::node_map::NodeMap;

/// Gives nodes numbers, and those of nodes that left to others. Bounded by who may join.
#[derive(Debug, Default)]
pub struct NodeKeys {
    keys: NodeMap<NodeKey>,
    unused: Vec<NodeKey>,
}

impl NodeKeys {
    /// The number of a node that joins.
    pub fn join(&mut self, node: &NodeId) -> NodeKey {
        if let Some(key) = self.of(node) {
            return key;
        }
        let key = self.unused.pop().unwrap_or(NodeKey(self.keys.len() as u32));
        self.keys.insert(node.clone(), key);
        key
    }

    /// The number of a node, which it has no more.
    pub fn leave(&mut self, node: &NodeId) -> Option<NodeKey> {
        let key = self.keys.remove(node)?;
        self.unused.push(key);
        Some(key)
    }

    /// The number of a joined node.
    #[must_use]
    pub fn of(&self, node: &NodeId) -> Option<NodeKey> {
        self.keys.get(node).copied()
    }
}
