//! The receiving end's state machine. No I/O, no clock, no memory of blocks.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::direct::Transport;
use crate::error::ReceiveError;
use crate::frame::{FirstToken, Frame, Grant, Manifest, Offer, Reason, Run};
use crate::grid::Grid;
use crate::limits::{MAX_LANDED_RUNS, Timing};
use crate::memory::MemoryLost;
use crate::sender::{LinkId, check};

mod units;

/// Receives one transfer.
///
/// Inputs are the owner's [`cancel`](Self::cancel) and the driver's `handle_*`. A payload
/// [`unit`](Self::unit) that has come whole and was found sound and new is put into the pool, and then
/// [`applied`](Self::applied). After each input, the driver drains [`poll_frame`](Self::poll_frame),
/// and calls [`handle_timeout`](Self::handle_timeout) when [`poll_timeout`](Self::poll_timeout) says so,
/// until there is an [`outcome`](Self::outcome).
///
/// It may be there before its blocks are: an offer is then held with heartbeats until the owner
/// [reserves](Self::reserve) them.
///
/// Always true: only granted pieces are accepted; a piece lands once, after its checksum held, and is
/// not written to before or again; complete exactly if every wanted piece has landed and is applied
/// and the first token is here; nothing is accepted after the end, or over an earlier connection
/// than the current one.
///
/// A parcel's pieces count as landed when it is announced, and are unreadable if it does not come.
///
/// Payload by reference is copied from memory of the sender's, which may give it to others at any
/// time. So it counts for one connection only, and the transfer is complete when the sender has
/// confirmed, after everything was copied, that it held it all the time.
pub struct Receiver {
    manifest: Manifest,
    /// Leading blocks that are not wanted; `None` until the blocks are reserved.
    held: Option<u32>,
    lease: Duration,
    /// Longest time without a piece landing.
    patience: Duration,
    link: Option<LinkId>,
    /// How the payload is to travel; it may only become worse. `None` before the first offer.
    transport: Option<Transport>,
    /// A grant follows when nothing is being applied any more.
    grant_due: bool,
    /// The sender was asked, over this connection, whether it held what was copied.
    asked: bool,
    offered: bool,
    outcome: Option<Result<FirstToken, ReceiveError>>,
    /// Pieces whose checksum held.
    landed: Grid,
    /// Units of them that are not applied yet.
    applying: u32,
    first: Option<FirstToken>,
    retries: u32,
    frames: VecDeque<Frame>,
    beat: Duration,
    beat_at: Instant,
    /// Gives up at this time without a sign of life.
    silent_by: Instant,
    /// Gives up at this time without progress.
    progress_by: Instant,
}

impl Receiver {
    /// Expects `manifest`, of whose blocks the first `held` are here; `None`: there is no room yet
    /// for the others. Once offered, the blocks are kept for `lease` after each sign of life.
    pub fn new(
        now: Instant,
        manifest: Manifest,
        held: Option<u32>,
        lease: Duration,
        timing: &Timing,
    ) -> Result<Self, ReceiveError> {
        check(&manifest).map_err(ReceiveError::Invalid)?;
        if held.is_some_and(|held| held > manifest.blocks) {
            return Err(ReceiveError::Invalid("more blocks are held than there are"));
        }
        Ok(Self {
            held,
            lease,
            patience: timing.producer,
            link: None,
            transport: None,
            grant_due: false,
            asked: false,
            offered: false,
            outcome: None,
            landed: Grid::new(manifest.geometry.layers, manifest.blocks),
            applying: 0,
            first: None,
            retries: 0,
            frames: VecDeque::new(),
            beat: lease,
            beat_at: now,
            silent_by: now + timing.producer,
            progress_by: now + timing.producer,
            manifest,
        })
    }

    /// The owner gives the transfer up.
    pub fn cancel(&mut self) {
        self.fail(ReceiveError::Cancelled);
    }

