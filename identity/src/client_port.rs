//! TLS of ports for clients outside of the cluster, with a certificate from any authority.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::{ServerConfig, version};

use crate::certified::certificates;
use crate::files::{self, FileError};
use crate::identity::{provider, roots};

/// A client port's certificate cannot be used; names the file and what is wrong.
#[derive(Debug, thiserror::Error)]
#[error("TLS: {0}")]
pub struct ClientPortError(#[from] FileError);

/// TLS 1.3 with the certificate chain and the private key in these PEM files. With `client_ca`, only
/// for clients that have a certificate of one of the authorities in it.
pub fn client_port_tls(
    cert: &Path,
    key: &Path,
    client_ca: Option<&Path>,
) -> Result<ServerConfig, ClientPortError> {
    let chain = certificates(cert, &files::read(cert)?)?;
    let private = PrivateKeyDer::from_pem_slice(files::read_key(key)?.as_bytes())
        .map_err(|_| FileError::new(key, "no private key in PEM form"))?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .expect("the provider's suites are those of TLS 1.3");
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(roots(path, &files::read(path)?)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
            let verifier = verifier.map_err(|e| FileError::new(path, e))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder.with_single_cert(chain, private);
    Ok(config.map_err(|e| FileError::new(key, format!("does not fit {}: {e}", cert.display())))?)
}
