//! Who is who in a cluster: its own certificate authority, and one certificate per member.
//!
//! Every link between members is mutual TLS 1.3, verified in both directions against the
//! cluster's CA and nothing else. A member's name and part are in its certificate:
//!
//! | part        | DNS names in the certificate                        |
//! |-------------|-----------------------------------------------------|
//! | node        | `<name>.node.baton`                                 |
//! | coordinator | `<name>.coordinator.baton` and `coordinator.baton`  |
//!
//! so a node's certificate cannot pass for a coordinator's, nor the other way round. Who dials a
//! node knows which one and asks for [`node_server_name`]; who dials a coordinator knows only
//! its address and asks for [`COORDINATOR_SERVER_NAME`].
//!
//! An identity is a folder of three files: `ca.pem`, `node.pem` and `node.key`.

mod ca;
mod certified;
mod client_port;
mod files;
mod identity;
mod inspect;
mod name;

pub use ca::{ClusterCa, IssueError};
pub use client_port::{ClientPortError, client_port_tls};
pub use files::FileError;
pub use identity::{Identity, LoadError};
pub use inspect::{CertificateFacts, expires_at, validity};
pub use name::{COORDINATOR_SERVER_NAME, Part, PeerError, node_server_name, peer, peer_node_id};
