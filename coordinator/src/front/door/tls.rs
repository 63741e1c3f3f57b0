//! TLS of the client ports, from files that can be read again.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use baton_identity::{ClientPortError, client_port_tls};
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
    /// For HTTP/2 and for HTTP/1.1: clients that ask for another protocol are refused.
    configs: ArcSwap<[Arc<ServerConfig>; 2]>,
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, ClientPortError> {
        let configs = ArcSwap::from_pointee(configs(&files)?);
        Ok(Self(Arc::new(Inner { files, configs })))
    }

    /// Reads the files again, for new connections; those that there are go on. If they cannot be used,
    /// nothing changes.
    pub fn reload(&self) -> Result<(), ClientPortError> {
        self.0.configs.store(Arc::new(configs(&self.0.files)?));
        Ok(())
    }

    pub(super) fn acceptor(&self, protocol: Protocol) -> TlsAcceptor {
        let configs = self.0.configs.load();
        let [grpc, http] = &**configs;
        TlsAcceptor::from(if protocol == Protocol::Grpc { grpc.clone() } else { http.clone() })
    }
}

fn configs(files: &TlsFiles) -> Result<[Arc<ServerConfig>; 2], ClientPortError> {
    let config = client_port_tls(&files.cert, &files.key, files.client_ca.as_deref())?;
    let speaking = |protocol: &[u8]| {
        let mut config = config.clone();
        config.alpn_protocols = vec![protocol.to_vec()];
        Arc::new(config)
    };
    Ok([speaking(b"h2"), speaking(b"http/1.1")])
}
