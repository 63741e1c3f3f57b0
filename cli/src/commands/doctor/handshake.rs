//! Members of the cluster, as this one would meet them: over mutual TLS, by TCP and by QUIC.

use std::sync::Arc;
use std::time::Duration;

use baton_identity::{COORDINATOR_SERVER_NAME, CertificateFacts, Identity, Part};
use baton_kvtransfer::meet;
use baton_proto::ids::NodeId;
use baton_proto::wire::v1::ListNodesRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};

use super::certificates;
use super::report::{Finding, Verdict};
use crate::client::Target;

/// For a connection, its handshake, and the first word of the other side.
const PATIENCE: Duration = Duration::from_secs(3);
/// Nodes that are tried.
const MOST_NODES: usize = 64;
/// HTTP/2's preface, and settings without any.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Whether `identity` and the coordinator whose `cluster_listen` is `address` accept each other.
pub(super) async fn coordinator(what: &str, address: &str, identity: &Identity) -> Finding {
    let met = timeout(PATIENCE, over_tcp(address, identity)).await;
    let met = met.unwrap_or_else(|_| Err("no answer".to_owned()));
    judge(what, address, met, "TCP to its cluster_listen port")
}

/// The same of the nodes that a coordinator knows, which send each other KV. Only nodes do that.
pub(super) async fn nodes(target: &Target, identity: &Identity) -> Vec<Finding> {
    if identity.part() != Part::Node {
        return Vec::new();
    }
    // That no coordinator answers was said.
    let Ok(mut client) = target.cluster().await else { return Vec::new() };
    let Ok(listed) = client.list_nodes(ListNodesRequest {}).await else { return Vec::new() };
    let mut tries = JoinSet::new();
    for node in listed.into_inner().nodes.into_iter().take(MOST_NODES) {
        let Ok(name) = node.id.parse::<NodeId>() else { continue };
        if &name == identity.node_id() {
            continue;
        }
        let (identity, address) = (identity.clone(), node.kv_address);
        tries.spawn(async move { self::node(&name, &address, &identity).await });
    }
    let mut findings = tries.join_all().await;
    findings.sort_by(|a, b| a.what.cmp(&b.what));
    findings
}

async fn node(name: &NodeId, address: &str, identity: &Identity) -> Finding {
    let met = timeout(PATIENCE, over_quic(name, address, identity)).await;
    let met = met.unwrap_or_else(|_| Err("no answer".to_owned()));
    judge(&format!("KV to {name}"), address, met, "UDP to its kv_listen port")
}

/// What the certificate says that a coordinator shows; else why there is no connection.
async fn over_tcp(address: &str, identity: &Identity) -> Result<CertificateFacts, String> {
    let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
    let tls = TlsConnector::from(Arc::new(identity.rustls_client(&[b"h2"])));
    let name = ServerName::try_from(COORDINATOR_SERVER_NAME).expect("a DNS name");
    let mut stream = tls.connect(name, stream).await.map_err(|e| e.to_string())?;
    // For the client a handshake ends before the server has looked at its certificate: only what comes
    // then tells whether it was accepted.
    stream.write_all(PREFACE).await.map_err(|e| e.to_string())?;
    stream.read_u8().await.map_err(|e| e.to_string())?;
    facts(stream.get_ref().1.peer_certificates())
}

async fn over_quic(
    name: &NodeId,
    address: &str,
    identity: &Identity,
) -> Result<CertificateFacts, String> {
    let mut addresses = lookup_host(address).await.map_err(|e| e.to_string())?;
    let address = addresses.next().ok_or("it has no address")?;
    meet(name, address, identity).await.map_err(|e| e.to_string())
}

