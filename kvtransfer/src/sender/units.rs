//! Payload that leaves: from the grant until it is handed to the transport.

use std::ops::Range;
use std::time::{Duration, Instant};

use baton_proto::geometry::KvGeometry;

use super::{Phase, Sender};
use crate::direct::Transport;
use crate::error::SendError;
use crate::frame::{Frame, Grant, LayerRun, Manifest, Run};
use crate::grid::runs;
use crate::limits::{MAX_REFERENCES, MAX_RETRIES, PARCEL_BYTES, UNIT_BYTES};

impl Sender {
    /// The next pieces to send over [`Self::link`]: one layer of consecutive blocks.
    pub fn poll_unit(&mut self, now: Instant) -> Option<LayerRun> {
        if self.unable {
            return None;
        }
        let next = self.queue.front_mut()?;
        let most = match self.transport {
            Transport::Quic => pieces_of(UNIT_BYTES, &self.manifest.geometry),
            Transport::Nccl => pieces_of(PARCEL_BYTES, &self.manifest.geometry),
            Transport::Ipc => MAX_REFERENCES,
        };
        let count = next.run.count.min(most);
        let unit = LayerRun { layer: next.layer, run: Run { first: next.run.first, count } };
        next.run.first += count;
        next.run.count -= count;
        if next.run.count == 0 {
            self.queue.pop_front();
        }
        self.first_payload.get_or_insert(now);
        self.progress(now);
        Some(unit)
    }

    pub(super) fn granted(&mut self, now: Instant, grant: Grant) {
        let other_way = self.phase == Phase::Granted && grant.transport < self.transport;
        if self.phase != Phase::Offered && !other_way {
            return;
        }
        if !grant_fits(&grant, &self.manifest) {
            return self.fail(SendError::Protocol("a grant of what was not offered"));
        }
        self.phase = Phase::Granted;
        self.phase_by = now + self.timing.lease;
        self.beat = (self.timing.lease.min(grant.lease) / 4).max(Duration::from_millis(1));
        self.beat_at = now + self.beat;
        self.transport = grant.transport;
        self.unable = false;
        self.queue.clear();
        self.taken.clear();
        self.wanted.fill(false);
        for ordinal in grant.wanted.iter().flat_map(|run| run.range()) {
            self.wanted[ordinal as usize] = true;
        }
        for at in &grant.landed {
            for ordinal in at.run.range() {
                self.taken.insert(at.layer, ordinal);
            }
        }
        for layer in 0..self.manifest.geometry.layers {
            self.enqueue(layer, 0..self.manifest.blocks);
        }
        self.progress(now);
        if self.finish.is_some() {
            self.push_finish();
        }
    }

    /// Queues what is ready, wanted and not yet taken.
    pub(super) fn enqueue(&mut self, layer: u32, ordinals: Range<u32>) {
        let Self { ready, wanted, taken, queue, .. } = self;
        let next = ordinals
            .filter(|&o| wanted[o as usize] && ready.contains(layer, o) && taken.insert(layer, o));
        for run in runs(next) {
            match queue.back_mut() {
                Some(last) if last.layer == layer && last.run.range().end == run.first => {
                    last.run.count += run.count;
                }
                _ => queue.push_back(LayerRun { layer, run }),
            }
        }
    }

    pub(super) fn retry(&mut self, now: Instant, at: LayerRun) {
        let sent = at.layer < self.manifest.geometry.layers
            && at.run.range().end <= self.manifest.blocks
            && (at.run.range())
                .all(|o| self.wanted[o as usize] && self.taken.contains(at.layer, o));
        self.retries += 1;
        if !sent || self.retries > MAX_RETRIES {
            return self.fail(SendError::Protocol("a retry of what was not sent, or too many"));
        }
        self.queue.push_front(at);
        self.progress(now);
    }

    /// Confirms that what was copied was held, so that the receiver may use it.
    pub(super) fn was_read(&mut self, now: Instant) {
        let by_reference = self.phase == Phase::Granted && self.transport == Transport::Ipc;
        if !by_reference || self.finish.is_none() || !self.all_sent() {
            return self.fail(SendError::Protocol("read before everything was sent"));
        }
        self.progress(now);
        self.frames.push_back(Frame::Held(self.manifest.transfer));
    }

    /// Every wanted piece was taken for this connection.
    pub(super) fn all_sent(&self) -> bool {
        let blocks = self.wanted.iter().filter(|&&wanted| wanted).count() as u64;
        let all = blocks * u64::from(self.manifest.geometry.layers);
        self.queue.is_empty() && self.taken.len() >= all
    }
}

/// Most pieces of a unit of so many bytes; at least one.
pub(crate) fn pieces_of(bytes: usize, geometry: &KvGeometry) -> u32 {
    (bytes / geometry.piece_bytes()).max(1) as u32
}

/// Wanted runs ascend, do not overlap and lie within the offer; so does what has landed, within
/// the wanted. (A peer cannot make this end work on more pieces than it has offered.)
fn grant_fits(grant: &Grant, manifest: &Manifest) -> bool {
    let mut next = 0;
    let wanted_fits = grant.wanted.iter().all(|run| {
        let fits = run.first >= next && run.range().end <= manifest.blocks;
        next = run.range().end;
        fits
    });
    let is_wanted = |run: Run| {
        let within = |w: &Run| w.first <= run.first && run.range().end <= w.range().end;
        grant.wanted.iter().any(within)
    };
    let mut next = (0, 0);
    let landed_fits = grant.landed.iter().all(|&LayerRun { layer, run }| {
        let fits = (layer, run.first) >= next && layer < manifest.geometry.layers;
        next = (layer, run.range().end);
        fits && is_wanted(run)
    });
    wanted_fits && landed_fits
}
