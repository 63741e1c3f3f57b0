//! Members of a cluster accept each other, under the right names, and nobody else.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use baton_identity::{
    COORDINATOR_SERVER_NAME, ClusterCa, Identity, Part, PeerError, node_server_name, peer,
    peer_node_id,
};
use baton_proto::ids::NodeId;
use rustls::pki_types::ServerName;
use rustls::{CipherSuite, ClientConnection, ProtocolVersion, ServerConnection};
use tempfile::TempDir;

fn name(text: &str) -> NodeId {
    text.parse().unwrap()
}

fn issue(ca: &ClusterCa, dir: &Path, part: Part, id: &str) -> Identity {
    let out = dir.join(id);
    ca.issue(part, &name(id), &["localhost", "127.0.0.1"], &out).unwrap();
    Identity::load(&out).unwrap()
}

/// Runs a handshake in memory until both sides are done or one of them refuses.
fn handshake(
    client: &Identity,
    server: &Identity,
    dialled: ServerName<'static>,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let alpn: &[&[u8]] = &[b"baton-test"];
    let mut client = ClientConnection::new(Arc::new(client.rustls_client(alpn)), dialled)?;
    let mut server = ServerConnection::new(Arc::new(server.rustls_server(alpn)))?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut bytes = Vec::new();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    Ok((client, server))
}

fn coordinator_name() -> ServerName<'static> {
    ServerName::try_from(COORDINATOR_SERVER_NAME).unwrap()
}

#[test]
fn members_accept_each_other_over_tls13() {
    let dir = TempDir::new().unwrap();
    let ca = ClusterCa::create(&dir.path().join("ca")).unwrap();
    let node = issue(&ca, dir.path(), Part::Node, "prefill-0");
    let other = issue(&ca, dir.path(), Part::Node, "decode-0");
    let coordinator = issue(&ca, dir.path(), Part::Coordinator, "c0");

    let (client, server) = handshake(&node, &other, node_server_name(&name("decode-0"))).unwrap();
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let suite = client.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
    assert_eq!(client.alpn_protocol(), Some(&b"baton-test"[..]));
    assert_eq!(peer_node_id(&server.peer_certificates().unwrap()[0]), Ok(name("prefill-0")));

    handshake(&node, &coordinator, coordinator_name()).unwrap();
    handshake(&node, &other, ServerName::try_from("127.0.0.1").unwrap()).unwrap();
}

#[test]
fn an_authority_opened_again_issues_for_the_same_cluster() {
    let dir = TempDir::new().unwrap();
    let ca = ClusterCa::create(&dir.path().join("ca")).unwrap();
    let node = issue(&ca, dir.path(), Part::Node, "a");
    let again = ClusterCa::open(&dir.path().join("ca")).unwrap();
    let other = issue(&again, dir.path(), Part::Node, "b");
    handshake(&node, &other, node_server_name(&name("b"))).unwrap();
}

#[test]
fn another_cluster_is_refused_in_both_directions() {
    let dir = TempDir::new().unwrap();
    let mine = ClusterCa::create(&dir.path().join("mine")).unwrap();
    let foreign = ClusterCa::create(&dir.path().join("foreign")).unwrap();
    let node = issue(&mine, dir.path(), Part::Node, "a");
    let out = dir.path().join("other");
    foreign.issue(Part::Node, &name("a"), &[], &out).unwrap();
    let impostor = Identity::load(&out).unwrap();

    let dialled = node_server_name(&name("a"));
    assert!(handshake(&node, &impostor, dialled.clone()).is_err());

    // A client that would trust the server: its own CA file is the server's, its certificate not.
    std::fs::copy(dir.path().join("a/ca.pem"), out.join("ca.pem")).unwrap();
    let error = Identity::load(&out).unwrap_err().to_string();
    assert!(error.contains("node.pem: not valid under ca.pem"), "{error}");
    assert!(handshake(&impostor, &node, dialled).is_err());
}

#[test]
fn a_member_cannot_pass_for_another() {
    let dir = TempDir::new().unwrap();
    let ca = ClusterCa::create(&dir.path().join("ca")).unwrap();
    let node = issue(&ca, dir.path(), Part::Node, "n");
    let coordinator = issue(&ca, dir.path(), Part::Coordinator, "c");

    assert!(handshake(&node, &node, coordinator_name()).is_err());
    assert!(handshake(&node, &coordinator, node_server_name(&name("c"))).is_err());
    assert!(handshake(&node, &node, node_server_name(&name("other"))).is_err());

    let (_, server) = handshake(&coordinator, &node, node_server_name(&name("n"))).unwrap();
    let certificate = &server.peer_certificates().unwrap()[0];
    assert_eq!(peer(certificate), Ok((name("c"), Part::Coordinator)));
    assert_eq!(peer_node_id(certificate), Err(PeerError::NotANode(name("c"))));
}

