//! The receiving end of one transfer, driven over QUIC.

use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use baton_proto::geometry::KvGeometry;
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{Epoch, NodeId, TransferId};
use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use crate::channel::Parcel;
use crate::direct::Transport;
use crate::endpoint::{Shared, lock};
use crate::error::ReceiveError;
use crate::frame::{FirstToken, LayerRun, Manifest, Offer, Run, UnitHeader};
use crate::inbox::Routed;
use crate::limits::UNIT_BYTES;
use crate::link::Link;
use crate::memory::{BlockSink, MemoryLost, Place, Soon};
use crate::receiver::Receiver;
use crate::sender::LinkId;

/// What is expected, and from whom.
pub struct Incoming {
    /// Names the transfer, at both ends.
    pub transfer: TransferId,
    /// The only node that may send it.
    pub from: NodeId,
    /// The only life of that node that may.
    pub epoch: Epoch,
    /// The model.
    pub root: ModelRoot,
    /// Layout of the blocks.
    pub geometry: KvGeometry,
    /// Hash chain of the full blocks; blocks of other tokens are refused.
    pub hashes: Vec<BlockHash>,
    /// Blocks of the sequence, the partial last one included.
    pub blocks: u32,
    /// The blocks here, if they are reserved; otherwise [`ReceiveHandle::reserve`] follows.
    pub room: Option<Room>,
    /// How long the blocks are kept without a sign of life from the sender, once it has offered;
    /// its offer is awaited for [`Timing::producer`](crate::Timing::producer).
    pub lease: Duration,
}

/// Blocks that are reserved for a transfer.
pub struct Room {
    /// How many leading blocks have their content already and are not wanted.
    pub held: u32,
    /// Where the others go.
    pub sink: Arc<dyn BlockSink>,
}

/// What came is no part of its transfer any more.
pub(crate) struct Late;

type Outcome = Option<Result<FirstToken, ReceiveError>>;

/// An incoming transfer. Dropping it cancels, unless the transfer has ended.
pub struct ReceiveHandle {
    shared: Arc<Shared>,
    /// `None` if it could not even start; `outcome` says why.
    transfer: Option<Arc<Inbound>>,
    outcome: watch::Receiver<Outcome>,
}

impl ReceiveHandle {
    pub(crate) fn start(shared: &Arc<Shared>, incoming: Incoming) -> Self {
        let (transfer, outcome) = match begin(shared, incoming) {
            Ok(transfer) => (Some(transfer.clone()), transfer.outcome()),
            Err(error) => (None, watch::channel(Some(Err(error))).1),
        };
        Self { shared: shared.clone(), transfer, outcome }
    }

    /// Waits for the sender's offer, or for the end.
    pub async fn offered(&self) {
        if let Some(transfer) = &self.transfer {
            let mut offered = transfer.offered.subscribe();
            // The sender lives as long as `transfer`.
            let _ = offered.wait_for(|offered| *offered).await;
        }
    }

    /// There is room for the transfer. Once only; does not block.
    pub fn reserve(&self, room: Room) {
        if let Some(transfer) = &self.transfer {
            transfer.reserve(&self.shared, room);
        }
    }

    /// Stops the transfer and tells the sender. Does not block.
    pub fn cancel(&self) {
        if let Some(transfer) = &self.transfer {
            transfer.input(&self.shared, |receiver, _| receiver.cancel());
        }
    }

    /// Waits for the end: every wanted piece verified and in place. The sink is released before
    /// this returns.
    pub async fn outcome(&self) -> Result<FirstToken, ReceiveError> {
        let mut outcome = self.outcome.clone();
        match outcome.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().expect("waited for it"),
            Err(_) => Err(ReceiveError::Cancelled),
        }
    }
}

impl Drop for ReceiveHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}

fn begin(shared: &Arc<Shared>, incoming: Incoming) -> Result<Arc<Inbound>, ReceiveError> {
    let id = incoming.transfer;
    let manifest = Manifest {
        transfer: id,
        root: incoming.root,
        geometry: incoming.geometry,
        blocks: incoming.blocks,
        hashes: incoming.hashes,
    };
    let (now, timing) = (Instant::now(), &shared.timing);
    let held = incoming.room.as_ref().map(|room| room.held);
    let machine = Receiver::new(now, manifest, held, incoming.lease, timing)?;
    let piece_bytes = incoming.geometry.piece_bytes();
    let transfer = Arc::new(Inbound {
        piece_bytes,
        state: Mutex::new(State {
            machine,
            sink: incoming.room.map(|room| room.sink),
            link: None,
            told: false,
        }),
        deadline: Notify::new(),
        offered: watch::Sender::new(false),
        outcome: watch::Sender::new(None),
    });
    let offer = lock(&shared.inbox)
        .expect(id, incoming.from, incoming.epoch, transfer.clone())
        .ok_or(ReceiveError::Busy)?;
    shared.runtime.spawn(keep_deadlines(shared.clone(), transfer.clone()));
    if let Some((link, offer)) = offer {
        take_offer(shared, &link, offer);
    }
    Ok(transfer)
}

