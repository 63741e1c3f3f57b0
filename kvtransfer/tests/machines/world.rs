//! The two machines, a network between them, and a checker.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use baton_kvtransfer::frame::{Frame, LayerRun, Manifest, Run, UnitHeader};
use baton_kvtransfer::limits::MAX_RETRIES;
use baton_kvtransfer::{FirstToken, LinkId, Receiver, Sender, Timing, Transport};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{RequestId, TransferId};
use crc32c::crc32c;

pub(crate) const LAYERS: u32 = 3;
pub(crate) const LEASE: Duration = Duration::from_secs(10);

/// A piece has 8 bytes.
pub(crate) fn geometry() -> KvGeometry {
    KvGeometry { layers: LAYERS, kv_heads: 1, head_dim: 1, dtype: KvDtype::F32, block_tokens: 1 }
}

pub(crate) fn manifest(blocks: u32) -> Manifest {
    Manifest {
        transfer: TransferId { request: RequestId(5), attempt: 2 },
        root: ModelRoot([1; 16]),
        geometry: geometry(),
        blocks,
        hashes: vec![BlockHash([9; 16]); blocks as usize],
    }
}

pub(crate) fn content(layer: u32, ordinal: u32) -> [u8; 8] {
    (u64::from(layer) * 1_000_003 + u64::from(ordinal) * 7919 + 11).to_le_bytes()
}

pub(crate) fn first() -> FirstToken {
    FirstToken { token: 1, logprobs: None, finish: None }
}

/// What may happen next.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Ready {
        layer: u32,
        from: u32,
        to: u32,
    },
    Finish,
    /// Hand the sender's next unit to the network.
    Send,
    /// Deliver the frame at this place of the queue (0: in order).
    ToReceiver(usize),
    ToSender(usize),
    /// Deliver the next unit.
    Payload,
    DropToReceiver,
    DropToSender,
    RepeatToReceiver,
    RepeatToSender,
    RepeatPayload,
    /// Flip a bit of the payload in flight.
    Corrupt,
    /// The connection breaks; each end notices when told to.
    Cut,
    SenderNotices,
    ReceiverNotices,
    Connect,
    Wait(u64),
    CancelSender,
    CancelReceiver,
    /// The receiver's owner finds room.
    Reserve,
    /// The oldest copy into a device's memory ends.
    Applied,
    /// The oldest copy fails, if it is from the sender's memory, or a parcel does not come.
    Unreadable,
    /// The sender's end of the channel breaks.
    Unable,
}

/// Where the receiver's blocks are, and whether it can reach the sender's.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Sink {
    InPlace,
    /// What arrives is copied into it afterwards.
    Staged,
    /// It copies from the sender's memory.
    Direct,
    /// Parcels come through a channel.
    Channel,
}

/// A copy into the sink that has begun.
pub(crate) enum Copy {
    /// Bytes, as index and content of each piece.
    Staged(Vec<(usize, [u8; 8])>),
    /// Pieces of the sender's memory, as it is when the copy ends.
    From(LayerRun),
    /// Pieces as they were sent.
    Parcel(LayerRun),
}

/// A unit on its way.
#[derive(Clone)]
pub(crate) struct Flying {
    pub(crate) link: LinkId,
    pub(crate) header: UnitHeader,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) blocks: u32,
    pub(crate) held: u32,
    pub(crate) sender: Sender,
    pub(crate) receiver: Receiver,
    pub(crate) links: LinkId,
    pub(crate) up: bool,
    pub(crate) to_receiver: VecDeque<(LinkId, Frame)>,
    pub(crate) to_sender: VecDeque<(LinkId, Frame)>,
    pub(crate) payload: VecDeque<Flying>,
    pub(crate) corrupted: u32,
    /// What the source has reported ready.
    pub(crate) ready: HashSet<(u32, u32)>,
    /// Pieces sent over the current connection.
    pub(crate) sent: u64,
    pub(crate) sink: Vec<[u8; 8]>,
    pub(crate) kind: Sink,
    /// Sound units on their way into the sink.
    pub(crate) applying: VecDeque<Copy>,
    /// Pieces whose checksum held.
    pub(crate) landed: HashSet<(u32, u32)>,
    pub(crate) visible: bool,
}

