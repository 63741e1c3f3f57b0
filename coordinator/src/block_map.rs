//! Maps by block hash. The hash is uniform already: nothing is gained by hashing it again.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use baton_proto::hash::BlockHash;

/// A map by block hash.
pub(crate) type BlockMap<V> = HashMap<BlockHash, V, BuildHasherDefault<FirstBytes>>;

/// Takes the first bytes of a block hash as its hash.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(&first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(first);
        }
    }

    // The length of the hash, which is always the same.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}