/// An offer came over `link`.
pub(crate) fn take_offer(shared: &Shared, link: &Arc<Link>, offer: Offer) {
    let routed = lock(&shared.inbox).route(Instant::now(), link, offer);
    match routed {
        Routed::Wait => {}
        Routed::Answer(frame) => link.send(frame),
        Routed::Deliver(inbound, offer) => {
            inbound.follow(link);
            let best = shared.best(link);
            inbound.input(shared, |r, now| r.handle_offer(now, link.id, &offer, best));
        }
    }
}

async fn keep_deadlines(shared: Arc<Shared>, transfer: Arc<Inbound>) {
    while let Some(deadline) = transfer.poll_timeout() {
        tokio::select! {
            () = transfer.deadline.notified() => {}
            () = sleep_until(deadline.into()) => {
                transfer.input(&shared, |receiver, now| receiver.handle_timeout(now));
            }
        }
    }
}

/// A receiver, its sink, and the connection that it uses.
pub(crate) struct Inbound {
    piece_bytes: usize,
    state: Mutex<State>,
    /// The machine's deadline is nearer than it was, or it has ended.
    deadline: Notify,
    /// Becomes true with the sender's offer, or at the end.
    offered: watch::Sender<bool>,
    outcome: watch::Sender<Outcome>,
}

struct State {
    machine: Receiver,
    /// From the reservation of the blocks to the end.
    sink: Option<Arc<dyn BlockSink>>,
    link: Option<Arc<Link>>,
    /// The end has been told.
    told: bool,
}

impl Inbound {
    /// Gives the machine an input, passes on what it has to say, and lets go at its end.
    pub(crate) fn input(&self, shared: &Shared, input: impl FnOnce(&mut Receiver, Instant)) {
        self.change(shared, |state, now| input(&mut state.machine, now));
    }

    fn change<T>(&self, shared: &Shared, change: impl FnOnce(&mut State, Instant) -> T) -> T {
        let mut state = lock(&self.state);
        let before = state.machine.poll_timeout();
        let result = change(&mut state, Instant::now());
        state.send_frames();
        let after = state.machine.poll_timeout();
        let ended = after.is_none() && !std::mem::replace(&mut state.told, true);
        if after.is_none() {
            state.sink = None;
        }
        let offered = after.is_none() || state.machine.offered();
        let outcome = state.machine.outcome().filter(|_| ended).cloned();
        let farewell = state.machine.farewell();
        let id = state.machine.manifest().transfer;
        drop(state);
        if after.is_none() || after < before {
            self.deadline.notify_one();
        }
        self.offered.send_if_modified(|told| !std::mem::replace(told, offered) && offered);
        if let (Some(outcome), Some(farewell)) = (outcome, farewell) {
            lock(&shared.inbox).close(id, farewell);
            tracing::debug!(transfer = %id, ?outcome, "received");
            self.outcome.send_replace(Some(outcome));
        }
        result
    }

    fn reserve(&self, shared: &Shared, room: Room) {
        {
            let mut state = lock(&self.state);
            if state.machine.poll_timeout().is_some() && state.sink.is_none() {
                state.sink = Some(room.sink);
            }
        }
        self.input(shared, |receiver, now| receiver.reserve(now, room.held));
    }

    /// Most bytes of a unit.
    pub(crate) fn most_bytes(&self) -> usize {
        UNIT_BYTES.max(self.piece_bytes)
    }

    /// A whole unit has come, with this checksum: if it is sound it goes to its place, if need be while
    /// the next one arrives. The permit bounds how many are in memory. An error: its stream is not to
    /// be read on.
    pub(crate) fn unit(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        link: LinkId,
        (unit, checksum): (&UnitHeader, u32),
        (bytes, permit): (Bytes, OwnedSemaphorePermit),
    ) -> Result<Option<JoinHandle<()>>, Late> {
        let pieces = unit.pieces;
        let place = self.change(shared, |State { machine, sink, .. }, now| {
            let new = machine.unit(now, link, unit, checksum).ok().flatten();
            let place = new.zip(sink.clone()).map(|(new, sink)| (new, sink.place(pieces)));
            if machine.is_current(link) { Ok(place) } else { Err(Late) }
        })?;
        let Some((new, place)) = place else { return Ok(None) };
        let (transfer, shared) = (self.clone(), shared.clone());
        let mut landing = Box::pin(async move {
            let applied = transfer.land(place, (pieces, new), &bytes).await;
            drop((bytes, permit));
            transfer.change(&shared, |state, now| state.applied(now, applied));
        });
        // Of memory that is at hand it ends at once.
        let waits = landing.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
        // It does not end with the connection: the unit has landed.
        Ok(waits.then(|| tokio::spawn(landing)))
    }