    /// The expected sender's offer came over `link`, on which `best` is possible.
    pub fn handle_offer(&mut self, now: Instant, link: LinkId, offer: &Offer, best: Transport) {
        if self.link.is_some_and(|current| current >= link) {
            return;
        }
        self.unlink();
        self.link = Some(link);
        self.transport = Some(self.transport.map_or(best, |transport| transport.min(best)));
        self.offered = true;
        if let Some(farewell) = self.farewell() {
            return self.frames.push_back(farewell);
        }
        if let Some(reason) = mismatch(&self.manifest, &offer.manifest) {
            return self.fail(ReceiveError::Mismatch(reason));
        }
        self.alive(now);
        self.progress(now);
        self.beat = (offer.lease.min(self.lease) / 4).max(Duration::from_millis(1));
        self.beat_at = now + self.beat;
        self.answer_offer();
    }

    /// The owner has blocks for all of the transfer, of which the first `held` have their content
    /// already. Once only.
    pub fn reserve(&mut self, now: Instant, held: u32) {
        if self.outcome.is_some() || self.held.is_some() {
            return;
        }
        if held > self.manifest.blocks {
            return self.fail(ReceiveError::Invalid("more blocks are held than there are"));
        }
        self.held = Some(held);
        self.progress(now);
        if self.link.is_some() {
            self.answer_offer();
        }
    }

    /// Whether the sender has made its offer, over whatever connection.
    #[must_use]
    pub fn offered(&self) -> bool {
        self.offered
    }

    /// A control frame other than an offer came over `link`.
    pub fn handle_frame(&mut self, now: Instant, link: LinkId, frame: Frame) {
        if self.outcome.is_some() || self.link != Some(link) {
            return;
        }
        self.alive(now);
        match frame {
            Frame::Finish(_, first) => {
                if self.first.is_none() {
                    self.first = Some(first);
                    self.progress(now);
                }
                self.complete_if_all_applied();
            }
            Frame::Cancel(_, reason) => self.end(Err(ReceiveError::Ended(reason))),
            Frame::Heartbeat(_) => {}
            Frame::Held(_) => self.confirmed(),
            Frame::Unable(_) => self.handle_channel_broken(now, link),
            _ => self.fail(ReceiveError::Protocol("a frame that only a receiver sends")),
        }
    }

    /// The channel that goes with `link` is broken: what is announced will not come.
    pub fn handle_channel_broken(&mut self, now: Instant, link: LinkId) {
        if self.is_current(link) && self.transport == Some(Transport::Nccl) {
            self.fall_back();
            self.progress(now);
            self.grant_if_due();
        }
    }

    /// The payload comes over the network from now on, all of it.
    fn fall_back(&mut self) {
        if self.transport != Some(Transport::Quic) {
            self.transport = Some(Transport::Quic);
            self.landed.clear();
            self.asked = false;
            self.grant_due = self.link.is_some();
        }
    }

    /// The blocks cannot be written any more.
    pub fn handle_memory_lost(&mut self) {
        self.fail(MemoryLost.into());
    }

    /// `link` is lost; the sender may come back over another.
    pub fn handle_disconnected(&mut self, link: LinkId) {
        if self.outcome.is_none() && self.link == Some(link) {
            self.unlink();
        }
    }

    /// The expected life of the sender's node is over.
    pub fn handle_sender_gone(&mut self) {
        self.fail(ReceiveError::Ended(Reason::Epoch));
    }

