//! Connections from nodes that send to this one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use baton_proto::ids::NodeId;
use quinn::{Connecting, Connection, ConnectionError, RecvStream, SendStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::direct::{Transport, is_here};
use crate::endpoint::{Shared, lock};
use crate::frame::{Frame, Hello};
use crate::limits::{MAX_HANDSHAKES, MAX_LINKS};
use crate::link::{
    CloseCode, Link, LinkError, OpenMemory, close, peer_of, read_frame, read_hello, write_frame,
    write_frames,
};
use crate::payload::read_units;
use crate::receive::take_offer;
use crate::wire::{self, take_parcel};

/// Accepts connections until the endpoint closes.
pub(crate) async fn accept_links(shared: Arc<Shared>) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = shared.quic.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let Ok(connecting) = incoming.accept() else {
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let greeted = timeout(shared.timing.message, greet(&shared, connecting)).await;
            let greeted = greeted.unwrap_or(Err(LinkError::Slow("the handshake")));
            drop(permit);
            match greeted {
                Ok((connection, hello, streams)) => serve(shared, connection, hello, streams).await,
                Err(error) => tracing::debug!(%error, "a KV connection was not accepted"),
            }
        });
    }
}

type Control = (SendStream, RecvStream);

/// Handshake and hello.
async fn greet(
    shared: &Shared,
    connecting: Connecting,
) -> Result<(Connection, Hello, Control), LinkError> {
    let connection = connecting.await?;
    let hello = async {
        peer_of(&connection)?;
        let (mut send, mut receive) = connection.accept_bi().await?;
        let hello = read_hello(&mut receive, shared.timing.message).await?;
        write_frame(&mut send, &Frame::Hello(Hello::new(shared.epoch))).await?;
        Ok((hello, (send, receive)))
    };
    match hello.await {
        Ok((hello, control)) => Ok((connection, hello, control)),
        Err(error) => {
            let error: LinkError = error;
            close(&connection, error.close_code());
            Err(error)
        }
    }
}

/// Runs a connection to its end.
async fn serve(shared: Arc<Shared>, connection: Connection, hello: Hello, control: Control) {
    let Ok(peer) = peer_of(&connection) else {
        return;
    };
    let (mut link, queue) = Link::new(shared.next_link(), peer, hello.epoch, connection);
    let invites = !shared.avoids(&link.peer, Transport::Nccl);
    let senders = hello.devices;
    link.remote = open(&shared, &link.peer, hello).await;
    let link = Arc::new(link);
    if !register(&shared, &link) {
        return;
    }
    // Who can read the sender's memory needs no channel.
    if senders > 0 && invites && link.remote.is_none() {
        tokio::spawn(wire::invite(shared.clone(), link.clone(), senders));
    }
    let (send, receive) = control;
    let error = tokio::select! {
        error = read_control(&shared, &link, receive) => error,
        Err(error) = write_frames(queue, send) => error,
        error = accept_payload(&shared, &link) => error,
    };
    tracing::debug!(from = %link.peer, %error, "a KV connection has ended");
    link.close(error.close_code());
    unregister(&shared, &link, &error);
}

/// Opens the peer's memory, if it is on this machine and there was no trouble with it lately.
async fn open(shared: &Shared, peer: &NodeId, hello: Hello) -> Option<OpenMemory> {
    let (direct, (host, memory)) = (shared.direct.get()?, hello.shared?);
    if shared.avoids(peer, Transport::Ipc) || !is_here(&host) {
        return None;
    }
    let blocks = memory.blocks;
    match timeout(shared.timing.message, direct.open(memory)).await {
        Ok(Ok(Some(memory))) => Some(OpenMemory { blocks, memory }),
        _ => {
            tracing::info!(%peer, "its memory cannot be opened; its KV comes over the network");
            shared.avoid(peer.clone(), Transport::Ipc);
            None
        }
    }
}

