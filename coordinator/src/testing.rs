//! What the unit tests of several modules need.

use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::ModelRoot;
use baton_proto::ids::{Epoch, NodeId, Role};
use baton_proto::message::Hello;

/// A node name.
pub(crate) fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

/// The KV layout of all nodes in tests.
pub(crate) const GEOMETRY: KvGeometry =
    KvGeometry { layers: 2, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32, block_tokens: 4 };

/// A node of the model `demo`.
pub(crate) fn hello(role: Role, epoch: u64) -> Hello {
    Hello {
        role,
        epoch: Epoch(epoch),
        model: "demo".to_owned(),
        root: ModelRoot::new(&[0; 32], &GEOMETRY),
        geometry: GEOMETRY,
        max_model_len: 4096,
        vocab_size: 1000,
        hidden_size: 4,
        total_blocks: 1024,
        kv_address: "127.0.0.1:1".to_owned(),
        transports: vec!["quic".to_owned()],
        price: 1.0,
    }
}
