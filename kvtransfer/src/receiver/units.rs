//! Payload that arrives: from its announcement until it is applied.

use std::time::Instant;

use super::Receiver;
use crate::direct::Transport;
use crate::error::ReceiveError;
use crate::frame::{Frame, LayerRun, Run, UnitHeader};
use crate::grid::runs;
use crate::limits::{MAX_REFERENCES, MAX_RETRIES, PARCEL_BYTES, UNIT_BYTES};
use crate::sender::{LinkId, pieces_of};

impl Receiver {
    /// A whole unit came over `link`, and its bytes have this checksum; or a parcel is announced.
    /// `Some`: it is sound, these of its pieces have not landed before and are to be put into the
    /// pool, and [`applied`](Self::applied) or [`unreadable`](Self::unreadable) is to follow,
    /// whatever happens to the connection. `None`: it is late, damaged, or nothing of it is new.
    /// An error: it is not what was granted, and the transfer has failed.
    pub fn unit(
        &mut self,
        now: Instant,
        link: LinkId,
        unit: &UnitHeader,
        checksum: u32,
    ) -> Result<Option<Vec<Run>>, &'static str> {
        // What was sent before another way was asked for is late.
        if !self.is_current(link) || self.transport != Some(unit.transport) {
            return Ok(None);
        }
        if let Err(what) = self.check_unit(unit) {
            self.fail(ReceiveError::Protocol(what));
            return Err(what);
        }
        self.alive(now);
        if checksum != unit.checksum {
            self.damaged(unit.pieces);
            return Ok(None);
        }
        let LayerRun { layer, run } = unit.pieces;
        let new: Vec<_> = runs(run.range().filter(|&o| self.landed.insert(layer, o))).collect();
        if new.is_empty() {
            return Ok(None);
        }
        self.progress(now);
        self.applying += 1;
        Ok(Some(new))
    }

    /// Whether what comes over `link` is part of the transfer.
    #[must_use]
    pub fn is_current(&self, link: LinkId) -> bool {
        self.outcome.is_none() && self.link == Some(link)
    }

    /// A sound unit is in the pool.
    pub fn applied(&mut self, now: Instant) {
        if self.outcome.is_some() {
            return;
        }
        self.applying = self.applying.checked_sub(1).expect("each sound unit is applied once");
        self.progress(now);
        self.grant_if_due();
        self.complete_if_all_applied();
    }

    /// A unit's references cannot be read: the payload has to come over the network.
    pub fn unreadable(&mut self, now: Instant) {
        if self.outcome.is_some() {
            return;
        }
        self.fall_back();
        self.applied(now);
    }

    fn check_unit(&self, unit: &UnitHeader) -> Result<(), &'static str> {
        let LayerRun { layer, run } = unit.pieces;
        let geometry = &self.manifest.geometry;
        if layer >= geometry.layers
            || self.held.is_none_or(|held| run.first < held)
            || run.range().end > self.manifest.blocks
        {
            return Err("payload that was not granted");
        }
        let (most, bytes) = match unit.transport {
            Transport::Quic => (pieces_of(UNIT_BYTES, geometry), geometry.piece_bytes()),
            Transport::Nccl => (pieces_of(PARCEL_BYTES, geometry), geometry.piece_bytes()),
            Transport::Ipc => (MAX_REFERENCES, size_of::<u32>()),
        };
        let again = |ordinal| self.landed.contains(layer, ordinal);
        if unit.transport == Transport::Nccl && run.range().any(again) {
            return Err("payload that was announced before");
        }
        if run.count > most || u64::from(unit.length) != u64::from(run.count) * bytes as u64 {
            return Err("payload of another length than its pieces");
        }
        Ok(())
    }

    fn damaged(&mut self, pieces: LayerRun) {
        self.retries += 1;
        if self.retries > MAX_RETRIES {
            return self.fail(ReceiveError::Corrupt);
        }
        self.frames.push_back(Frame::Retry(self.manifest.transfer, pieces));
    }
}
