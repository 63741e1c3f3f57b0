//! Connections to nodes that this one sends to: one for each, kept up while it is used.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_identity::node_server_name;
use baton_proto::message::Peer;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::channel::ChannelEnd;
use crate::direct::Transport;
use crate::endpoint::{Shared, lock};
use crate::error::SendError;
use crate::frame::{Frame, Hello};
use crate::limits::MAX_LINKS;
use crate::link::{
    Link, LinkError, close, peer_of, read_frame, read_hello, write_frame, write_frames,
};
use crate::transport::is_refused;
use crate::wire;

/// Pauses between attempts to connect.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(1);

/// A connection to a receiver, as its transfers see it.
#[derive(Clone)]
pub(crate) enum LinkState {
    /// It is being made; why it is not there.
    Down(String),
    Up(Arc<Link>),
    /// It will not be.
    Failed(SendError),
}

/// Keeps the connection to one life of a node. Each subscriber of `state` is a transfer.
pub(crate) struct Dialer {
    peer: Peer,
    state: watch::Sender<LinkState>,
    retired: Notify,
}

impl Dialer {
    pub(crate) fn has_channel(&self) -> bool {
        matches!(&*self.state.borrow(), LinkState::Up(link) if link.wire().is_some())
    }
}

/// The connection to `peer`, made if there is none.
pub(crate) fn link_to(
    shared: &Arc<Shared>,
    peer: &Peer,
) -> Result<watch::Receiver<LinkState>, SendError> {
    let mut dialers = lock(&shared.dialers);
    match dialers.get(&peer.node) {
        Some(dialer) if dialer.peer == *peer => return Ok(dialer.state.subscribe()),
        Some(dialer) if dialer.peer.epoch > peer.epoch => {
            return Err(SendError::WrongEpoch {
                expected: peer.epoch.0,
                theirs: dialer.peer.epoch.0,
            });
        }
        Some(dialer) => dialer.retired.notify_one(),
        None if dialers.len() >= MAX_LINKS => return Err(SendError::Busy),
        None => {}
    }
    let dialer = Arc::new(Dialer {
        peer: peer.clone(),
        state: watch::Sender::new(LinkState::Down("no connection yet".to_owned())),
        retired: Notify::new(),
    });
    dialers.insert(peer.node.clone(), dialer.clone());
    let link = dialer.state.subscribe();
    let shared = shared.clone();
    shared.runtime.clone().spawn(async move {
        let error = tokio::select! {
            error = keep_link(&shared, &dialer) => error,
            () = dialer.retired.notified() => {
                Some(SendError::Unreachable("another life of it, or another address, is in use".to_owned()))
            }
        };
        forget(&shared, &dialer);
        if let Some(error) = error {
            dialer.state.send_replace(LinkState::Failed(error));
        }
    });
    Ok(link)
}

fn forget(shared: &Shared, dialer: &Arc<Dialer>) {
    let mut dialers = lock(&shared.dialers);
    let node = &dialer.peer.node;
    if dialers.get(node).is_some_and(|d| Arc::ptr_eq(d, dialer)) {
        dialers.remove(node);
    }
}

/// Connects, again and again, until that is hopeless (the error) or nobody needs it.
async fn keep_link(shared: &Arc<Shared>, dialer: &Arc<Dialer>) -> Option<SendError> {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let connecting = timeout(shared.timing.message, connect(shared, &dialer.peer)).await;
        let error = match connecting.unwrap_or(Err(LinkError::Slow("the handshake"))) {
            Ok(connected) => {
                backoff = FIRST_BACKOFF;
                serve(shared, dialer, connected).await
            }
            Err(error) => error,
        };
        tracing::debug!(to = %dialer.peer.node, %error, "no KV connection");
        if let Some(error) = error.fatal() {
            return Some(error);
        }
        dialer.state.send_replace(LinkState::Down(error.to_string()));
        {
            let mut dialers = lock(&shared.dialers);
            if dialer.state.receiver_count() == 0 {
                dialers.retain(|_, other| !Arc::ptr_eq(other, dialer));
                return None;
            }
        }
        sleep(backoff).await;
        backoff = (backoff * 2).min(LAST_BACKOFF);
    }
}

struct Connected {
    link: Link,
    queue: mpsc::Receiver<Frame>,
    send: SendStream,
    receive: RecvStream,
}

