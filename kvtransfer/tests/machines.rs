//! `Sender` against `Receiver` without I/O, in virtual time, under every fault that a network
//! and two owners can come up with: whatever happens, both end, and what is visible is right.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use baton_kvtransfer::frame::{Frame, LayerRun, Manifest, UnitHeader};
use baton_kvtransfer::limits::MAX_RETRIES;
use baton_kvtransfer::{FirstToken, LinkId, ReceiveError, Receiver, SendError, Sender, Timing};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{RequestId, TransferId};
use crc32c::crc32c;
use proptest::collection::vec;
use proptest::prelude::*;

const LAYERS: u32 = 3;
const LEASE: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(600);

/// A piece has 8 bytes.
fn geometry() -> KvGeometry {
    KvGeometry { layers: LAYERS, kv_heads: 1, head_dim: 1, dtype: KvDtype::F32, block_tokens: 1 }
}

fn manifest(blocks: u32) -> Manifest {
    Manifest {
        transfer: TransferId { request: RequestId(5), attempt: 2 },
        root: ModelRoot([1; 16]),
        geometry: geometry(),
        blocks,
        hashes: vec![BlockHash([9; 16]); blocks as usize],
    }
}

fn content(layer: u32, ordinal: u32) -> [u8; 8] {
    (u64::from(layer) * 1_000_003 + u64::from(ordinal) * 7919 + 11).to_le_bytes()
}

fn first() -> FirstToken {
    FirstToken { token: 1, logprobs: None, finish: None }
}

/// What may happen next.
#[derive(Clone, Debug)]
enum Step {
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
    /// Deliver the next part of the payload.
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
}

/// What owners and a connection do.
fn steps(blocks: u32) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..LAYERS, 0..blocks, 0..=blocks)
            .prop_map(|(layer, from, to)| Step::Ready { layer, from, to }),
        1 => Just(Step::Finish),
        8 => Just(Step::Send),
        8 => Just(Step::ToReceiver(0)),
        8 => Just(Step::ToSender(0)),
        16 => Just(Step::Payload),
        1 => Just(Step::Corrupt),
        1 => Just(Step::Cut),
        2 => Just(Step::SenderNotices),
        2 => Just(Step::ReceiverNotices),
        3 => Just(Step::Connect),
    ]
}

/// The same with cancels, waits, and what QUIC makes impossible.
fn steps_with_faults(blocks: u32) -> impl Strategy<Value = Step> {
    let faults = prop_oneof![
        (1usize..4).prop_map(Step::ToReceiver),
        (1usize..4).prop_map(Step::ToSender),
        Just(Step::DropToReceiver),
        Just(Step::DropToSender),
        Just(Step::RepeatToReceiver),
        Just(Step::RepeatToSender),
        Just(Step::RepeatPayload),
        (0u64..3000).prop_map(Step::Wait),
        Just(Step::CancelSender),
        Just(Step::CancelReceiver),
    ];
    prop_oneof![15 => steps(blocks), 1 => faults]
}

/// A unit on its way; it arrives in two parts and then ends.
#[derive(Clone)]
struct Flying {
    link: LinkId,
    header: UnitHeader,
    bytes: Vec<u8>,
    arrived: usize,
}

struct World {
    now: Instant,
    blocks: u32,
    held: u32,
    sender: Sender,
    receiver: Receiver,
    links: LinkId,
    up: bool,
    to_receiver: VecDeque<(LinkId, Frame)>,
    to_sender: VecDeque<(LinkId, Frame)>,
    payload: VecDeque<Flying>,
    corrupted: u32,
    /// What the source has reported ready.
    ready: HashSet<(u32, u32)>,
    /// Pieces sent over the current connection.
    sent: u64,
    sink: Vec<[u8; 8]>,
    /// Pieces whose checksum held.
    landed: HashSet<(u32, u32)>,
    visible: bool,
}