/// A node has one connection here: the latest of its latest life. False: this is not it.
fn register(shared: &Shared, link: &Arc<Link>) -> bool {
    let mut links = lock(&shared.inbound_links);
    let current = links.get(&link.peer);
    let refused = match current {
        Some(current) if current.epoch > link.epoch => Some(CloseCode::Epoch),
        // It took longer to look at the other one's memory.
        Some(current) if current.epoch == link.epoch && current.id > link.id => {
            Some(CloseCode::Replaced)
        }
        None if links.len() >= MAX_LINKS => Some(CloseCode::Busy),
        _ => None,
    };
    if let Some(code) = refused {
        link.close(code);
        return false;
    }
    let replaced = links.insert(link.peer.clone(), link.clone());
    drop(links);
    if let Some(replaced) = replaced {
        replaced.close(CloseCode::Replaced);
    }
    // What an earlier life of the node had promised will not come.
    let void = lock(&shared.inbox).before(&link.peer, link.epoch);
    for receiver in void {
        receiver.input(shared, |r, _| r.handle_sender_gone());
    }
    true
}

fn unregister(shared: &Shared, link: &Arc<Link>, error: &LinkError) {
    {
        let mut links = lock(&shared.inbound_links);
        if links.get(&link.peer).is_some_and(|l| l.id == link.id) {
            links.remove(&link.peer);
        }
    }
    let receivers = {
        let mut inbox = lock(&shared.inbox);
        inbox.forget_link(link.id);
        inbox.all()
    };
    let stops = matches!(error, LinkError::Connection(ConnectionError::ApplicationClosed(close))
        if CloseCode::Stopping.matches(close.error_code));
    for receiver in receivers {
        receiver.input(shared, |r, _| {
            if stops && r.link() == Some(link.id) {
                r.handle_sender_gone();
            }
            r.handle_disconnected(link.id);
        });
    }
}

async fn read_control(shared: &Arc<Shared>, link: &Arc<Link>, mut stream: RecvStream) -> LinkError {
    let mut buffer = Vec::new();
    loop {
        let frame = match read_frame(&mut stream, &mut buffer, shared.timing.message).await {
            Ok(frame) => frame,
            Err(error) => return error,
        };
        match frame {
            Frame::Offer(offer) => take_offer(shared, link, offer),
            Frame::Announce(id, pieces, bytes) => {
                if let Err(error) = take_parcel(shared, link, (id, pieces, bytes)) {
                    return error;
                }
            }
            Frame::Joined if link.invited.swap(false, Ordering::Relaxed) => {
                link.joined.store(true, Ordering::Relaxed);
            }
            Frame::Hello(_) | Frame::Invite(_) | Frame::Joined => {
                return LinkError::Unexpected(frame.to_string());
            }
            Frame::Unable(_) => {
                if let Some(wire) = link.wire() {
                    wire.break_off();
                }
                pass_on(shared, link, frame);
            }
            other => pass_on(shared, link, other),
        }
    }
}

/// A frame about a transfer that is not known is late, and dropped.
fn pass_on(shared: &Shared, link: &Arc<Link>, frame: Frame) {
    let Some(id) = frame.transfer() else {
        return;
    };
    let receiver = lock(&shared.inbox).find(id, link);
    match receiver {
        Some(receiver) => receiver.input(shared, |r, now| r.handle_frame(now, link.id, frame)),
        None if matches!(frame, Frame::Cancel(..)) => lock(&shared.inbox).withdraw(id, link),
        None => {}
    }
}

/// Reads every payload stream in a task of its own; QUIC bounds how many there are.
async fn accept_payload(shared: &Arc<Shared>, link: &Arc<Link>) -> LinkError {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            stream = link.connection.accept_uni() => match stream {
                Ok(stream) => {
                    streams.spawn(read_units(shared.clone(), link.clone(), stream));
                }
                Err(error) => return error.into(),
            },
            Some(Ok(read)) = streams.join_next() => {
                if let Err(error) = read {
                    return error;
                }
            }
        }
    }
}
