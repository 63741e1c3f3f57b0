//! The service that nodes dial: one stream each, over mutual TLS. A node's name is what its
//! certificate says, whatever it says itself.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use baton_identity::{Identity, peer_node_id};
use baton_proto::ids::NodeId;
use baton_proto::message::{Hello, NodeEvent};
use baton_proto::wire::node::join_server::{Join, JoinServer};
use baton_proto::wire::node::{FromNode, ToNode, Welcome, to_node};
use baton_proto::wire::peer::peers_server::PeersServer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::accept::{self, Incoming};
use crate::cluster::LinkId;
use crate::core::Core;
use crate::driver::{FromLink, Link};
use crate::exchange::{Exchange, MAX_MESSAGE_BYTES as MAX_SHARE_BYTES};
use crate::front::door::Room;

/// Commands on their way to one node, per request that the coordinator may hold; a node that lets
/// more pile up is disconnected. When a node is lost, each of its requests may have to be cancelled
/// on another one and sent there again, all at once.
const OUTBOX_PER_REQUEST: usize = 4;
/// Largest message of a node: log-probabilities of a prompt of 250,000 tokens, with 20 others each.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// A hung node is noticed after both; a killed one when its connection ends.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// For the TLS handshake, and again for the hello.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once, half of them with one address.
const MAX_HANDSHAKES: usize = 1024;
/// A node needs one.
const MAX_STREAMS_PER_CONNECTION: u32 = 4;
/// Hashes that the driver takes at once, so that no request waits long for a large cache's news.
const MAX_HASHES: usize = 256;
/// How often nodes report their load.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// Serves nodes, and other coordinators, until `shutdown`; nodes have a part in at most `requests`
/// requests at a time.
pub(crate) async fn serve(
    listener: TcpListener,
    identity: &Identity,
    requests: usize,
    core: Core,
    driver: mpsc::Sender<FromLink>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let max_outbox = requests * OUTBOX_PER_REQUEST;
    let exchange = Exchange { name: identity.node_id().clone(), core, driver: driver.clone() };
    let exchange = PeersServer::new(exchange).max_decoding_message_size(MAX_SHARE_BYTES);
    let service = Service { name: identity.node_id().clone(), max_outbox, driver };
    let service = JoinServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .add_service(service)
        .add_service(exchange)
        .serve_with_incoming_shutdown(members(listener, identity), shutdown)
        .await
}

/// Connections of members of the cluster, with the certificate that this one has by then.
fn members(listener: TcpListener, identity: &Identity) -> Incoming<TlsStream<TcpStream>> {
    let tls = TlsAcceptor::from(Arc::new(identity.rustls_server(&[b"h2"])));
    let room = Room::new(MAX_HANDSHAKES);
    accept::connections(listener, move |stream, address| {
        let place = room.enter(address.ip());
        if place.is_none() {
            tracing::debug!(%address, "too many TLS handshakes at once: connection refused");
        }
        let (place, tls) = (place?, tls.clone());
        Some(async move {
            // Commands are small and each is wanted at once.
            let greeted = stream.set_nodelay(true).map(|()| tls.accept(stream));
            let greeted = tokio::time::timeout(GREETING_TIMEOUT, async { greeted?.await }).await;
            drop(place);
            let failed = |error: &dyn std::fmt::Display| tracing::debug!(%address, %error, "TLS");
            match greeted {
                Ok(greeted) => greeted.inspect_err(|error| failed(error)).ok(),
                Err(late) => {
                    failed(&late);
                    None
                }
            }
        })
    })
}

struct Service {
    name: NodeId,
    max_outbox: usize,
    driver: mpsc::Sender<FromLink>,
}

#[tonic::async_trait]
impl Join for Service {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<ToNode, Status>> + Send>>;

