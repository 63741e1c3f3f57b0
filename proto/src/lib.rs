//! The words that Baton's machines share: identities, KV geometry, block hashes, validated
//! sampling parameters, the messages between nodes and coordinators, and their wire forms.
//!
//! Wire types live in [`wire`] and stop at the edge of a crate: they are parsed once into the
//! domain types of this crate, which cannot be invalid.

pub mod config;
pub mod embedding;
pub mod geometry;
pub mod grammar;
pub mod hash;
pub mod ids;
pub mod message;
pub mod sampling;
pub mod share;
pub mod trace;

mod convert;
pub use convert::InvalidMessage;

/// Types generated from `proto/`, and the file descriptors for gRPC reflection.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all)]
pub mod wire {
    /// The client and operator API.
    pub mod v1 {
        tonic::include_proto!("baton.v1");
    }
    /// The stream between a node and a coordinator.
    pub mod node {
        tonic::include_proto!("baton.node.v1");
    }
    /// The exchange between coordinators.
    pub mod peer {
        tonic::include_proto!("baton.peer.v1");
    }
    /// What gateways say to an engine.
    pub mod engine {
        tonic::include_proto!("vllm.grpc.engine");
    }
    /// Encoded `FileDescriptorSet` of every package.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