impl World {
    pub(crate) fn new(blocks: u32, held: u32) -> Self {
        Self::with_sink(blocks, held, Sink::InPlace)
    }

    pub(crate) fn with_sink(blocks: u32, held: u32, kind: Sink) -> Self {
        let now = Instant::now();
        let timing = Timing { lease: LEASE, ..Timing::default() };
        Self {
            now,
            blocks,
            held,
            sender: Sender::new(now, manifest(blocks), timing).unwrap(),
            receiver: Receiver::new(now, manifest(blocks), None, LEASE, &timing).unwrap(),
            links: 0,
            up: false,
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            payload: VecDeque::new(),
            corrupted: 0,
            ready: HashSet::new(),
            sent: 0,
            sink: vec![[0xEE; 8]; (LAYERS * blocks) as usize],
            kind,
            applying: VecDeque::new(),
            landed: HashSet::new(),
            visible: false,
        }
    }

    pub(crate) fn apply(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Ready { layer, from, to } => {
                self.ready.extend((from..to).map(|o| (layer, o)));
                self.sender.ready(now, layer, from..to);
            }
            Step::Finish => self.sender.finish(now, first()),
            Step::Send => self.send(),
            Step::ToReceiver(at) => {
                if let Some((link, frame)) = self.to_receiver.remove(at) {
                    self.receive(link, frame);
                }
            }
            Step::ToSender(at) => {
                if let Some((link, frame)) = self.to_sender.remove(at) {
                    self.sender.handle_frame(now, link, frame);
                }
            }
            Step::Payload => self.deliver(),
            Step::DropToReceiver => drop(self.to_receiver.pop_front()),
            Step::DropToSender => drop(self.to_sender.pop_front()),
            Step::RepeatToReceiver => self.to_receiver.extend(self.to_receiver.front().cloned()),
            Step::RepeatToSender => self.to_sender.extend(self.to_sender.front().cloned()),
            Step::RepeatPayload => self.payload.extend(self.payload.front().cloned()),
            Step::Corrupt => self.corrupt(),
            Step::Cut => self.up = false,
            Step::SenderNotices if !self.up => self.sender.handle_disconnected(now, "cut"),
            Step::ReceiverNotices if !self.up => self.receiver.handle_disconnected(self.links),
            Step::SenderNotices | Step::ReceiverNotices => {}
            Step::Connect => self.connect(),
            Step::Wait(ms) => {
                self.now += Duration::from_millis(ms);
                self.sender.handle_timeout(self.now);
                self.receiver.handle_timeout(self.now);
            }
            Step::CancelSender => self.sender.cancel(),
            Step::CancelReceiver => self.receiver.cancel(),
            Step::Reserve => self.receiver.reserve(now, self.held),
            Step::Applied => self.applied(),
            Step::Unreadable => self.unreadable(),
            Step::Unable => self.sender.handle_channel_broken(now),
        }
        self.collect_frames();
        self.check();
    }

    pub(crate) fn connect(&mut self) {
        if !self.up {
            self.up = true;
            self.links += 1;
            self.sent = 0;
            self.sender.handle_connected(self.now, self.links);
        }
    }

    pub(crate) fn send(&mut self) {
        let Some(pieces) = self.sender.poll_unit(self.now) else {
            return;
        };
        let LayerRun { layer, run } = pieces;
        assert!(run.count > 0 && layer < LAYERS && run.range().end <= self.blocks);
        assert!(run.first >= self.held, "only granted pieces are sent");
        assert!(run.range().all(|o| self.ready.contains(&(layer, o))), "only ready ones");
        self.sent += u64::from(run.count);
        let transport = self.sender.transport();
        let bytes: Vec<u8> = match transport {
            Transport::Quic | Transport::Nccl => {
                run.range().flat_map(|o| content(layer, o)).collect()
            }
            Transport::Ipc => run.range().flat_map(u32::to_le_bytes).collect(),
        };
        let header = UnitHeader {
            transfer: manifest(1).transfer,
            pieces,
            transport,
            length: bytes.len() as u32,
            checksum: crc32c(&bytes),
        };
        self.payload.push_back(Flying { link: self.sender.link().unwrap(), header, bytes });
    }

    pub(crate) fn receive(&mut self, link: LinkId, frame: Frame) {
        match frame {
            Frame::Offer(offer) => {
                let best = match self.kind {
                    Sink::Direct => Transport::Ipc,
                    Sink::Channel => Transport::Nccl,
                    _ => Transport::Quic,
                };
                self.receiver.handle_offer(self.now, link, &offer, best);
            }
            other => self.receiver.handle_frame(self.now, link, other),
        }
    }

    /// The unit in front has arrived.
    pub(crate) fn deliver(&mut self) {
        let Some(Flying { link, header, bytes }) = self.payload.pop_front() else {
            return;
        };
        let (current, checksum) = (self.receiver.is_current(link), crc32c(&bytes));
        let Ok(Some(new)) = self.receiver.unit(self.now, link, &header, checksum) else {
            return;
        };
        assert!(current && checksum == header.checksum, "what lands is verified");
        let copy = match header.transport {
            Transport::Nccl => Copy::Parcel(header.pieces),
            Transport::Ipc => Copy::From(header.pieces),
            Transport::Quic => self.staged(header.pieces, &new, &bytes),
        };
        self.applying.push_back(copy);
        if self.kind == Sink::InPlace {
            self.applied();
        }
    }

    fn staged(&mut self, LayerRun { layer, run }: LayerRun, new: &[Run], bytes: &[u8]) -> Copy {
        let piece = |ordinal: u32| {
            assert!(ordinal >= self.held, "nothing is written to blocks that are not wanted");
            assert!(self.landed.insert((layer, ordinal)), "nor to a piece that has landed");
            let (pieces, _) = bytes.as_chunks();
            ((layer * self.blocks + ordinal) as usize, pieces[(ordinal - run.first) as usize])
        };
        Copy::Staged(new.iter().flat_map(|run| run.range()).map(piece).collect())
    }

    fn applied(&mut self) {
        let Some(unit) = self.applying.pop_front() else {
            return;
        };
        assert!(!self.visible, "nothing is copied to blocks that are visible");
        match unit {
            Copy::Staged(pieces) => {
                for (at, piece) in pieces {
                    self.sink[at] = piece;
                }
            }
            Copy::Parcel(LayerRun { layer, run }) => {
                for ordinal in run.range() {
                    self.sink[(layer * self.blocks + ordinal) as usize] = content(layer, ordinal);
                }
            }
            Copy::From(LayerRun { layer, run }) => {
                for ordinal in run.range() {
                    // A sender that has ended has given its blocks to others.
                    let foreign = self.sender.outcome().is_some();
                    let piece = if foreign { [0xBB; 8] } else { content(layer, ordinal) };
                    self.sink[(layer * self.blocks + ordinal) as usize] = piece;
                }
            }
        }
        self.receiver.applied(self.now);
    }

    fn unreadable(&mut self) {
        if let Some(Copy::From(_) | Copy::Parcel(_)) = self.applying.front() {
            self.applying.pop_front();
            self.receiver.unreadable(self.now);
        }
    }

    pub(crate) fn corrupt(&mut self) {
        if self.corrupted < MAX_RETRIES
            && let Some(unit) = self.payload.front_mut()
        {
            let at = unit.bytes.len() / 3;
            unit.bytes[at] ^= 0x10;
            self.corrupted += 1;
        }
    }

    /// Frames of a dead connection may still be delivered late, but none is added to it.
    pub(crate) fn collect_frames(&mut self) {
        while let Some(frame) = self.sender.poll_frame() {
            if self.up && self.sender.link() == Some(self.links) {
                self.to_receiver.push_back((self.links, frame));
            }
        }
        while let Some(frame) = self.receiver.poll_frame() {
            if self.up && self.receiver.link() == Some(self.links) {
                self.to_sender.push_back((self.links, frame));
            }
        }
    }

    pub(crate) fn wanted(&self) -> u64 {
        u64::from(LAYERS * (self.blocks - self.held))
    }

    pub(crate) fn check(&mut self) {
        let again = u64::from(MAX_RETRIES * self.blocks);
        let ways = if matches!(self.kind, Sink::Direct | Sink::Channel) { 2 } else { 1 };
        assert!(self.sent <= ways * self.wanted() + again, "what is in flight was granted");
        match self.receiver.outcome() {
            Some(Ok(token)) => {
                assert_eq!(*token, first());
                self.visible = true;
                assert!(self.applying.is_empty(), "visible means applied");
                for layer in 0..LAYERS {
                    for ordinal in self.held..self.blocks {
                        let piece = self.sink[(layer * self.blocks + ordinal) as usize];
                        assert_eq!(piece, content(layer, ordinal), "what is visible is right");
                    }
                }
            }
            _ => assert!(!self.visible, "an outcome is final"),
        }
        let untouched = |piece: &[u8; 8]| *piece == [0xEE; 8];
        for layer in 0..LAYERS {
            let start = (layer * self.blocks) as usize;
            assert!(self.sink[start..start + self.held as usize].iter().all(untouched));
        }
        if let Some(Ok(sent)) = self.sender.outcome() {
            assert!(self.visible, "acknowledged means in place at the receiver");
            assert_eq!(sent.bytes, 8 * self.wanted());
            assert_eq!(sent.blocks, self.blocks - self.held);
        }
    }

    /// From here on nothing goes wrong any more; returns whether both ends come to an end.
    pub(crate) fn settle(&mut self) -> bool {
        for layer in 0..LAYERS {
            self.apply(Step::Ready { layer, from: 0, to: self.blocks });
        }
        self.apply(Step::Finish);
        self.apply(Step::Reserve);
        if !self.up {
            self.apply(Step::SenderNotices);
            self.apply(Step::ReceiverNotices);
        }
        for _ in 0..100_000 {
            if self.sender.outcome().is_some() && self.receiver.outcome().is_some() {
                return true;
            }
            self.apply(Step::Connect);
            self.apply(Step::Send);
            if !self.to_receiver.is_empty() {
                self.apply(Step::ToReceiver(0));
            } else if !self.to_sender.is_empty() {
                self.apply(Step::ToSender(0));
            } else if !self.payload.is_empty() {
                self.apply(Step::Payload);
            } else if !self.applying.is_empty() {
                self.apply(Step::Applied);
            } else {
                self.sleep();
            }
        }
        false
    }

    /// Nothing is in flight: time passes until the next deadline.
    pub(crate) fn sleep(&mut self) {
        let next = [self.sender.poll_timeout(), self.receiver.poll_timeout()];
        let next = next.into_iter().flatten().min().expect("one end still waits");
        let wait = next.saturating_duration_since(self.now);
        self.apply(Step::Wait(wait.as_millis() as u64 + 1));
    }

    pub(crate) fn assert_nothing_is_left(&mut self) {
        assert_eq!(self.sender.poll_timeout(), None);
        assert_eq!(self.receiver.poll_timeout(), None);
        assert_eq!(self.sender.poll_unit(self.now), None);
        assert_eq!(self.sender.poll_frame(), None);
        assert_eq!(self.receiver.poll_frame(), None);
    }
}
