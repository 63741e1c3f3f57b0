//! Meeting a node once, to see whether transfers to it could begin.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use baton_identity::{CertificateFacts, Identity, PeerError, node_server_name};
use baton_proto::ids::NodeId;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectError, Connection, ConnectionError};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use crate::transport::ALPN;

/// Who refuses a certificate does so a round trip after the handshake; this is added to it.
const REFUSAL_TIME: Duration = Duration::from_millis(20);

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
    // For the client a handshake ends before the server has looked at its certificate.
    let settled = connection.rtt() * 4 + REFUSAL_TIME;
    if let Ok(refused) = timeout(settled, connection.closed()).await {
        return Err(refused.into());
    }
    let facts = facts(&connection);
    connection.close(0_u32.into(), b"");
    quic.wait_idle().await;
    Ok(facts?)
}

fn facts(connection: &Connection) -> Result<CertificateFacts, PeerError> {
    let shown = connection.peer_identity();
    let shown = shown.and_then(|shown| shown.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = shown.as_ref().and_then(|chain| chain.first());
    CertificateFacts::of(leaf.ok_or(PeerError::Malformed)?)
}
