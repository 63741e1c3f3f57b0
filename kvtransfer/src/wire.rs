//! The channel of a connection: how it comes up, what goes through it, and how it breaks.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use baton_proto::ids::TransferId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::channel::{Channel, ChannelEnd, ChannelName, Parcel};
use crate::direct::Transport;
use crate::endpoint::{Shared, lock};
use crate::frame::{Frame, FrameError, LayerRun, UnitHeader};
use crate::limits::{JOIN_GRACE, MAX_ANNOUNCED, MAX_EXPECTED};
use crate::link::{Link, LinkError};
use crate::memory::{MemoryLost, Soon};
use crate::receive::Inbound;
use crate::send::Outbound;

/// A channel that both ends have joined.
pub(crate) struct Wire {
    pub(crate) channel: Arc<dyn Channel>,
    broken: watch::Sender<bool>,
    /// Held while a parcel is announced and handed over.
    order: Mutex<()>,
    /// Parcels that may be announced and not there yet.
    permits: Arc<Semaphore>,
}

impl Wire {
    fn new(channel: Arc<dyn Channel>, end: ChannelEnd) -> Self {
        let permits = match end {
            ChannelEnd::Sending => MAX_ANNOUNCED,
            ChannelEnd::Receiving => MAX_EXPECTED,
        };
        let permits = Arc::new(Semaphore::new(permits));
        Self { channel, broken: watch::Sender::new(false), order: Mutex::new(()), permits }
    }

    pub(crate) fn is_broken(&self) -> bool {
        *self.broken.borrow()
    }

    /// Breaks the channel; whoever waits for it hears so at once, whatever the channel does.
    pub(crate) fn break_off(&self) {
        if !self.broken.send_replace(true) {
            self.channel.close();
        }
    }

    /// What comes of `work`; `None` if the channel breaks before.
    pub(crate) async fn unless_broken<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut broken = self.broken.subscribe();
        tokio::select! {
            done = work => Some(done),
            _ = broken.wait_for(|broken| *broken) => None,
        }
    }

    /// Waits until another parcel may be announced.
    pub(crate) async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.unless_broken(self.permits.clone().acquire_owned()).await?.ok()
    }

    /// Announces a parcel and sends it; both in the same order as all others.
    pub(crate) fn send(&self, link: &Link, announcement: Frame, parcel: Parcel) -> Soon<bool> {
        let _order = lock(&self.order);
        link.send(announcement);
        self.channel.send(parcel)
    }
}

/// Sees that a parcel which was handed over arrives; if not, its transfer goes on in another way.
pub(crate) fn follow(
    wire: Arc<Wire>,
    transfer: Arc<Outbound>,
    sending: Soon<bool>,
    permit: OwnedSemaphorePermit,
) {
    tokio::spawn(async move {
        let sent = wire.unless_broken(sending).await;
        drop(permit);
        if sent != Some(Ok(true)) {
            wire.break_off();
            transfer.input(|sender, now| sender.handle_channel_broken(now));
        }
    });
}

/// The sender has announced a parcel. An error closes the connection.
pub(crate) fn take_parcel(
    shared: &Arc<Shared>,
    link: &Arc<Link>,
    (id, pieces, bytes): (TransferId, LayerRun, u32),
) -> Result<(), LinkError> {
    let Some(wire) = link.wire.get().cloned() else {
        return Err(LinkError::Unexpected("announce".to_owned()));
    };
    if wire.is_broken() {
        return unwanted(shared, link, id);
    }
    let Ok(permit) = wire.permits.clone().try_acquire_owned() else {
        return Err(FrameError::OutOfRange { what: "parcels", value: MAX_EXPECTED as u32 }.into());
    };
    let header =
        UnitHeader { transfer: id, pieces, transport: Transport::Nccl, length: bytes, checksum: 0 };
    let inbound = lock(&shared.inbox).find(id, link);
    let wanted = match &inbound {
        Some(inbound) => inbound.announced(shared, link.id, &header).map_err(LinkError::Broke)?,
        None => false,
    };
    // Wanted or not: the other end sends it, and what follows comes after it.
    let receiving = wire.channel.receive(bytes as usize);
    let (shared, inbound) = (shared.clone(), inbound.filter(|_| wanted));
    tokio::spawn(async move {
        let parcel = wire.unless_broken(receiving).await;
        drop(permit);
        let parcel = parcel.and_then(Result::ok).flatten();
        if parcel.is_none() {
            wire.break_off();
        }
        if let Some(inbound) = inbound {
            unpack(&shared, &inbound, pieces, parcel).await;
        }
    });
    Ok(())
}

