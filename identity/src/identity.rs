//! A member's own identity, loaded and ready for TLS.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use baton_proto::ids::NodeId;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};

use crate::files::{self, CA_CERT, FileError, NODE_CERT, NODE_KEY};
use crate::name::{self, Part};

/// An identity's folder is incomplete or inconsistent; names the file and what is wrong.
#[derive(Debug, thiserror::Error)]
#[error("identity {0}")]
pub struct LoadError(#[from] FileError);

/// A member's certificate, its key and the authority it trusts. Cheap to clone.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    name: NodeId,
    part: Part,
    ca_pem: String,
    cert_pem: String,
    key_pem: String,
    server: ServerConfig,
    client: ClientConfig,
}

impl Identity {
    /// Loads `ca.pem`, `node.pem` and `node.key` from `dir` and checks that they belong together
    /// and are valid now.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let (ca, cert, key) = (dir.join(CA_CERT), dir.join(NODE_CERT), dir.join(NODE_KEY));
        let (ca_pem, cert_pem) = (files::read(&ca)?, files::read(&cert)?);
        let key_pem = files::read_key(&key)?;

        let roots = Arc::new(roots(&ca, &ca_pem)?);
        let chain = certificates(&cert, &cert_pem)?;
        let (name, part) = name::peer(&chain[0]).map_err(|e| FileError::new(&cert, e))?;
        check_issued_by(&roots, &chain, &part.dns_name(&name))
            .map_err(|e| FileError::new(&cert, format!("not valid under {CA_CERT}: {e}")))?;
        let private = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|_| FileError::new(&key, "no private key in PEM form"))?;

        let unfit = |e| FileError::new(&key, format!("does not fit {NODE_CERT}: {e}"));
        let server = server_config(&roots, chain.clone(), private.clone_key()).map_err(unfit)?;
        let client = client_config(&roots, chain, private).map_err(unfit)?;
        Ok(Self(Arc::new(Inner { name, part, ca_pem, cert_pem, key_pem, server, client })))
    }

    /// This member's name.
    #[must_use]
    pub fn node_id(&self) -> &NodeId {
        &self.0.name
    }

    /// What this member may act as.
    #[must_use]
    pub fn part(&self) -> Part {
        self.0.part
    }

    /// TLS 1.3 for accepting members of the cluster, and nobody else.
    #[must_use]
    pub fn rustls_server(&self, alpn: &[&[u8]]) -> ServerConfig {
        let mut config = self.0.server.clone();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config
    }

    /// TLS 1.3 for dialling members of the cluster, and nobody else.
    #[must_use]
    pub fn rustls_client(&self, alpn: &[&[u8]]) -> ClientConfig {
        let mut config = self.0.client.clone();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config
    }

    /// The authority's certificate.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.0.ca_pem
    }

    /// This member's certificate.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.0.cert_pem
    }

    /// This member's private key: a secret, never to be logged.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.0.key_pem
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:?} {})", self.0.part, self.0.name)
    }
}

/// AES-128-GCM first: the fastest suite on machines with AES instructions, which carry the KV.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    })
}

fn server_config(
    roots: &Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .expect("the store holds the cluster's CA");
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
}

fn client_config(
    roots: &Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain, key)
}

fn certificates(path: &Path, pem: &str) -> Result<Vec<CertificateDer<'static>>, FileError> {
    match CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>() {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        _ => Err(FileError::new(path, "no certificate in PEM form")),
    }
}

fn roots(path: &Path, pem: &str) -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|e| FileError::new(path, e))?;
    }
    Ok(roots)
}

/// What a peer will check, so that it fails at start and not at the first connection.
fn check_issued_by(
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'static>],
    dns_name: &str,
) -> Result<(), rustls::Error> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .expect("the store holds the cluster's CA");
    let name = ServerName::try_from(dns_name).expect("a member's name is a DNS name");
    verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], UnixTime::now()).map(|_| ())
}
