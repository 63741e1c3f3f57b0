//! Accepting connections: places, TLS, and how long both may take.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use axum::http::StatusCode;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::Door;
use super::bodies::{BodyMemory, MAX_BODIES_BYTES};
use super::connection::Connection;
use super::room::{Place, Room};
use super::tls::{Protocol, Tls};
use crate::accept::{self, Incoming};
use crate::front::openai::error::overloaded;

/// Default of how many connections there may be.
pub(crate) const MAX_CONNECTIONS: usize = 4096;

/// How long clients are waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For a TLS handshake.
    pub(crate) handshake: Duration,
    /// For the first bytes of a connection.
    pub(crate) greeting: Duration,
    /// For a client that takes nothing of what is written to it.
    pub(crate) stall: Duration,
    /// For all headers of an HTTP/1.1 request, counted from the end of the one before. Longer than
    /// clients keep idle connections, so that it is them who close these.
    pub(crate) headers: Duration,
    /// For all of a request's body.
    pub(crate) body: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            greeting: Duration::from_secs(10),
            stall: Duration::from_secs(60),
            headers: Duration::from_secs(75),
            body: Duration::from_secs(60),
        }
    }
}

/// What both client ports share. Cheap to clone.
#[derive(Clone)]
pub struct Entrance {
    pub(crate) door: Door,
    tls: Option<Tls>,
    room: Room,
    pub(super) bodies: BodyMemory,
    pub(crate) patience: Patience,
    /// What HTTP clients are told when the cluster has all it can take.
    pub(super) overload_status: StatusCode,
}

impl Entrance {
    /// An entrance through `door`; plaintext without `tls`.
    #[must_use]
    pub fn new(door: Door, tls: Option<Tls>, max_connections: usize) -> Self {
        let (room, bodies) = (Room::new(max_connections), BodyMemory::new(MAX_BODIES_BYTES));
        let (patience, overload_status) = (Patience::default(), overloaded());
        Self { door, tls, room, bodies, patience, overload_status }
    }

    /// The same, but the bodies of all requests may take so many bytes together.
    #[must_use]
    pub fn with_bodies(self, most_bytes: usize) -> Self {
        Self { bodies: BodyMemory::new(most_bytes), ..self }
    }

    /// The same, but HTTP clients are told of an overload with this status.
    #[must_use]
    pub fn with_overload_status(self, overload_status: StatusCode) -> Self {
        Self { overload_status, ..self }
    }

    /// Open to everybody who reaches it.
    #[must_use]
    pub fn open() -> Self {
        Self::new(Door::default(), None, MAX_CONNECTIONS)
    }

    /// Reads the files of keys and of certificates again, and says in the log what came of it. What
    /// cannot be used changes nothing.
    pub fn reload(&self) {
        match self.door.reload() {
            Ok(Some(count)) => tracing::info!(count, "API keys read again"),
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "API keys stay as they are"),
        }
        match self.tls.as_ref().map(Tls::reload) {
            Some(Ok(())) => tracing::info!("TLS certificate read again"),
            None => {}
            Some(Err(error)) => tracing::error!(%error, "the TLS certificate stays as it is"),
        }
    }

    /// When the certificate expires; `None` without one.
    pub(crate) fn expires(&self) -> Option<SystemTime> {
        self.tls.as_ref().and_then(Tls::expires)
    }

    /// Begins to accept connections.
    pub(crate) fn incoming(
        &self,
        listener: TcpListener,
        protocol: Protocol,
    ) -> Incoming<Connection> {
        let Self { tls, room, patience, .. } = self.clone();
        accept::connections(listener, move |stream, address| {
            let Some(place) = room.enter(address.ip()) else {
                refused(address, "too many connections");
                return None;
            };
            let acceptor = tls.as_ref().map(|tls| tls.acceptor(protocol));
            Some(async move {
                let greeted = greet(stream, place, acceptor, patience).await;
                greeted.map_err(|why| refused(address, &why)).ok()
            })
        })
    }
}

/// Makes a connection of a stream; the error says what is wrong with the client.
async fn greet(
    stream: TcpStream,
    place: Place,
    acceptor: Option<TlsAcceptor>,
    patience: Patience,
) -> Result<Connection, String> {
    // Tokens are small and each is wanted at once.
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let Some(acceptor) = acceptor else { return Ok(Connection::plain(stream, place, patience)) };
    let stream = tokio::time::timeout(patience.handshake, acceptor.accept(stream)).await;
    let stream = stream.map_err(|_| "the TLS handshake takes too long")?;
    let stream = stream.map_err(|error| format!("TLS: {error}"))?;
    Ok(Connection::tls(stream, place, patience))
}

fn refused(address: SocketAddr, why: &str) {
    metrics::counter!("baton_refused_connections_total").increment(1);
    tracing::debug!(%address, why, "connection refused");
}
