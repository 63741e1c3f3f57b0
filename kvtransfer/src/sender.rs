//! The sending end's state machine. No I/O, no clock, no memory of blocks.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::direct::Transport;
use crate::error::SendError;
use crate::frame::{FirstToken, Frame, LayerRun, Manifest, Offer, Reason};
use crate::grid::Grid;
use crate::limits::{MAX_BLOCKS, MAX_CONNECTIONS, MAX_LAYERS, MAX_PIECE_BYTES, Timing};
use crate::memory::MemoryLost;
use crate::send::Sent;

mod units;

pub(crate) use units::pieces_of;

/// Names one connection among all of an endpoint's; grows.
pub type LinkId = u64;

/// Sends one transfer.
///
/// Inputs are the owner's [`ready`](Self::ready), [`finish`](Self::finish) and
/// [`cancel`](Self::cancel), and the driver's `handle_*`. After each, the driver drains
/// [`poll_frame`](Self::poll_frame), then [`poll_unit`](Self::poll_unit) as fast as the transport
/// takes units, and calls [`handle_timeout`](Self::handle_timeout) when
/// [`poll_timeout`](Self::poll_timeout) says so, until there is an [`outcome`](Self::outcome).
///
/// Always true: a unit holds only pieces that are ready and granted; over one connection each
/// piece is sent once, and once more for every retry, of which there are at most
/// [`MAX_RETRIES`](crate::limits::MAX_RETRIES); every state that waits has a deadline.
pub struct Sender {
    manifest: Manifest,
    timing: Timing,
    phase: Phase,
    link: Option<LinkId>,
    /// How the receiver wants its payload.
    transport: Transport,
    /// Nothing can be sent that way; the receiver was told.
    unable: bool,
    connections: u32,
    /// Why there is no connection.
    lost_because: String,
    /// Pieces that are computed.
    ready: Grid,
    /// Blocks that the receiver wants; empty until the first grant.
    wanted: Vec<bool>,
    /// Pieces of this connection that are in `queue`, were sent, or had landed before.
    taken: Grid,
    queue: VecDeque<LayerRun>,
    frames: VecDeque<Frame>,
    retries: u32,
    first_payload: Option<Instant>,
    finish: Option<(FirstToken, Instant)>,
    /// Interval of heartbeats, and when the next is due.
    beat: Duration,
    beat_at: Instant,
    /// Gives up at this time unless the phase changes.
    phase_by: Instant,
    /// Gives up at this time unless the owner or the transport gets on.
    progress_by: Instant,
}

#[derive(Clone, Debug, PartialEq)]
enum Phase {
    /// No connection, until `phase_by`.
    Unlinked,
    /// Offered, waiting for the grant until `phase_by`; a receiver that waits for room puts that
    /// off by its heartbeats.
    Offered,
    /// Granted; the receiver must say something by `phase_by`.
    Granted,
    Ended(Result<Sent, SendError>),
}

impl Sender {
    /// A transfer that has no connection yet.
    pub fn new(now: Instant, manifest: Manifest, timing: Timing) -> Result<Self, SendError> {
        check(&manifest).map_err(SendError::Invalid)?;
        let (layers, blocks) = (manifest.geometry.layers, manifest.blocks);
        Ok(Self {
            timing,
            phase: Phase::Unlinked,
            link: None,
            transport: Transport::Quic,
            unable: false,
            connections: 0,
            lost_because: "no connection yet".to_owned(),
            ready: Grid::new(layers, blocks),
            wanted: vec![false; blocks as usize],
            taken: Grid::new(layers, blocks),
            queue: VecDeque::new(),
            frames: VecDeque::new(),
            retries: 0,
            first_payload: None,
            finish: None,
            beat: timing.lease / 4,
            beat_at: now,
            phase_by: now + timing.reconnect,
            progress_by: now + timing.producer,
            manifest,
        })
    }

