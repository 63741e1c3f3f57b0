//! Meeting a node once, to see whether transfers to it could begin.

use std::net::SocketAddr;
use std::sync::Arc;

use baton_identity::{CertificateFacts, Identity, PeerError, node_server_name};
use baton_proto::ids::NodeId;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectError, Connection, ConnectionError};
use rustls::pki_types::CertificateDer;

use crate::transport::ALPN;

/// There is no connection.
#[derive(Debug, thiserror::Error)]
pub enum MeetError {
    /// No socket of one's own.
    #[error("no UDP socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The address cannot be dialled.
    #[error(transparent)]
    Dial(#[from] ConnectError),
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] ConnectionError),
    /// The other side's certificate says nothing.
    #[error(transparent)]
    Peer(#[from] PeerError),
}

/// Makes a connection to a node's `kv_listen` as transfers would, and ends it; returns what the node's
/// certificate says. Waits as long as QUIC does.
pub async fn meet(
    node: &NodeId,
    address: SocketAddr,
    identity: &Identity,
) -> Result<CertificateFacts, MeetError> {
    let any: SocketAddr = if address.is_ipv4() { ([0; 4], 0).into() } else { ([0; 16], 0).into() };
    let quic = quinn::Endpoint::client(any)?;
    let tls = QuicClientConfig::try_from(identity.rustls_client(&[ALPN]));
    let tls = Arc::new(tls.expect("TLS 1.3 with a suite that QUIC has"));
    let name = node_server_name(node);
    let config = quinn::ClientConfig::new(tls);
    let connection = quic.connect_with(config, address, &name.to_str())?.await?;
    accepted(&connection).await?;
    let facts = facts(&connection);
    connection.close(0_u32.into(), b"");
    quic.wait_idle().await;
    Ok(facts?)
}

/// For the client a handshake ends before the server has looked at its certificate. What is sent next,
/// here the end of an empty stream, is acknowledged after that (RFC 9001, section 5.7).
async fn accepted(connection: &Connection) -> Result<(), ConnectionError> {
    let mut stream = connection.open_uni().await?;
    let _ = stream.finish();
    match stream.stopped().await {
        Ok(_) => Ok(()),
        Err(_) => Err(connection.closed().await),
    }
}

fn facts(connection: &Connection) -> Result<CertificateFacts, PeerError> {
    let shown = connection.peer_identity();
    let shown = shown.and_then(|shown| shown.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = shown.as_ref().and_then(|chain| chain.first());
    CertificateFacts::of(leaf.ok_or(PeerError::Malformed)?)
}
