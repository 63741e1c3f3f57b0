//! Payload that arrives: from its announcement until it is applied.

use std::time::Instant;

use super::Receiver;
use crate::direct::Transport;
use crate::error::ReceiveError;
use crate::frame::{Frame, LayerRun, UnitHeader};
use crate::limits::{MAX_REFERENCES, MAX_RETRIES, PARCEL_BYTES};
use crate::sender::{LinkId, pieces_of};

impl Receiver {
    /// A unit begins to arrive over `link`. False: it is late and to be dropped. An error: it is
    /// not what was granted, and the transfer has failed.
    pub fn begin_unit(
        &mut self,
        now: Instant,
        link: LinkId,
        unit: &UnitHeader,
    ) -> Result<bool, &'static str> {
        // What was sent before another way was asked for is late.
        if !self.is_current(link) || self.transport != Some(unit.transport) {
            return Ok(false);
        }
        if let Err(what) = self.check_unit(unit) {
            self.fail(ReceiveError::Protocol(what));
            return Err(what);
        }
        self.alive(now);
        self.arriving = Some(*unit);
        Ok(true)
    }

    /// Whether bytes that came over `link` may be written to this piece of the arriving unit.
    pub fn accepts(&mut self, now: Instant, link: LinkId, layer: u32, ordinal: u32) -> bool {
        if !self.is_current(link) {
            return false;
        }
        self.alive(now);
        !self.landed.contains(layer, ordinal)
    }

    /// Whether bytes that come over `link` are part of the transfer.
    #[must_use]
    pub fn is_current(&self, link: LinkId) -> bool {
        self.outcome.is_none() && self.link == Some(link)
    }

    /// The arriving unit is complete, and its bytes have this checksum. True: it is sound, and
    /// [`applied`](Self::applied) is to follow, whatever happens to the connection.
    #[must_use]
    pub fn end_unit(&mut self, now: Instant, link: LinkId, checksum: u32) -> bool {
        if !self.is_current(link) {
            return false;
        }
        let Some(unit) = self.arriving.take() else {
            return false;
        };
        self.alive(now);
        if checksum != unit.checksum {
            self.damaged(unit.pieces);
            return false;
        }
        for ordinal in unit.pieces.run.range() {
            if self.landed.insert(unit.pieces.layer, ordinal) {
                self.progress(now);
            }
        }
        self.applying += 1;
        true
    }

    /// A unit of references came over `link`, and its bytes have this checksum. True: its pieces
    /// are to be copied, and [`applied`](Self::applied) or [`unreadable`](Self::unreadable) is to
    /// follow, whatever happens to the connection.
    pub fn references(
        &mut self,
        now: Instant,
        link: LinkId,
        unit: &UnitHeader,
        checksum: u32,
    ) -> Result<bool, &'static str> {
        Ok(self.begin_unit(now, link, unit)? && self.end_unit(now, link, checksum))
    }

    /// A parcel is announced over `link`. True: it is wanted, and [`applied`](Self::applied) or
    /// [`unreadable`](Self::unreadable) is to follow, whatever happens to the connection. An error:
    /// it is not what was granted, and the transfer has failed.
    pub fn announced(
        &mut self,
        now: Instant,
        link: LinkId,
        parcel: &UnitHeader,
    ) -> Result<bool, &'static str> {
        Ok(self.begin_unit(now, link, parcel)? && self.end_unit(now, link, parcel.checksum))
    }

    /// Whether a unit has begun and not ended.
    #[must_use]
    pub fn is_arriving(&self) -> bool {
        self.arriving.is_some()
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
        if self.arriving.is_some() {
            return Err("two units at a time");
        }
        if layer >= geometry.layers
            || self.held.is_none_or(|held| run.first < held)
            || run.range().end > self.manifest.blocks
        {
            return Err("payload that was not granted");
        }
        let (most, bytes) = match unit.transport {
            Transport::Quic => (u32::MAX, geometry.piece_bytes()),
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