    async fn join(
        &self,
        request: Request<Streaming<FromNode>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let node = name_of(&request)?;
        let mut stream = request.into_inner();
        let hello = tokio::time::timeout(GREETING_TIMEOUT, stream.message());
        let hello = hello.await.map_err(|_| Status::deadline_exceeded("no hello"))??;
        let hello = hello.ok_or_else(|| Status::invalid_argument("the stream ended at once"))?;
        let hello = Hello::try_from(hello).map_err(|e| Status::invalid_argument(e.to_string()))?;

        let (outbox, commands) = mpsc::channel(self.max_outbox);
        let report_interval_ms = REPORT_INTERVAL.as_millis() as u32;
        let welcome = Welcome { coordinator: self.name.to_string(), report_interval_ms };
        let welcome = ToNode { message: Some(to_node::Message::Welcome(welcome)) };

        let (open, closed) = oneshot::channel();
        let (reply, answer) = oneshot::channel();
        let link = Link { outbox, _open: open };
        let hello = FromLink::Hello { node: node.clone(), hello, link, reply };
        let driver = self.driver.clone();
        // A task of its own: a node that hangs up now ends this call, but what the driver was told
        // of it must be taken back.
        let (admit, admitted) = oneshot::channel();
        tokio::spawn(async move {
            if driver.send(hello).await.is_err() {
                return;
            }
            let Ok(answer) = answer.await else { return };
            let link = answer.as_ref().ok().copied();
            // If nobody waits any more, the stream has ended, as `read` will see.
            let _ = admit.send(answer.map(|_| ()));
            if let Some(link) = link {
                read(node, link, stream, driver, closed).await;
            }
        });
        let going = |_| Status::unavailable("the coordinator is shutting down");
        admitted.await.map_err(going)?.map_err(|refusal| {
            tracing::warn!(%refusal, "refused");
            Status::failed_precondition(refusal.to_string())
        })?;
        let commands = ReceiverStream::new(commands).map(ToNode::from);
        Ok(Response::new(Box::pin(tokio_stream::once(welcome).chain(commands).map(Ok))))
    }
}

fn name_of(request: &Request<Streaming<FromNode>>) -> Result<NodeId, Status> {
    let certificates = request.peer_certs();
    let certificate = certificates.as_ref().and_then(|chain| chain.first());
    let certificate = certificate.ok_or_else(|| Status::unauthenticated("no certificate"))?;
    peer_node_id(certificate).map_err(|error| Status::permission_denied(error.to_string()))
}

/// Carries a node's messages to the driver until the stream ends or the driver has closed it.
async fn read(
    node: NodeId,
    link: LinkId,
    mut stream: Streaming<FromNode>,
    driver: mpsc::Sender<FromLink>,
    mut closed: oneshot::Receiver<()>,
) {
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            _ = &mut closed => break,
        };
        let event = match message {
            Ok(Some(message)) => NodeEvent::try_from(message),
            Ok(None) => break,
            Err(status) => {
                tracing::debug!(%node, %status, "stream broke");
                break;
            }
        };
        let Ok(event) = event.inspect_err(|error| tracing::warn!(%node, %error, "bad message"))
        else {
            break;
        };
        for event in parts(event) {
            if driver.send(FromLink::Event { node: node.clone(), link, event }).await.is_err() {
                return;
            }
        }
    }
    // If the driver is gone, so is what it knew of the node.
    let _ = driver.send(FromLink::Closed { node, link }).await;
}

/// Cuts news of many blocks into parts as [`Index::event`](crate::index::Index::event) and
/// [`Index::snapshot`](crate::index::Index::snapshot) take them.
fn parts(event: NodeEvent) -> Vec<NodeEvent> {
    match event {
        NodeEvent::Cache { sequence, stored, removed }
            if stored.len() + removed.len() > MAX_HASHES =>
        {
            let part = |stored: &[_], removed: &[_]| {
                let (stored, removed) = (stored.to_vec(), removed.to_vec());
                NodeEvent::Cache { sequence, stored, removed }
            };
            let removals = removed.chunks(MAX_HASHES).map(|removed| part(&[], removed));
            removals.chain(stored.chunks(MAX_HASHES).map(|stored| part(stored, &[]))).collect()
        }
        NodeEvent::Snapshot { sequence, hashes, last } if hashes.len() > MAX_HASHES => {
            let count = hashes.len().div_ceil(MAX_HASHES);
            let parts = hashes.chunks(MAX_HASHES).enumerate().map(|(number, part)| {
                let (hashes, last) = (part.to_vec(), last && number + 1 == count);
                NodeEvent::Snapshot { sequence, hashes, last }
            });
            parts.collect()
        }
        event => vec![event],
    }
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