/// A parcel that will not come: its transfer is told so, if it has not been.
fn unwanted(shared: &Shared, link: &Arc<Link>, id: TransferId) -> Result<(), LinkError> {
    let inbound = lock(&shared.inbox).find(id, link);
    if let Some(inbound) = inbound {
        inbound.input(shared, |receiver, now| receiver.handle_channel_broken(now, link.id));
    }
    Ok(())
}

async fn unpack(shared: &Shared, inbound: &Inbound, pieces: LayerRun, parcel: Option<Parcel>) {
    let unpacked = match parcel {
        Some(parcel) => inbound.unpack(pieces, parcel).await,
        None => Ok(false),
    };
    inbound.input(shared, |receiver, now| match unpacked {
        Ok(true) => receiver.applied(now),
        Ok(false) => receiver.unreadable(now),
        Err(MemoryLost) => receiver.handle_memory_lost(),
    });
}

/// Names a channel and joins it, if the sender wants one and there is no better way.
pub(crate) async fn invite(shared: Arc<Shared>, link: Arc<Link>, senders: u8) {
    let Some(channels) = shared.channels.get() else { return };
    let name = match timeout(shared.timing.join, channels.name(senders)).await {
        Ok(Ok(Ok(name))) => name,
        Ok(Ok(Err(reason))) => return refused(&shared, &link, &reason),
        _ => return refused(&shared, &link, "it has no name"),
    };
    link.invited.store(true, Ordering::Relaxed);
    link.send(Frame::Invite(name.clone()));
    keep(shared, link, name, ChannelEnd::Receiving).await;
}

/// Joins a channel and watches over it until it breaks or the connection is lost.
pub(crate) async fn keep(shared: Arc<Shared>, link: Arc<Link>, name: ChannelName, end: ChannelEnd) {
    let Some(channels) = shared.channels.get() else { return };
    let (join, patience) = (shared.timing.join, shared.timing.channel);
    // It keeps its own deadline, unless the library hangs.
    let joining = timeout(join + JOIN_GRACE, channels.join(name, end, join, patience));
    let joined = tokio::select! {
        joined = joining => joined,
        // The library goes on until its deadline: who connects and leaves, again and again, must not
        // have it do so many times at once.
        _ = link.connection.closed() => return refused(&shared, &link, "the connection was lost"),
    };
    let channel = match joined {
        Ok(Ok(Ok(channel))) => channel,
        Ok(Ok(Err(reason))) => return refused(&shared, &link, &reason),
        _ => return refused(&shared, &link, "joining takes too long"),
    };
    let wire = link.wire.get_or_init(|| Arc::new(Wire::new(channel, end)));
    if end == ChannelEnd::Sending {
        link.send(Frame::Joined);
    }
    tracing::info!(peer = %link.peer, "a channel between devices is up");
    let stuck = async {
        while !wire.channel.is_stuck() {
            sleep(patience / 2).await;
        }
    };
    tokio::select! {
        _ = wire.unless_broken(stuck) => refused(&shared, &link, "it broke"),
        _ = link.connection.closed() => {}
    }
    wire.break_off();
}

/// Said once, as a connection has one channel, and no other one is asked for soon.
fn refused(shared: &Shared, link: &Link, reason: &str) {
    let peer = &link.peer;
    tracing::warn!(%peer, reason, "no channel between devices; KV goes over the network");
    shared.avoid(peer.clone(), Transport::Nccl);
}
