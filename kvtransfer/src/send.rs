//! The sending end of one transfer, driven over QUIC.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_proto::geometry::KvGeometry;
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::TransferId;
use baton_proto::message::Peer;
use dashmap::Entry;
use tokio::sync::{Notify, watch};
use tokio::time::sleep_until;

use crate::dial::{self, LinkState};
use crate::direct::Transport;
use crate::endpoint::{Shared, lock};
use crate::error::SendError;
use crate::frame::{FirstToken, LayerRun, Manifest};
use crate::limits::MAX_OUTGOING;
use crate::link::Link;
use crate::memory::BlockSource;
use crate::payload::PayloadStream;
use crate::pump::pump;
use crate::sender::Sender;

/// What is to be sent, and to whom.
pub struct Outgoing {
    /// Names the transfer, at both ends.
    pub transfer: TransferId,
    /// The receiver.
    pub peer: Peer,
    /// The model.
    pub root: ModelRoot,
    /// Layout of the blocks.
    pub geometry: KvGeometry,
    /// Hash chain of the full blocks.
    pub hashes: Vec<BlockHash>,
    /// Blocks of the sequence, the partial last one included.
    pub blocks: u32,
    /// Where the blocks are.
    pub source: Arc<dyn BlockSource>,
}

/// A transfer that has arrived. Durations on the sender's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// From the first payload handed to the transport to `finish`.
    pub hidden: Duration,
    /// From `finish` to the receiver's acknowledgement that everything is in place.
    pub exposed: Duration,
    /// Payload bytes that the receiver wanted; 0 if it held everything.
    pub bytes: u64,
    /// Blocks that the receiver wanted.
    pub blocks: u32,
    /// How they travelled, at the end.
    pub transport: Transport,
}

/// An outgoing transfer. Dropping it cancels, unless the transfer has ended.
pub struct SendHandle {
    /// `None` if it could not even start; `outcome` says why.
    transfer: Option<Arc<Outbound>>,
    outcome: watch::Receiver<Option<Result<Sent, SendError>>>,
}

impl SendHandle {
    pub(crate) fn start(shared: &Arc<Shared>, outgoing: Outgoing) -> Self {
        let (tell, outcome) = watch::channel(None);
        match begin(shared, outgoing, &tell) {
            Ok(transfer) => Self { transfer: Some(transfer), outcome },
            Err(error) => {
                tell.send_replace(Some(Err(error)));
                Self { transfer: None, outcome }
            }
        }
    }

    /// Blocks `ordinals` are computed and final in `layer`. Does not block.
    pub fn ready(&self, layer: u32, ordinals: Range<u32>) {
        self.input(|sender, now| sender.ready(now, layer, ordinals));
    }

    /// The prompt is computed and this is the first token. Does not block.
    pub fn finish(&self, first: FirstToken) {
        self.input(|sender, now| sender.finish(now, first));
    }

    /// Stops the transfer and tells the receiver. Does not block.
    pub fn cancel(&self) {
        self.input(|sender, _| sender.cancel());
    }

    /// Waits for the end. The source is released before this returns.
    pub async fn outcome(&self) -> Result<Sent, SendError> {
        let mut outcome = self.outcome.clone();
        match outcome.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().expect("waited for it"),
            // The runtime that drives the endpoint is gone.
            Err(_) => Err(SendError::Cancelled),
        }
    }

    fn input(&self, input: impl FnOnce(&mut Sender, Instant)) {
        if let Some(transfer) = &self.transfer {
            transfer.input(input);
        }
    }
}

impl Drop for SendHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}

fn begin(
    shared: &Arc<Shared>,
    outgoing: Outgoing,
    tell: &watch::Sender<Option<Result<Sent, SendError>>>,
) -> Result<Arc<Outbound>, SendError> {
    let id = outgoing.transfer;
    let manifest = Manifest {
        transfer: id,
        root: outgoing.root,
        geometry: outgoing.geometry,
        blocks: outgoing.blocks,
        hashes: outgoing.hashes,
    };
    let machine = Sender::new(Instant::now(), manifest, shared.timing)?;
    let transfer = Arc::new(Outbound {
        state: Mutex::new(State { machine, link: None }),
        deadline: Notify::new(),
        payload: Notify::new(),
    });
    if shared.outbound.len() >= MAX_OUTGOING {
        return Err(SendError::Busy);
    }
    match shared.outbound.entry(id) {
        Entry::Occupied(_) => return Err(SendError::Busy),
        Entry::Vacant(place) => drop(place.insert(transfer.clone())),
    }
    let task = {
        let (shared, transfer, tell) = (shared.clone(), transfer.clone(), tell.clone());
        async move {
            let outcome = run(&shared, &transfer, &outgoing.peer, outgoing.source).await;
            shared.outbound.remove(&id);
            if let Ok(sent) = &outcome {
                shared.count(sent);
            }
            tracing::debug!(transfer = %id, to = %outgoing.peer.node, ?outcome, "sent");
            tell.send_replace(Some(outcome));
        }
    };
    shared.runtime.spawn(task);
    Ok(transfer)
}