    /// Blocks `ordinals` are computed and final in `layer`.
    pub fn ready(&mut self, now: Instant, layer: u32, ordinals: Range<u32>) {
        if self.has_ended() {
            return;
        }
        if layer >= self.manifest.geometry.layers || ordinals.end > self.manifest.blocks {
            return self.fail(SendError::Invalid("a piece outside of the transfer"));
        }
        for ordinal in ordinals.clone() {
            self.ready.insert(layer, ordinal);
        }
        self.progress(now);
        if self.phase == Phase::Granted {
            self.enqueue(layer, ordinals);
        }
    }

    /// The prompt is computed and this is the first token.
    pub fn finish(&mut self, now: Instant, first: FirstToken) {
        if self.has_ended() || self.finish.is_some() {
            return;
        }
        self.finish = Some((first, now));
        self.progress(now);
        if self.phase == Phase::Granted {
            self.push_finish();
        }
    }

    /// The owner gives the transfer up.
    pub fn cancel(&mut self) {
        self.fail(SendError::Cancelled);
    }

    /// A connection to the receiver is up.
    pub fn handle_connected(&mut self, now: Instant, link: LinkId) {
        if self.has_ended() {
            return;
        }
        self.connections += 1;
        if self.connections > MAX_CONNECTIONS {
            return self.fail(SendError::Unreachable(format!(
                "{MAX_CONNECTIONS} connections were lost, the last one because: {}",
                self.lost_because
            )));
        }
        self.unlink();
        self.link = Some(link);
        self.phase = Phase::Offered;
        self.phase_by = now + self.timing.begin;
        self.beat_at = now + self.beat;
        self.frames.push_back(Frame::Offer(Offer {
            manifest: self.manifest.clone(),
            lease: self.timing.lease,
        }));
    }

    /// The connection is lost, or another attempt to make one failed; it is tried again.
    pub fn handle_disconnected(&mut self, now: Instant, why: &str) {
        if self.has_ended() {
            return;
        }
        why.clone_into(&mut self.lost_because);
        if self.phase != Phase::Unlinked {
            self.unlink();
            self.phase = Phase::Unlinked;
            self.phase_by = now + self.timing.reconnect;
        }
    }

    /// There will be no connection.
    pub fn handle_failed(&mut self, error: SendError) {
        self.fail(error);
    }

    /// The blocks cannot be read any more.
    pub fn handle_memory_lost(&mut self) {
        self.fail(MemoryLost.into());
    }

    /// The connection's channel is broken. What was sent through it may not have arrived.
    pub fn handle_channel_broken(&mut self, now: Instant) {
        let through_it = self.phase == Phase::Granted && self.transport == Transport::Nccl;
        if through_it && !std::mem::replace(&mut self.unable, true) {
            self.progress(now);
            self.frames.push_back(Frame::Unable(self.manifest.transfer));
        }
    }

    /// A control frame about this transfer came over `link`.
    pub fn handle_frame(&mut self, now: Instant, link: LinkId, frame: Frame) {
        if self.has_ended() || self.link != Some(link) {
            return;
        }
        if self.phase == Phase::Granted {
            self.phase_by = now + self.timing.lease;
        }
        if self.phase == Phase::Offered {
            // A receiver without room says that it is there: it is worth waiting for.
            self.phase_by = now + self.timing.lease;
            self.progress(now);
        }
        match frame {
            Frame::Grant(grant) => self.granted(now, grant),
            Frame::Retry(_, at) => self.retry(now, at),
            Frame::Complete(_) => self.completed(now),
            Frame::Cancel(_, reason) => self.end(Err(SendError::Refused(reason))),
            Frame::Heartbeat(_) => {}
            Frame::Read(_) => self.was_read(now),
            _ => self.fail(SendError::Protocol("a frame that only a sender sends")),
        }
    }