#[test]
fn cluster_names_cannot_be_had_as_extra_names() {
    let dir = TempDir::new().unwrap();
    let ca = ClusterCa::create(&dir.path().join("ca")).unwrap();
    let bad = ["coordinator.baton", "x.Coordinator.BATON.", "baton", "a b", ""];
    for extra in bad {
        let out = dir.path().join("n");
        let error = ca.issue(Part::Node, &name("n"), &[extra], &out).unwrap_err();
        assert!(error.to_string().contains("no DNS name"), "{error}");
        assert!(!out.exists(), "nothing is written for a refused request");
    }
}

#[test]
fn keys_are_private_and_never_shown() {
    let dir = TempDir::new().unwrap();
    let ca_dir = dir.path().join("ca");
    let ca = ClusterCa::create(&ca_dir).unwrap();
    let identity = issue(&ca, dir.path(), Part::Node, "n");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    let key = dir.path().join("n/node.key");
    assert_eq!(mode(&key), 0o600);
    assert_eq!(mode(&ca_dir.join("ca.key")), 0o600);
    assert_eq!(mode(&ca_dir), 0o700);
    assert_eq!(mode(&dir.path().join("n")), 0o700);
    assert_eq!(format!("{identity:?}"), "Identity(Node n)");

    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).unwrap();
    let error = Identity::load(&dir.path().join("n")).unwrap_err();
    assert!(error.to_string().contains("mode 644"), "{error}");
}

#[test]
fn nothing_is_overwritten_and_broken_files_are_named() {
    let dir = TempDir::new().unwrap();
    let ca_dir = dir.path().join("ca");
    let ca = ClusterCa::create(&ca_dir).unwrap();
    assert!(ClusterCa::create(&ca_dir).is_err());
    issue(&ca, dir.path(), Part::Node, "n");
    let n = dir.path().join("n");
    assert!(ca.issue(Part::Node, &name("n"), &[], &n).is_err());

    issue(&ca, dir.path(), Part::Node, "m");
    let own_key = std::fs::read_to_string(n.join("node.key")).unwrap();
    std::fs::copy(dir.path().join("m/node.key"), n.join("node.key")).unwrap();
    let error = Identity::load(&n).unwrap_err().to_string();
    assert!(error.contains("node.key: does not fit node.pem"), "{error}");

    std::fs::write(n.join("node.key"), &own_key[..60]).unwrap();
    let error = Identity::load(&n).unwrap_err().to_string();
    assert!(error.contains("node.key: no private key"), "{error}");
    assert!(!error.contains(&own_key[30..50]), "a key leaked");

    std::fs::remove_file(n.join("ca.pem")).unwrap();
    let error = Identity::load(&n).unwrap_err().to_string();
    assert!(error.contains("ca.pem: No such file"), "{error}");
}

#[test]
fn a_renewed_certificate_counts_from_the_next_connection_on() {
    let dir = TempDir::new().unwrap();
    let ca = ClusterCa::create(&dir.path().join("ca")).unwrap();
    let node = issue(&ca, dir.path(), Part::Node, "decode-0");
    let dialler = issue(&ca, dir.path(), Part::Node, "prefill-0");
    let shown = |node: &Identity| {
        let (client, _) = handshake(&dialler, node, node_server_name(&name("decode-0"))).unwrap();
        client.peer_certificates().unwrap()[0].clone()
    };
    let before = shown(&node);
    let renewed = dir.path().join("renewed");
    ca.issue(Part::Node, &name("decode-0"), &[], &renewed).unwrap();
    node.reload(&renewed).unwrap();
    let after = shown(&node);
    assert_ne!(before, after);
    assert_eq!(std::fs::read_to_string(renewed.join("node.pem")).unwrap(), node.cert_pem());

    let error = node.reload(&dir.path().join("prefill-0")).unwrap_err().to_string();
    assert!(error.contains("prefill-0") && error.contains("decode-0"), "{error}");
    let stranger = ClusterCa::create(&dir.path().join("other")).unwrap();
    let strange = dir.path().join("strange");
    stranger.issue(Part::Node, &name("decode-0"), &[], &strange).unwrap();
    assert!(node.reload(&strange).is_err());
    assert_eq!(shown(&node), after, "after an error everything is as before");
}