impl World {
    fn new(blocks: u32, held: u32) -> Self {
        let now = Instant::now();
        let timing = Timing { lease: LEASE, ..Timing::default() };
        Self {
            now,
            blocks,
            held,
            sender: Sender::new(now, manifest(blocks), timing).unwrap(),
            receiver: Receiver::new(now, manifest(blocks), held, LEASE, PATIENCE).unwrap(),
            links: 0,
            up: false,
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            payload: VecDeque::new(),
            corrupted: 0,
            ready: HashSet::new(),
            sent: 0,
            sink: vec![[0xEE; 8]; (LAYERS * blocks) as usize],
            landed: HashSet::new(),
            visible: false,
        }
    }

    fn apply(&mut self, step: Step) {
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
        }
        self.collect_frames();
        self.check();
    }

    fn connect(&mut self) {
        if !self.up {
            self.up = true;
            self.links += 1;
            self.sent = 0;
            self.sender.handle_connected(self.now, self.links);
        }
    }

    fn send(&mut self) {
        let Some(pieces) = self.sender.poll_unit(self.now) else {
            return;
        };
        let LayerRun { layer, run } = pieces;
        assert!(run.count > 0 && layer < LAYERS && run.range().end <= self.blocks);
        assert!(run.first >= self.held, "only granted pieces are sent");
        assert!(run.range().all(|o| self.ready.contains(&(layer, o))), "only ready ones");
        self.sent += u64::from(run.count);
        let bytes: Vec<u8> = run.range().flat_map(|o| content(layer, o)).collect();
        let header = UnitHeader {
            transfer: manifest(1).transfer,
            pieces,
            length: bytes.len() as u32,
            checksum: crc32c(&bytes),
        };
        self.payload.push_back(Flying {
            link: self.sender.link().unwrap(),
            header,
            bytes,
            arrived: 0,
        });
    }

    fn receive(&mut self, link: LinkId, frame: Frame) {
        match frame {
            Frame::Offer(offer) => self.receiver.handle_offer(self.now, link, &offer),
            other => self.receiver.handle_frame(self.now, link, other),
        }
    }

    /// The unit in front arrives a part further.
    fn deliver(&mut self) {
        let Some(mut unit) = self.payload.pop_front() else {
            return;
        };
        let now = self.now;
        if unit.arrived == 0 && self.receiver.begin_unit(now, unit.link, &unit.header) != Ok(true) {
            return;
        }
        if unit.arrived == unit.bytes.len() {
            self.end_unit(&unit);
            return;
        }
        let half = (unit.bytes.len() / 2).max(1);
        let until = if unit.arrived < half { half } else { unit.bytes.len() };
        for at in unit.arrived..until {
            self.write(&unit, at);
        }
        unit.arrived = until;
        self.payload.push_front(unit);
    }

    fn write(&mut self, unit: &Flying, at: usize) {
        let (layer, run) = (unit.header.pieces.layer, unit.header.pieces.run);
        let ordinal = run.first + (at / 8) as u32;
        if self.receiver.accepts(self.now, unit.link, layer, ordinal) {
            assert!(!self.visible, "nothing is written once the blocks are visible");
            assert!(ordinal >= self.held, "nor to blocks that are not wanted");
            assert!(!self.landed.contains(&(layer, ordinal)), "nor to a piece that has landed");
            self.sink[(layer * self.blocks + ordinal) as usize][at % 8] = unit.bytes[at];
        }
    }

    fn end_unit(&mut self, unit: &Flying) {
        let LayerRun { layer, run } = unit.header.pieces;
        let current = self.receiver.is_current(unit.link);
        let checksum = crc32c(&unit.bytes);
        self.receiver.end_unit(self.now, unit.link, checksum);
        if current && checksum == unit.header.checksum {
            self.landed.extend(run.range().map(|o| (layer, o)));
        }
    }

    fn corrupt(&mut self) {
        if self.corrupted < MAX_RETRIES
            && let Some(unit) = self.payload.iter_mut().find(|unit| unit.arrived == 0)
        {
            let at = unit.bytes.len() / 3;
            unit.bytes[at] ^= 0x10;
            self.corrupted += 1;
        }
    }

    /// Frames of a dead connection may still be delivered late, but none is added to it.
    fn collect_frames(&mut self) {
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

    fn wanted(&self) -> u64 {
        u64::from(LAYERS * (self.blocks - self.held))
    }

    fn check(&mut self) {
        let again = u64::from(MAX_RETRIES * self.blocks);
        assert!(self.sent <= self.wanted() + again, "what is in flight was granted");
        match self.receiver.outcome() {
            Some(Ok(token)) => {
                assert_eq!(*token, first());
                self.visible = true;
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
    fn settle(&mut self) -> bool {
        for layer in 0..LAYERS {
            self.apply(Step::Ready { layer, from: 0, to: self.blocks });
        }
        self.apply(Step::Finish);
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
            } else {
                self.sleep();
            }
        }
        false
    }

    /// Nothing is in flight: time passes until the next deadline.
    fn sleep(&mut self) {
        let next = [self.sender.poll_timeout(), self.receiver.poll_timeout()];
        let next = next.into_iter().flatten().min().expect("one end still waits");
        let wait = next.saturating_duration_since(self.now);
        self.apply(Step::Wait(wait.as_millis() as u64 + 1));
    }

    fn assert_nothing_is_left(&mut self) {
        assert_eq!(self.sender.poll_timeout(), None);
        assert_eq!(self.receiver.poll_timeout(), None);
        assert_eq!(self.sender.poll_unit(self.now), None);
        assert_eq!(self.sender.poll_frame(), None);
        assert_eq!(self.receiver.poll_frame(), None);
    }
}

fn worlds<S: Strategy<Value = Step>>(
    steps: impl Fn(u32) -> S + Copy,
) -> impl Strategy<Value = (u32, u32, Vec<Step>)> {
    (1u32..9).prop_flat_map(move |blocks| (Just(blocks), 0..=blocks, vec(steps(blocks), 0..150)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_happens_both_end((blocks, held, steps) in worlds(steps_with_faults)) {
        let mut world = World::new(blocks, held);
        for step in steps {
            world.apply(step);
        }
        prop_assert!(world.settle());
        world.assert_nothing_is_left();
    }

    /// Cuts, damage within the limit, and any interleaving of what QUIC keeps in order.
    #[test]
    fn what_quic_can_do_is_survived((blocks, held, steps) in worlds(steps)) {
        let mut world = World::new(blocks, held);
        for step in steps {
            // A connection that is lost is noticed before anything else is sent over the next.
            if matches!(step, Step::Connect) && !world.up {
                world.apply(Step::SenderNotices);
                world.apply(Step::ReceiverNotices);
                world.to_receiver.clear();
                world.to_sender.clear();
                world.payload.clear();
            }
            if matches!(step, Step::Cut) && world.links > 10 {
                continue;
            }
            world.apply(step);
        }
        if !world.up {
            world.to_receiver.clear();
            world.to_sender.clear();
            world.payload.clear();
        }
        prop_assert!(world.settle());
        prop_assert!(world.sender.outcome().unwrap().is_ok(), "{:?}", world.sender.outcome());
        world.assert_nothing_is_left();
    }
}

/// Both ends after the offer and the grant.
fn granted(blocks: u32, held: u32) -> World {
    let mut world = World::new(blocks, held);
    world.apply(Step::Connect);
    world.apply(Step::ToReceiver(0));
    world.apply(Step::ToSender(0));
    world
}

fn ready_all(world: &mut World) {
    for layer in 0..LAYERS {
        let to = world.blocks;
        world.apply(Step::Ready { layer, from: 0, to });
    }
}

#[test]
fn contiguous_blocks_go_in_one_unit() {
    let mut world = granted(8, 2);
    for from in [2, 4, 6] {
        world.apply(Step::Ready { layer: 1, from, to: from + 2 });
    }
    world.apply(Step::Send);
    assert_eq!(world.payload.len(), 1);
    let run = world.payload[0].header.pieces.run;
    assert_eq!((run.first, run.count), (2, 6));
}

#[test]
fn a_damaged_unit_is_sent_again_and_then_given_up() {
    let mut world = granted(4, 0);
    world.apply(Step::Ready { layer: 0, from: 0, to: 4 });
    for _ in 0..=MAX_RETRIES {
        world.apply(Step::Send);
        world.payload[0].bytes[5] ^= 1;
        while !world.payload.is_empty() {
            world.apply(Step::Payload);
        }
        world.apply(Step::ToSender(0));
    }
    assert_eq!(world.receiver.outcome(), Some(&Err(ReceiveError::Corrupt)));
    let refused = SendError::Refused(baton_kvtransfer::Reason::Corrupt);
    assert_eq!(world.sender.outcome(), Some(&Err(refused)));
    assert!(world.landed.is_empty());
}

#[test]
fn a_reconnect_sends_only_what_has_not_landed() {
    let mut world = granted(8, 0);
    world.apply(Step::Ready { layer: 0, from: 0, to: 8 });
    world.apply(Step::Send);
    while !world.payload.is_empty() {
        world.apply(Step::Payload);
    }
    ready_all(&mut world);
    world.apply(Step::Send);
    world.apply(Step::Payload);
    for step in [Step::Cut, Step::SenderNotices, Step::ReceiverNotices, Step::Connect] {
        world.apply(step);
    }
    assert!(world.settle());
    assert_eq!(world.sent, 16, "layers 1 and 2, and not layer 0 again");
    assert!(world.sender.outcome().unwrap().is_ok());
}

#[test]
fn a_lost_acknowledgement_is_repeated() {
    let mut world = granted(2, 0);
    ready_all(&mut world);
    world.apply(Step::Finish);
    while world.receiver.outcome().is_none() {
        for step in [Step::Send, Step::Payload, Step::ToReceiver(0)] {
            world.apply(step);
        }
    }
    world.to_sender.clear();
    for step in [Step::Cut, Step::SenderNotices, Step::Connect] {
        world.apply(step);
    }
    world.apply(Step::ToReceiver(0));
    world.apply(Step::ToSender(0));
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!((sent.blocks, sent.bytes), (2, 6 * 8));
}

#[test]
fn hidden_and_exposed_meet_at_finish() {
    let mut world = granted(1, 0);
    ready_all(&mut world);
    world.apply(Step::Send);
    world.apply(Step::Wait(70));
    world.apply(Step::Finish);
    world.apply(Step::Wait(30));
    assert!(world.settle());
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!(sent.hidden, Duration::from_millis(70));
    assert_eq!(sent.exposed, Duration::from_millis(30));
}

#[test]
fn silence_ends_the_wait_of_each_side() {
    let mut world = granted(1, 0);
    let end = world.now + LEASE + Duration::from_millis(1);
    world.now = end;
    world.sender.handle_timeout(end);
    world.receiver.handle_timeout(end);
    assert!(matches!(world.sender.outcome(), Some(Err(SendError::Timeout(_)))));
    assert!(matches!(world.receiver.outcome(), Some(Err(ReceiveError::Timeout(_)))));
}

#[test]
fn heartbeats_keep_a_slow_prompt_alive() {
    let mut world = granted(1, 0);
    for _ in 0..40 {
        world.sleep();
        while !world.to_receiver.is_empty() {
            world.apply(Step::ToReceiver(0));
        }
        while !world.to_sender.is_empty() {
            world.apply(Step::ToSender(0));
        }
    }
    assert!(world.sender.outcome().is_none() && world.receiver.outcome().is_none());
    assert!(world.settle());
    assert!(world.sender.outcome().unwrap().is_ok());
}
