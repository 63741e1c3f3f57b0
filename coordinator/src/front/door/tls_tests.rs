//! Clients of ports with TLS.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_identity::{ClusterCa, Part};
use baton_proto::wire::v1::ListNodesRequest;
use baton_proto::wire::v1::cluster_client::ClusterClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::{Door, Entrance, MAX_CONNECTIONS, Tls, TlsFiles};
use crate::front::fixtures::{Play, Played, demo_model, start_behind};

const NAME: &str = "baton.example";

/// An authority with a certificate for [`NAME`] in `folder`.
fn certificate(folder: &Path) -> PathBuf {
    let ca = ClusterCa::create(&folder.join("ca")).unwrap();
    let out = folder.join("server");
    ca.issue(Part::Coordinator, &"c".parse().unwrap(), &[NAME], &out).unwrap();
    out
}

fn files(folder: &Path, client_ca: Option<PathBuf>) -> TlsFiles {
    TlsFiles { cert: folder.join("node.pem"), key: folder.join("node.key"), client_ca }
}

async fn start(files: TlsFiles) -> (Played, Entrance) {
    let tls = Tls::load(files).unwrap();
    let entrance = Entrance::new(Door::default(), Some(tls), MAX_CONNECTIONS);
    let nothing = |_: &_| Play::Silence(Vec::new());
    (start_behind(entrance.clone(), &demo_model(), &["demo"], Vec::new(), nothing).await, entrance)
}

fn pem(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

fn endpoint(played: &Played, ca: &Path, own: Option<&Path>) -> Endpoint {
    let mut tls = ClientTlsConfig::new();
    tls = tls.domain_name(NAME).ca_certificate(Certificate::from_pem(pem(ca)));
    if let Some(own) = own {
        let (cert, key) = (pem(&own.join("node.pem")), pem(&own.join("node.key")));
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    let endpoint = Endpoint::from_shared(format!("https://{}", played.grpc)).unwrap();
    endpoint.tls_config(tls).unwrap()
}

async fn asks(channel: Channel) -> bool {
    ClusterClient::new(channel).list_nodes(ListNodesRequest {}).await.is_ok()
}

async fn https(played: &Played, ca: &Path) -> Result<TlsStream<TcpStream>, std::io::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider);
    let config = config.with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(played.http).await.unwrap();
    let name = ServerName::try_from(NAME).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn is_live(stream: &mut TlsStream<TcpStream>) -> bool {
    stream.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = [0; 15];
    stream.read_exact(&mut answer).await.is_ok() && &answer == b"HTTP/1.1 200 OK"
}

#[tokio::test]
async fn both_ports_speak_tls_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let own = certificate(folder.path());
    let (played, _) = start(files(&own, None)).await;
    let ca = own.join("ca.pem");
    assert!(asks(endpoint(&played, &ca, None).connect().await.unwrap()).await);
    let mut stream = https(&played, &ca).await.unwrap();
    assert!(is_live(&mut stream).await);
    let version = stream.get_ref().1.protocol_version().unwrap();
    assert_eq!(version, tokio_rustls::rustls::ProtocolVersion::TLSv1_3);
    assert!(!asks(played.channel()).await, "plaintext is not answered");
    let mut plain = TcpStream::connect(played.http).await.unwrap();
    plain.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

#[tokio::test]
async fn clients_show_a_certificate_where_one_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let own = certificate(folder.path());
    let (played, _) = start(files(&own, Some(own.join("ca.pem")))).await;
    let ca = own.join("ca.pem");
    assert!(asks(endpoint(&played, &ca, Some(&own)).connect_lazy()).await);
    assert!(!asks(endpoint(&played, &ca, None).connect_lazy()).await);
    let stranger = certificate(&folder.path().join("other"));
    assert!(!asks(endpoint(&played, &ca, Some(&stranger)).connect_lazy()).await);
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections() {
    let folder = tempfile::tempdir().unwrap();
    let old = certificate(&folder.path().join("old"));
    let new = certificate(&folder.path().join("new"));
    let used = folder.path().join("used");
    let copy = |from: &Path| {
        for file in ["node.pem", "node.key"] {
            std::fs::copy(from.join(file), used.join(file)).unwrap();
        }
    };
    std::fs::create_dir(&used).unwrap();
    copy(&old);
    let (played, entrance) = start(files(&used, None)).await;
    let (before, after) = (old.join("ca.pem"), new.join("ca.pem"));
    let rpc = endpoint(&played, &before, None).connect().await.unwrap();
    let mut http = https(&played, &before).await.unwrap();
    assert!(https(&played, &after).await.is_err());

    copy(&new);
    entrance.reload();
    assert!(https(&played, &before).await.is_err());
    assert!(is_live(&mut https(&played, &after).await.unwrap()).await);
    assert!(asks(rpc.clone()).await && is_live(&mut http).await, "what was open stays so");

    std::fs::write(used.join("node.pem"), "no certificate").unwrap();
    entrance.reload();
    assert!(https(&played, &after).await.is_ok(), "a bad file changes nothing");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) =
        (certificate(&folder.path().join("one")), certificate(&folder.path().join("other")));
    let missing = TlsFiles { cert: folder.path().join("x.pem"), ..files(&one, None) };
    let mixed = TlsFiles { key: other.join("node.key"), ..files(&one, None) };
    let empty = TlsFiles { client_ca: Some(one.join("node.key")), ..files(&one, None) };
    for (files, part) in
        [(missing, "x.pem: No such file"), (mixed, "does not fit"), (empty, "no certificate")]
    {
        let error = Tls::load(files).err().unwrap().to_string();
        assert!(error.contains(part), "{error:?} has no {part:?}");
    }
}