    /// Gives up what has waited for too long, and keeps the sender's lease alive.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.outcome.is_some() {
            return;
        }
        if now >= self.silent_by {
            return self.fail(ReceiveError::Timeout(match self.link {
                None => "the sender",
                Some(_) => "a sign of life from the sender",
            }));
        }
        if now >= self.progress_by {
            return self.fail(ReceiveError::Timeout(match self.held {
                None => "room for the blocks",
                Some(_) => "the next piece",
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
        let waits = self.silent_by.min(self.progress_by);
        match (&self.outcome, self.link) {
            (Some(_), _) => None,
            (None, Some(_)) => Some(waits.min(self.beat_at)),
            (None, None) => Some(waits),
        }
    }

    /// The next control frame for [`Self::link`]; also after the end.
    pub fn poll_frame(&mut self) -> Option<Frame> {
        self.frames.pop_front()
    }

    /// The connection that frames are for.
    #[must_use]
    pub fn link(&self) -> Option<LinkId> {
        self.link
    }

    /// What is transferred.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How it ended.
    #[must_use]
    pub fn outcome(&self) -> Option<&Result<FirstToken, ReceiveError>> {
        self.outcome.as_ref()
    }

    /// Once ended: the answer to any later offer of this transfer.
    #[must_use]
    pub fn farewell(&self) -> Option<Frame> {
        let id = self.manifest.transfer;
        let reason = match self.outcome.as_ref()? {
            Ok(_) => return Some(Frame::Complete(id)),
            Err(ReceiveError::Mismatch(reason)) => *reason,
            Err(ReceiveError::Timeout(_)) => Reason::Expired,
            Err(ReceiveError::Corrupt) => Reason::Corrupt,
            Err(ReceiveError::Protocol(_)) => Reason::Protocol,
            Err(ReceiveError::Memory(_)) => Reason::Memory,
            Err(_) => Reason::Cancelled,
        };
        Some(Frame::Cancel(id, reason))
    }

    /// With the grant, or with a sign of life as long as there is no room.
    fn answer_offer(&mut self) {
        self.grant_due = self.held.is_some();
        self.grant_if_due();
        if self.grant_due || self.held.is_none() {
            self.frames.push_back(Frame::Heartbeat(self.manifest.transfer));
        }
    }

    /// Units that are being applied and have not landed were copied over an earlier connection, or
    /// turned out to be unreadable: they must not overtake what comes instead.
    fn grant_if_due(&mut self) {
        let Some(held) = self.held.filter(|_| self.grant_due) else { return };
        if self.applying == 0 || self.landed.len() > 0 {
            self.grant_due = false;
            self.frames.push_back(Frame::Grant(self.grant(held)));
        }
    }

    fn grant(&self, held: u32) -> Grant {
        let wanted = Run { first: held, count: self.manifest.blocks - held };
        let layers = 0..self.manifest.geometry.layers;
        Grant {
            transfer: self.manifest.transfer,
            transport: self.transport.unwrap_or(Transport::Quic),
            lease: self.lease,
            wanted: if wanted.count > 0 { vec![wanted] } else { Vec::new() },
            landed: layers
                .flat_map(|layer| self.landed.layer_runs(layer))
                .take(MAX_LANDED_RUNS)
                .collect(),
        }
    }

    fn complete_if_all_applied(&mut self) {
        let Some(held) = self.held else { return };
        let wanted = u64::from(self.manifest.blocks - held);
        let missing = self.landed.len() < wanted * u64::from(self.manifest.geometry.layers);
        if missing || self.applying > 0 {
            return;
        }
        if self.first.is_some() && self.transport == Some(Transport::Ipc) && wanted > 0 {
            if !std::mem::replace(&mut self.asked, true) {
                self.frames.push_back(Frame::Read(self.manifest.transfer));
            }
            return;
        }
        self.complete();
    }

    /// What was copied until the sender was asked is what it offered.
    fn confirmed(&mut self) {
        match self.asked && self.applying == 0 {
            true => self.complete(),
            false => self.fail(ReceiveError::Protocol("an answer to no question")),
        }
    }

    fn complete(&mut self) {
        if let Some(first) = self.first.take() {
            self.end(Ok(first));
            self.say_farewell();
        }
    }

    fn alive(&mut self, now: Instant) {
        self.silent_by = now + self.lease;
    }

    fn progress(&mut self, now: Instant) {
        self.progress_by = now + self.patience;
    }

    fn unlink(&mut self) {
        self.link = None;
        self.frames.clear();
        (self.grant_due, self.asked) = (false, false);
        if self.transport != Some(Transport::Quic) {
            self.landed.clear();
        }
    }

    /// Ends, and tells the sender why.
    fn fail(&mut self, error: ReceiveError) {
        if self.outcome.is_none() {
            self.end(Err(error));
            self.say_farewell();
        }
    }

    fn end(&mut self, outcome: Result<FirstToken, ReceiveError>) {
        self.outcome = Some(outcome);
        self.frames.clear();
    }

    fn say_farewell(&mut self) {
        if self.link.is_some() {
            let farewell = self.farewell();
            self.frames.extend(farewell);
        }
    }
}

fn mismatch(expected: &Manifest, offered: &Manifest) -> Option<Reason> {
    if offered.root != expected.root {
        return Some(Reason::Model);
    }
    if offered.geometry != expected.geometry {
        return Some(Reason::Geometry);
    }
    if offered.blocks != expected.blocks {
        return Some(Reason::Blocks);
    }
    (offered.hashes != expected.hashes).then_some(Reason::Hashes)
}
