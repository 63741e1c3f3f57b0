//! A member's own identity, loaded and ready for TLS.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use baton_proto::ids::NodeId;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};

use crate::certified::{Certified, Current, certificates};
use crate::files::{self, CA_CERT, FileError, NODE_CERT};
use crate::inspect::expires_at;
use crate::name::Part;

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
    roots: Arc<RootCertStore>,
    current: Arc<Current>,
    server: ServerConfig,
    client: ClientConfig,
}

impl Identity {
    /// Loads `ca.pem`, `node.pem` and `node.key` from `dir` and checks that they belong together
    /// and are valid now.
    pub fn load(dir: &Path) -> Result<Self, LoadError> {
        let ca = dir.join(CA_CERT);
        let ca_pem = files::read(&ca)?;
        let roots = Arc::new(roots(&ca, &ca_pem)?);
        let (name, part, certified) = Certified::load(dir, &roots)?;
        let current = Arc::new(Current::new(certified));
        let server = server_config(&roots, current.clone());
        let client = client_config(&roots, current.clone());
        Ok(Self(Arc::new(Inner { name, part, ca_pem, roots, current, server, client })))
    }

    /// Loads certificate and key again, for connections from now on; those that exist go on. The
    /// name, the part and the authority cannot change; after an error everything is as before.
    pub fn reload(&self, dir: &Path) -> Result<(), LoadError> {
        let (name, part, certified) = Certified::load(dir, &self.0.roots)?;
        if (&name, part) != (self.node_id(), self.part()) {
            let what =
                format!("that of {part} {name}, and this is {} {}", self.part(), self.node_id());
            return Err(FileError::new(&dir.join(NODE_CERT), what).into());
        }
        self.0.current.replace(certified);
        Ok(())
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

    /// This member's certificate at the moment.
    #[must_use]
    pub fn cert_pem(&self) -> String {
        self.0.current.get().cert_pem.clone()
    }

    /// When this member's certificate expires.
    #[must_use]
    pub fn expires_at(&self) -> SystemTime {
        expires_at(&self.0.current.get().cert_pem).expect("it was read from a certificate")
    }

    /// This member's private key at the moment: a secret, never to be logged.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.0.current.get().key_pem.clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:?} {})", self.0.part, self.0.name)
    }
}

/// AES-128-GCM first: the fastest suite on machines with AES instructions, which carry the KV.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    })
}

fn server_config(roots: &Arc<RootCertStore>, current: Arc<Current>) -> ServerConfig {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .expect("the store holds the cluster's CA");
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(current);
    // A certificate that was replaced or has run out must not live on in a ticket. Connections last
    // long, so that whole handshakes cost nothing.
    config.send_tls13_tickets = 0;
    config
}

fn client_config(roots: &Arc<RootCertStore>, current: Arc<Current>) -> ClientConfig {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .expect("the provider has suites of TLS 1.3")
        .with_root_certificates(roots.clone())
        .with_client_cert_resolver(current)
}

pub(crate) fn roots(path: &Path, pem: &str) -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|e| FileError::new(path, e))?;
    }
    Ok(roots)
}
