//! Maps by node name, for what is looked up with every message of a node.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use baton_proto::ids::NodeId;

/// A map by node name. Its order is arbitrary, but the same in every run.
pub(crate) type NodeMap<V> = HashMap<NodeId, V, BuildHasherDefault<Fnv>>;

/// FNV-1a: names are short, and the cluster's own certificate authority gives them out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        self.0 = bytes.iter().fold(self.0, step);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