/// A sender and the connection that it uses.
pub(crate) struct Outbound {
    state: Mutex<State>,
    /// The machine's deadline is nearer than it was, or it has ended.
    deadline: Notify,
    /// There may be units to send.
    pub(crate) payload: Notify,
}

struct State {
    machine: Sender,
    link: Option<Arc<Link>>,
}

impl Outbound {
    /// Gives the machine an input and passes on what it has to say.
    pub(crate) fn input(&self, input: impl FnOnce(&mut Sender, Instant)) {
        let mut state = lock(&self.state);
        let before = state.machine.poll_timeout();
        input(&mut state.machine, Instant::now());
        state.send_frames();
        let after = state.machine.poll_timeout();
        drop(state);
        if after.is_none() || after < before {
            self.deadline.notify_one();
        }
        self.payload.notify_one();
    }

    fn follow(&self, link: &LinkState) {
        if let LinkState::Up(link) = link {
            lock(&self.state).link = Some(link.clone());
        }
        self.input(|sender, now| match link {
            LinkState::Up(link) => sender.handle_connected(now, link.id),
            LinkState::Down(why) => sender.handle_disconnected(now, why),
            LinkState::Failed(error) => sender.handle_failed(error.clone()),
        });
    }

    pub(crate) fn next_unit(&self) -> Option<(Arc<Link>, Transport, LayerRun)> {
        let mut state = lock(&self.state);
        let link = state.link.clone()?;
        if state.machine.link() != Some(link.id) {
            return None;
        }
        let pieces = state.machine.poll_unit(Instant::now())?;
        Some((link, state.machine.transport(), pieces))
    }

    /// Whether units for this connection are still wanted in this way.
    pub(crate) fn is_current(&self, link: &Link, transport: Transport) -> bool {
        let machine = &lock(&self.state).machine;
        machine.link() == Some(link.id) && machine.transport() == transport
    }

    pub(crate) fn bytes_of(&self, pieces: LayerRun) -> u32 {
        let piece_bytes = lock(&self.state).machine.manifest().geometry.piece_bytes();
        u32::try_from(piece_bytes * pieces.run.count as usize).expect("a parcel is far below 4 GiB")
    }

    fn poll_timeout(&self) -> Option<Instant> {
        lock(&self.state).machine.poll_timeout()
    }
}

impl State {
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

/// Drives a transfer to its end. The source and everything taken from it is dropped on return.
async fn run(
    shared: &Arc<Shared>,
    transfer: &Arc<Outbound>,
    peer: &Peer,
    source: Arc<dyn BlockSource>,
) -> Result<Sent, SendError> {
    let mut stream = PayloadStream::default();
    let id = lock(&transfer.state).machine.manifest().transfer;
    tokio::select! {
        () = control(shared, transfer, peer) => {}
        () = pump(transfer, id, source, &mut stream) => {}
    }
    // Also after success: the receiver has everything, and what QUIC still holds is let go.
    stream.abandon();
    let state = lock(&transfer.state);
    state.machine.outcome().cloned().expect("the transfer has ended")
}

/// Follows the connection and keeps the deadlines, until the machine has ended.
async fn control(shared: &Arc<Shared>, transfer: &Outbound, peer: &Peer) {
    let mut link = match dial::link_to(shared, peer) {
        Ok(link) => link,
        Err(error) => return transfer.input(|sender, _| sender.handle_failed(error)),
    };
    link.mark_changed();
    while let Some(deadline) = transfer.poll_timeout() {
        tokio::select! {
            () = transfer.deadline.notified() => {}
            () = sleep_until(deadline.into()) => {
                transfer.input(|sender, now| sender.handle_timeout(now));
            }
            changed = link.changed() => {
                let state = match changed {
                    Ok(()) => link.borrow_and_update().clone(),
                    Err(_) => LinkState::Failed(SendError::Unreachable("it was given up".into())),
                };
                transfer.follow(&state);
            }
        }
    }
}
