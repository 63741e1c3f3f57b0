//! Meeting a node that does not accept who meets it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use baton_kvtransfer::{MeetError, meet};
use common::Ca;
use quinn::crypto::rustls::QuicServerConfig;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};

/// Refuses every certificate, after a while.
#[derive(Debug)]
struct Slow;

impl ClientCertVerifier for Slow {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        std::thread::sleep(Duration::from_millis(200));
        Err(CertificateError::Revoked.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        unreachable!("QUIC has TLS 1.3")
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        unreachable!("the certificate is refused before")
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_is_told_however_long_that_takes() {
    let ca = Ca::new();
    let [n, m] = ["n", "m"].map(|name| ca.node(name));
    let chain = m.cert_pem();
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap);
    let key = PrivateKeyDer::from_pem_slice(m.key_pem().as_bytes()).unwrap();
    let tls = ServerConfig::builder_with_provider(default_provider().into())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(Slow));
    let mut tls = tls.with_single_cert(chain.collect(), key).unwrap();
    tls.alpn_protocols = vec![b"baton-kv/1".to_vec()];
    let tls = QuicServerConfig::try_from(tls).unwrap();
    let config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    let quic = quinn::Endpoint::server(config, ([127, 0, 0, 1], 0).into()).unwrap();
    let address = quic.local_addr().unwrap();
    tokio::spawn(async move { quic.accept().await.unwrap().await });
    let met = meet(m.node_id(), address, &n).await;
    assert!(matches!(met, Err(MeetError::Handshake(_))), "{met:?}");
}