    /// Gives up what has waited for too long, and keeps the receiver's lease alive.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.has_ended() {
            return;
        }
        if now >= self.phase_by {
            let error = match self.phase {
                Phase::Unlinked => SendError::Unreachable(self.lost_because.clone()),
                Phase::Offered => SendError::Timeout("the receiver's grant"),
                _ => SendError::Timeout("a sign of life from the receiver"),
            };
            return self.fail(error);
        }
        if now >= self.progress_by {
            return self.fail(SendError::Timeout(match self.finish {
                None => "the next computed piece",
                Some(_) => "the receiver's acknowledgement",
            }));
        }
        if self.link.is_some() && now >= self.beat_at {
            self.beat_at = now + self.beat;
            self.frames.push_back(Frame::Heartbeat(self.manifest.transfer));
        }
    }

    /// When [`Self::handle_timeout`] is due; `None` once ended.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let waits = self.phase_by.min(self.progress_by);
        match self.phase {
            Phase::Ended(_) => None,
            Phase::Unlinked => Some(waits),
            _ => Some(waits.min(self.beat_at)),
        }
    }

    /// The next control frame for [`Self::link`]; also after the end.
    pub fn poll_frame(&mut self) -> Option<Frame> {
        self.frames.pop_front()
    }

    /// The connection that frames and units are for.
    #[must_use]
    pub fn link(&self) -> Option<LinkId> {
        self.link
    }

    /// How units travel.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// What is transferred.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How it ended.
    #[must_use]
    pub fn outcome(&self) -> Option<&Result<Sent, SendError>> {
        match &self.phase {
            Phase::Ended(outcome) => Some(outcome),
            _ => None,
        }
    }

    fn completed(&mut self, now: Instant) {
        let Some((_, finished)) = self.finish else {
            return self.fail(SendError::Protocol("complete before the prompt was"));
        };
        // After a reconnect, `Complete` instead of a grant repeats a lost acknowledgement.
        if self.phase == Phase::Granted && !self.all_sent() {
            return self.fail(SendError::Protocol("complete before everything was sent"));
        }
        let blocks = self.wanted.iter().filter(|&&wanted| wanted).count() as u32;
        let started = self.first_payload.unwrap_or(finished);
        self.end(Ok(Sent {
            hidden: finished.saturating_duration_since(started),
            exposed: now.saturating_duration_since(finished),
            bytes: u64::from(blocks) * self.manifest.geometry.block_bytes() as u64,
            blocks,
            transport: self.transport,
        }));
    }

    fn push_finish(&mut self) {
        let (first, _) = self.finish.clone().expect("called when finished");
        self.frames.push_back(Frame::Finish(self.manifest.transfer, first));
    }

    fn progress(&mut self, now: Instant) {
        let wait = match self.finish {
            None => self.timing.producer,
            Some(_) => self.timing.complete,
        };
        self.progress_by = now + wait;
    }

    fn unlink(&mut self) {
        self.link = None;
        self.unable = false;
        self.frames.clear();
        self.queue.clear();
        self.taken.clear();
    }

    /// Ends, and tells the receiver why.
    fn fail(&mut self, error: SendError) {
        if self.has_ended() {
            return;
        }
        let reason = match &error {
            SendError::Timeout(_) => Reason::Expired,
            SendError::Protocol(_) => Reason::Protocol,
            SendError::Memory(_) => Reason::Memory,
            _ => Reason::Cancelled,
        };
        self.end(Err(error));
        if self.link.is_some() {
            self.frames.push_back(Frame::Cancel(self.manifest.transfer, reason));
        }
    }

    fn end(&mut self, outcome: Result<Sent, SendError>) {
        self.phase = Phase::Ended(outcome);
        self.frames.clear();
        self.queue.clear();
    }

    fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }
}

/// What is wrong with the numbers of a manifest.
pub(crate) fn check(manifest: &Manifest) -> Result<(), &'static str> {
    let geometry = &manifest.geometry;
    if !(1..=MAX_BLOCKS).contains(&manifest.blocks) {
        return Err("the number of blocks is 0 or above the limit");
    }
    if manifest.hashes.len() > manifest.blocks as usize {
        return Err("there are more hashes than blocks");
    }
    if !(1..=MAX_LAYERS).contains(&geometry.layers) {
        return Err("the number of layers is 0 or above the limit");
    }
    if !(1..=MAX_PIECE_BYTES).contains(&geometry.piece_bytes()) {
        return Err("the size of a piece is 0 or above the limit");
    }
    Ok(())
}