    /// Writes the new pieces of a unit to their place, once there is one, unless the transfer ends
    /// before.
    async fn land(
        &self,
        place: Soon<Box<dyn Place>>,
        (pieces, new): (LayerRun, Vec<Run>),
        bytes: &[u8],
    ) -> Result<(), MemoryLost> {
        let mut ended = self.outcome();
        let mut place = tokio::select! {
            biased;
            place = place => place?,
            _ = ended.wait_for(Option::is_some) => return Ok(()),
        };
        {
            // Held, so that nothing is written once the transfer has ended.
            let state = lock(&self.state);
            if state.machine.outcome().is_some() {
                return Ok(());
            }
            for ordinal in new.into_iter().flat_map(Run::range) {
                let at = (ordinal - pieces.run.first) as usize * self.piece_bytes;
                place.write(ordinal, &bytes[at..][..self.piece_bytes]);
            }
        }
        place.apply().await
    }

    /// Becomes `Some` at the end.
    pub(crate) fn outcome(&self) -> watch::Receiver<Outcome> {
        self.outcome.subscribe()
    }

    /// Copies what a whole unit of references refers to, while further ones arrive; false if its
    /// stream is not to be read on. The permit bounds how many are copied at a time.
    pub(crate) fn references(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        link: &Link,
        (unit, checksum): (&UnitHeader, u32),
        blocks: Vec<u32>,
        permit: OwnedSemaphorePermit,
    ) -> bool {
        let copying = self.change(shared, |State { machine, sink, .. }, now| {
            let sound = matches!(machine.unit(now, link.id, unit, checksum), Ok(Some(_)));
            let remote = link.remote.as_ref().filter(|_| sound);
            let copy = remote.zip(sink.as_ref());
            let copy =
                copy.map(|(from, sink)| sink.clone().copy(&from.memory, unit.pieces, blocks));
            (machine.is_current(link.id), copy)
        });
        let (current, Some(copying)) = copying else { return copying.0 };
        let (transfer, shared, peer) = (self.clone(), shared.clone(), link.peer.clone());
        tokio::spawn(async move {
            let copied = copying.await;
            drop(permit);
            if copied == Ok(false) {
                shared.avoid(peer, Transport::Ipc);
            }
            transfer.change(&shared, |state, now| match copied {
                Ok(true) => state.machine.applied(now),
                Ok(false) => state.machine.unreadable(now),
                Err(MemoryLost) => state.machine.handle_memory_lost(),
            });
        });
        current
    }

    /// A parcel is announced; whether it is wanted. An error: the sender may not.
    pub(crate) fn announced(
        &self,
        shared: &Shared,
        link: LinkId,
        parcel: &UnitHeader,
    ) -> Result<bool, &'static str> {
        let checksum = parcel.checksum;
        let new = self.change(shared, |state, now| state.machine.unit(now, link, parcel, checksum));
        new.map(|new| new.is_some())
    }

    /// Copies a parcel to its blocks, unless the transfer has ended. Until then nothing of it holds
    /// them.
    pub(crate) async fn unpack(
        &self,
        pieces: LayerRun,
        parcel: Parcel,
    ) -> Result<bool, MemoryLost> {
        let sink = lock(&self.state).sink.clone();
        match sink {
            Some(sink) => sink.unpack(pieces, parcel).await,
            None => Ok(false),
        }
    }

    fn follow(&self, link: &Arc<Link>) {
        let mut state = lock(&self.state);
        if state.link.as_ref().is_none_or(|current| current.id < link.id) {
            state.link = Some(link.clone());
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        lock(&self.state).machine.poll_timeout()
    }
}

impl State {
    fn applied(&mut self, now: Instant, applied: Result<(), MemoryLost>) {
        match applied {
            Ok(()) => self.machine.applied(now),
            Err(MemoryLost) => self.machine.handle_memory_lost(),
        }
    }

    fn send_frames(&mut self) {
        while let Some(frame) = self.machine.poll_frame() {
            if let Some(link) = &self.link
                && self.machine.link() == Some(link.id)
            {
                link.send(frame);
            }
        }
    }
}
