//! What a transfer sends, in whatever way: units are taken from its source ahead of the network.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_proto::ids::TransferId;
use bytes::Bytes;
use tokio::task::JoinHandle;

use crate::channel::Parcel;
use crate::direct::Transport;
use crate::frame::{Frame, LayerRun, Run};
use crate::limits::STAGED_UNITS;
use crate::link::Link;
use crate::memory::{BlockSource, MemoryLost, Soon, at_hand};
use crate::payload::PayloadStream;
use crate::send::Outbound;
use crate::wire::{self, Wire};

/// A unit that is taken from its source.
struct Staged {
    link: Arc<Link>,
    transport: Transport,
    pieces: LayerRun,
    payload: Payload,
}

enum Payload {
    Bytes(Soon<Vec<Bytes>>),
    Parcel(Arc<Wire>, Ahead<Result<Option<Parcel>, MemoryLost>>),
}

/// What goes on before anybody waits for it, and ends when it is dropped.
struct Ahead<T>(JoinHandle<T>);

impl<T> Drop for Ahead<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends units as fast as the transport takes them, and reads those that follow meanwhile. A lost
/// stream is left to whoever follows the connection, and to the receiver's next grant.
pub(crate) async fn pump(
    transfer: &Arc<Outbound>,
    id: TransferId,
    source: Arc<dyn BlockSource>,
    stream: &mut PayloadStream,
) {
    let mut staged = VecDeque::new();
    let mut current = None;
    loop {
        while staged.len() < STAGED_UNITS
            && let Some((link, transport, pieces)) = transfer.next_unit()
        {
            // Before anything is staged: who waits for a stream must not keep staging memory from
            // those that have one. What was staged for another connection is asked for again.
            if current.replace((link.id, transport)) != Some((link.id, transport)) {
                staged.clear();
            }
            if transport != Transport::Nccl && !stream.open(&link, transport).await {
                continue;
            }
            let payload = match transport {
                Transport::Quic => Payload::Bytes(source.read(pieces)),
                Transport::Nccl => match pack(&link, &source, pieces) {
                    Some(payload) => payload,
                    None => {
                        transfer.input(|sender, now| sender.handle_channel_broken(now));
                        continue;
                    }
                },
                Transport::Ipc => Payload::Bytes(references(&*source, pieces.run)),
            };
            staged.push_back(Staged { link, transport, pieces, payload });
        }
        let Some(Staged { link, transport, pieces, payload }) = staged.pop_front() else {
            transfer.payload.notified().await;
            continue;
        };
        let sent = match payload {
            Payload::Bytes(read) => read.await.map(Some),
            Payload::Parcel(wire, packing) => {
                send_parcel(transfer, (id, pieces), (&link, wire), packing).await.map(|()| None)
            }
        };
        match sent {
            Ok(Some(data)) => {
                if transfer.is_current(&link, transport) && stream.open(&link, transport).await {
                    stream.write_unit((id, transport, pieces), data).await;
                }
            }
            Ok(None) => {}
            Err(MemoryLost) => transfer.input(|sender, _| sender.handle_memory_lost()),
        }
    }
}

/// Begins to pack pieces for the connection's channel; `None` if that is broken.
fn pack(link: &Link, source: &Arc<dyn BlockSource>, pieces: LayerRun) -> Option<Payload> {
    let wire = link.wire()?.clone();
    let packing = source.pack(&*wire.channel, pieces);
    let waiting = wire.clone();
    let packing =
        tokio::spawn(async move { waiting.unless_broken(packing).await.unwrap_or(Ok(None)) });
    Some(Payload::Parcel(wire, Ahead(packing)))
}

/// Announces a parcel and hands it over, once it is packed and may be announced.
async fn send_parcel(
    transfer: &Arc<Outbound>,
    (id, pieces): (TransferId, LayerRun),
    (link, wire): (&Link, Arc<Wire>),
    mut packing: Ahead<Result<Option<Parcel>, MemoryLost>>,
) -> Result<(), MemoryLost> {
    let parcel = (&mut packing.0).await.unwrap_or(Ok(None))?;
    let permit = wire.permit().await;
    if !transfer.is_current(link, Transport::Nccl) {
        return Ok(());
    }
    let (Some(parcel), Some(permit)) = (parcel, permit) else {
        transfer.input(|sender, now| sender.handle_channel_broken(now));
        return Ok(());
    };
    let announcement = Frame::Announce(id, pieces, transfer.bytes_of(pieces));
    let sending = wire.send(link, announcement, parcel);
    wire::follow(wire, transfer.clone(), sending, permit);
    Ok(())
}

/// Asked for only if this node's memory was described to the peer.
fn references(source: &dyn BlockSource, run: Run) -> Soon<Vec<Bytes>> {
    match source.references(run) {
        Some(blocks) => {
            let bytes: Vec<u8> = blocks.iter().flat_map(|block| block.to_le_bytes()).collect();
            at_hand(vec![bytes.into()])
        }
        None => Box::pin(std::future::ready(Err(MemoryLost))),
    }
}
