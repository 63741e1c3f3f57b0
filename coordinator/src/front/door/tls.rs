//! TLS of the client ports, from files that can be read again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use baton_identity::{ClientPortError, client_port_tls, expires_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

/// Where the certificate is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those between it and its authority, as PEM.
    pub cert: PathBuf,
    /// Its private key, as PEM.
    pub key: PathBuf,
    /// Authorities of which every client needs a certificate; `None`: clients need none.
    pub client_ca: Option<PathBuf>,
}

/// What is spoken above TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2.
    Grpc,
    /// HTTP/1.1.
    Http,
}

/// The server's side of TLS. Cheap to clone; all clones see what was read last.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    files: TlsFiles,
    loaded: ArcSwap<Loaded>,
}

struct Loaded {
    /// For HTTP/2 and for HTTP/1.1: clients that ask for another protocol are refused.
    configs: [Arc<ServerConfig>; 2],
    /// When the certificate expires.
    expires: Option<SystemTime>,
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, ClientPortError> {
        let loaded = ArcSwap::from_pointee(Loaded::read(&files)?);
        Ok(Self(Arc::new(Inner { files, loaded })))
    }

    /// Reads the files again, for new connections; those that there are go on. If they cannot be used,
    /// nothing changes.
    pub fn reload(&self) -> Result<(), ClientPortError> {
        self.0.loaded.store(Arc::new(Loaded::read(&self.0.files)?));
        Ok(())
    }

    /// When the certificate expires.
    pub(super) fn expires(&self) -> Option<SystemTime> {
        self.0.loaded.load().expires
    }

    pub(super) fn acceptor(&self, protocol: Protocol) -> TlsAcceptor {
        let loaded = self.0.loaded.load();
        let [grpc, http] = &loaded.configs;
        TlsAcceptor::from(if protocol == Protocol::Grpc { grpc.clone() } else { http.clone() })
    }
}

impl Loaded {
    fn read(files: &TlsFiles) -> Result<Self, ClientPortError> {
        let config = client_port_tls(&files.cert, &files.key, files.client_ca.as_deref())?;
        let speaking = |protocol: &[u8]| {
            let mut config = config.clone();
            config.alpn_protocols = vec![protocol.to_vec()];
            Arc::new(config)
        };
        let configs = [speaking(b"h2"), speaking(b"http/1.1")];
        // Its form was checked just now.
        let pem = std::fs::read_to_string(&files.cert).unwrap_or_default();
        Ok(Self { configs, expires: expires_at(&pem) })
    }
}
