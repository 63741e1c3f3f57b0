//! A member's certificate with its key, and the one that counts at the moment.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use baton_proto::ids::NodeId;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, SignatureScheme};

use crate::files::{self, CA_CERT, FileError, NODE_CERT, NODE_KEY};
use crate::identity::provider;
use crate::name::{self, Part};

/// A certificate and its key, as files say them and ready for TLS.
pub(crate) struct Certified {
    pub(crate) cert_pem: String,
    pub(crate) key_pem: String,
    key: Arc<CertifiedKey>,
}

impl Certified {
    /// Loads both from `dir` and checks that they belong together and are valid now under `roots`.
    pub(crate) fn load(
        dir: &Path,
        roots: &Arc<RootCertStore>,
    ) -> Result<(NodeId, Part, Self), FileError> {
        let (cert, key) = (dir.join(NODE_CERT), dir.join(NODE_KEY));
        let (cert_pem, key_pem) = (files::read(&cert)?, files::read_key(&key)?);
        let chain = certificates(&cert, &cert_pem)?;
        let (name, part) = name::peer(&chain[0]).map_err(|e| FileError::new(&cert, e))?;
        check_issued_by(roots, &chain, &part.dns_name(&name))
            .map_err(|e| FileError::new(&cert, format!("not valid under {CA_CERT}: {e}")))?;
        let private = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|_| FileError::new(&key, "no private key in PEM form"))?;
        let certified = CertifiedKey::from_der(chain, private, &provider())
            .map_err(|e| FileError::new(&key, format!("does not fit {NODE_CERT}: {e}")))?;
        Ok((name, part, Self { cert_pem, key_pem, key: Arc::new(certified) }))
    }
}

/// What new connections are made with.
pub(crate) struct Current(ArcSwap<Certified>);

impl Current {
    pub(crate) fn new(certified: Certified) -> Self {
        Self(ArcSwap::from_pointee(certified))
    }

    pub(crate) fn get(&self) -> Guard<Arc<Certified>> {
        self.0.load()
    }

    pub(crate) fn replace(&self, certified: Certified) {
        self.0.store(Arc::new(certified));
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Current(..)")
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get().key.clone())
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.get().key.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

pub(crate) fn certificates(
    path: &Path,
    pem: &str,
) -> Result<Vec<CertificateDer<'static>>, FileError> {
    match CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>() {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        _ => Err(FileError::new(path, "no certificate in PEM form")),
    }
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