async fn connect(shared: &Shared, peer: &Peer) -> Result<Connected, LinkError> {
    let connection = handshake(shared, peer).await?;
    match greet(shared, peer, &connection).await {
        Ok((send, receive)) => {
            let id = shared.next_link();
            let (link, queue) = Link::new(id, peer.node.clone(), peer.epoch, connection);
            Ok(Connected { link, queue, send, receive })
        }
        Err(error) => {
            close(&connection, error.close_code());
            Err(error)
        }
    }
}

async fn handshake(shared: &Shared, peer: &Peer) -> Result<Connection, LinkError> {
    let address = resolve(&peer.kv_address).await?;
    if is_refused(address) {
        return Err(LinkError::Refused(address));
    }
    let name = node_server_name(&peer.node);
    let dial = |error: quinn::ConnectError| LinkError::Dial(error.to_string());
    let connecting =
        shared.quic.connect_with(shared.client.clone(), address, &name.to_str()).map_err(dial)?;
    Ok(connecting.await?)
}

async fn resolve(address: &str) -> Result<SocketAddr, LinkError> {
    let found = tokio::net::lookup_host(address).await;
    let found = found.map(|mut addresses| addresses.next());
    match found {
        Ok(Some(address)) => Ok(address),
        Ok(None) => Err(LinkError::Dial(format!("{address} has no address"))),
        Err(error) => Err(LinkError::Dial(format!("{address}: {error}"))),
    }
}

/// Checks who answers, and which life of it.
async fn greet(
    shared: &Shared,
    peer: &Peer,
    connection: &Connection,
) -> Result<(SendStream, RecvStream), LinkError> {
    let node = peer_of(connection)?;
    if node != peer.node {
        return Err(LinkError::Identity(format!("{node} answers")));
    }
    let (mut send, mut receive) = connection.open_bi().await?;
    let hello = Hello {
        shared: shared.described(),
        devices: devices_for_channel(shared, peer),
        ..Hello::new(shared.epoch)
    };
    write_frame(&mut send, &Frame::Hello(hello)).await?;
    let hello = read_hello(&mut receive, shared.timing.message).await?;
    if hello.epoch != peer.epoch {
        return Err(LinkError::Epoch { expected: peer.epoch.0, theirs: hello.epoch.0 });
    }
    Ok((send, receive))
}

/// 0 if there is to be no channel.
fn devices_for_channel(shared: &Shared, peer: &Peer) -> u8 {
    let channels = shared.channels.get().filter(|_| !shared.avoids(&peer.node, Transport::Nccl));
    channels.map_or(0, |channels| channels.devices())
}

/// Runs a connection to its end.
async fn serve(shared: &Arc<Shared>, dialer: &Dialer, connected: Connected) -> LinkError {
    let Connected { link, queue, send, receive } = connected;
    let link = Arc::new(link);
    dialer.state.send_replace(LinkState::Up(link.clone()));
    let error = tokio::select! {
        error = read_control(shared, &link, receive) => error,
        Err(error) = write_frames(queue, send) => error,
    };
    link.close(error.close_code());
    error
}

async fn read_control(shared: &Arc<Shared>, link: &Arc<Link>, mut stream: RecvStream) -> LinkError {
    let mut buffer = Vec::new();
    loop {
        let frame = match read_frame(&mut stream, &mut buffer, shared.timing.message).await {
            Ok(frame) => frame,
            Err(error) => return error,
        };
        if let Frame::Invite(name) = &frame
            && shared.channels.get().is_some()
            && !link.invited.swap(true, Ordering::Relaxed)
        {
            tokio::spawn(wire::keep(
                shared.clone(),
                link.clone(),
                name.clone(),
                ChannelEnd::Sending,
            ));
            continue;
        }
        let Some(id) = frame.transfer() else {
            return LinkError::Unexpected(frame.to_string());
        };
        // A frame about a transfer that has ended is late, and dropped.
        let transfer = shared.outbound.get(&id).map(|transfer| transfer.clone());
        if let Some(transfer) = transfer {
            // The receiver asks for bytes instead: its end of the channel is broken.
            if matches!(&frame, Frame::Grant(grant) if grant.transport == Transport::Quic)
                && transfer.is_current(link, Transport::Nccl)
                && let Some(wire) = link.wire()
            {
                wire.break_off();
            }
            transfer.input(|sender, now| sender.handle_frame(now, link.id, frame));
        }
    }
}