fn facts(chain: Option<&[CertificateDer<'_>]>) -> Result<CertificateFacts, String> {
    let certificate = chain.and_then(<[_]>::first).ok_or("it shows no certificate")?;
    CertificateFacts::of(certificate).map_err(|e| e.to_string())
}

fn judge(what: &str, address: &str, met: Result<CertificateFacts, String>, port: &str) -> Finding {
    let facts = match met {
        Ok(facts) => facts,
        Err(why) => return Finding::problem(what, format!("{address}: {why}"), remedy(&why, port)),
    };
    let time = certificates::member_validity(what, &facts);
    let (name, names) = (&facts.name, facts.names.join(", "));
    let found = format!("{address} is {name} ({names}); certificate: {}", time.found);
    match time.verdict {
        Verdict::Fine => Finding::fine(what, found),
        Verdict::Note => Finding::note(what, found, time.remedy),
        Verdict::Problem => Finding::problem(what, found, time.remedy),
    }
}

/// By what TLS and the system say, which no type tells apart on both ways.
fn remedy(why: &str, port: &str) -> String {
    let has = |parts: &[&str]| parts.iter().any(|part| why.contains(part));
    let remedy = if has(&["Expired", "expired", "error 45"]) {
        "renew the certificate that has expired, there or here, with `baton certs issue`"
    } else if has(&["NotValidYet", "not valid yet"]) {
        "compare both machines' clocks: let them follow NTP"
    } else if has(&["NotValidForName", "not valid for name"]) {
        "another member listens there: correct the address, or issue that identity anew (a \
         coordinator's with --coordinator)"
    } else if has(&["UnknownIssuer", "UnknownCA", "BadSignature", "DecryptError", "error 48"]) {
        "the two are of different authorities: issue both identities with the same --ca"
    } else if has(&["corrupt message", "InvalidMessage"]) {
        "something else listens there: is that the port of cluster_listen?"
    } else {
        return format!("start it there, or let a firewall pass {port}");
    };
    remedy.to_owned()
}

#[cfg(test)]
mod tests {
    use baton_identity::ClusterCa;
    use baton_kvtransfer::{Endpoint, Timing};
    use baton_proto::ids::Epoch;
    use tempfile::TempDir;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    /// An authority and its members.
    struct Cluster(TempDir, ClusterCa);

    impl Cluster {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let ca = ClusterCa::create(&folder.path().join("ca")).expect("made");
            Self(folder, ca)
        }

        fn issue(&self, part: Part, name: &str) -> Identity {
            let out = self.0.path().join(name);
            self.1.issue(part, &name.parse().expect("a name"), &[], &out).expect("issued");
            Identity::load(&out).expect("whole")
        }
    }

    /// Greets members that it accepts, as a coordinator does.
    async fn listen(identity: &Identity) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let tls = TlsAcceptor::from(Arc::new(identity.rustls_server(&[b"h2"])));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(mut stream) = tls.accept(stream).await {
                    let mut preface = [0; PREFACE.len()];
                    stream.read_exact(&mut preface).await.expect("a preface");
                    stream.write_all(b"\0").await.expect("open");
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn a_coordinator_is_met_and_named() {
        let cluster = Cluster::new();
        let address = listen(&cluster.issue(Part::Coordinator, "c")).await;
        let node = cluster.issue(Part::Node, "n");
        let found = coordinator("x", &address, &node).await;
        assert_eq!(found.verdict, Verdict::Fine, "{found:?}");
        assert!(found.found.contains("is c (c.coordinator.baton, coordinator.baton)"), "{found:?}");
        assert!(found.found.contains("days left"), "{found:?}");
    }

    #[tokio::test]
    async fn strangers_and_wrong_parts_are_told_apart() {
        let (cluster, others) = (Cluster::new(), Cluster::new());
        let node = cluster.issue(Part::Node, "n");
        let stranger = listen(&others.issue(Part::Coordinator, "c")).await;
        let found = coordinator("x", &stranger, &node).await;
        assert!(found.remedy.contains("different authorities"), "{found:?}");

        let no_coordinator = listen(&cluster.issue(Part::Node, "m")).await;
        let found = coordinator("x", &no_coordinator, &node).await;
        assert!(found.remedy.contains("another member listens there"), "{found:?}");

        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let closed = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let found = coordinator("x", &closed, &node).await;
        assert!(found.remedy.contains("TCP to its cluster_listen"), "{found:?}");
    }

    #[tokio::test]
    async fn a_node_is_met_where_it_takes_kv() {
        let (cluster, others) = (Cluster::new(), Cluster::new());
        let (n, m) = (cluster.issue(Part::Node, "n"), cluster.issue(Part::Node, "m"));
        let localhost = "127.0.0.1:0".parse().expect("an address");
        let endpoint = Endpoint::bind(localhost, &m, Epoch(1), Timing::default());
        let address = endpoint.as_ref().expect("bound").local_addr().to_string();
        let found = node(m.node_id(), &address, &n).await;
        assert_eq!(found.verdict, Verdict::Fine, "{found:?}");
        assert!(found.found.contains("is m (m.node.baton)"), "{found:?}");

        let stranger = others.issue(Part::Node, "s");
        let found = node(m.node_id(), &address, &stranger).await;
        assert!(found.remedy.contains("different authorities"), "{found:?}");
        let found = node(n.node_id(), &address, &n).await;
        assert!(found.remedy.contains("another member listens there"), "{found:?}");
    }
}
