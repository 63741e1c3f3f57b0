//! The name and the part of a member, as its certificate states them.

use std::fmt;

use baton_proto::ids::NodeId;
use rustls::pki_types::{CertificateDer, ServerName};
use x509_parser::extensions::GeneralName;

/// Names under this belong to the cluster; nobody can ask for one as an extra name.
pub(crate) const CLUSTER_DOMAIN: &str = "baton";

/// The name under which every coordinator can be dialled.
pub const COORDINATOR_SERVER_NAME: &str = "coordinator.baton";

/// What the holder of a certificate may act as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// A prefill or decode node.
    Node,
    /// A coordinator.
    Coordinator,
}

impl Part {
    const fn domain(self) -> &'static str {
        match self {
            Self::Node => "node.baton",
            Self::Coordinator => COORDINATOR_SERVER_NAME,
        }
    }

    /// `<name>.node.baton` or `<name>.coordinator.baton`.
    pub(crate) fn dns_name(self, name: &NodeId) -> String {
        format!("{name}.{}", self.domain())
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Node { "node" } else { "coordinator" })
    }
}

/// A verified certificate does not say who its holder is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No X.509 certificate.
    #[error("the peer's certificate cannot be parsed")]
    Malformed,
    /// It must name exactly one member.
    #[error("the peer's certificate names {0} members of the cluster, not one")]
    NotOneName(usize),
    /// A coordinator where a node is expected.
    #[error("the peer is coordinator {0}, not a node")]
    NotANode(NodeId),
}

/// The name to verify when dialling `node`.
#[must_use]
pub fn node_server_name(node: &NodeId) -> ServerName<'static> {
    ServerName::try_from(Part::Node.dns_name(node)).expect("a node name is a DNS label")
}

/// Who holds this certificate, which TLS must have verified.
pub fn peer(certificate: &CertificateDer<'_>) -> Result<(NodeId, Part), PeerError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|_| PeerError::Malformed)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| PeerError::Malformed)?
        .map_or(&[][..], |extension| &extension.value.general_names);
    let mut members: Vec<_> = names.iter().filter_map(member).collect();
    match members.len() {
        1 => Ok(members.remove(0)),
        count => Err(PeerError::NotOneName(count)),
    }
}

/// Which node holds this certificate, which TLS must have verified.
pub fn peer_node_id(certificate: &CertificateDer<'_>) -> Result<NodeId, PeerError> {
    match peer(certificate)? {
        (name, Part::Node) => Ok(name),
        (name, Part::Coordinator) => Err(PeerError::NotANode(name)),
    }
}

fn member(name: &GeneralName<'_>) -> Option<(NodeId, Part)> {
    let GeneralName::DNSName(dns) = name else {
        return None;
    };
    let (label, domain) = dns.split_once('.')?;
    let part = [Part::Node, Part::Coordinator].into_iter().find(|part| part.domain() == domain)?;
    Some((label.parse().ok()?, part))
}
