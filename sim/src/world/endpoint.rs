//! A node's end of all its KV transfers under virtual time: the real `Sender`, `Receiver` and
//! `Inbox`, with modelled connections. Mirrors what kvtransfer does over QUIC.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use baton_kvtransfer::frame::{FirstToken, Frame, Manifest, Offer, Reason, UnitHeader};
use baton_kvtransfer::inbox::{Inbox, Origin, Routed};
use baton_kvtransfer::{LinkId, ReceiveError, Receiver, SendError, Sender, Sent, Timing};
use baton_proto::ids::{Epoch, NodeId, TransferId};
use crc32c::crc32c_append;

use super::engine::Engine;
use super::memory::Piece;
use super::net::{Close, Message, Net, Party, Presence, WireId};
use super::{Event, NodeTimer};

/// Pauses between dials, as kvtransfer makes them.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(1);

/// What a node hears from its endpoint.
#[derive(Debug)]
pub(crate) enum Happened {
    /// An expected transfer was offered.
    Offered(TransferId),
    /// Nobody reads or writes the blocks of a transfer any more.
    Returned(TransferId),
    /// A transfer has arrived, or has failed.
    Sent(TransferId, Result<Sent, SendError>),
    Received(TransferId, Result<FirstToken, ReceiveError>),
}

/// See the module's description.
pub(crate) struct Endpoint {
    node: usize,
    epoch: Epoch,
    timing: Timing,
    inbox: Inbox<TransferId, LinkIn>,
    outbound: BTreeMap<TransferId, Outbound>,
    inbound: BTreeMap<TransferId, Inbound>,
    dialers: BTreeMap<usize, Dialer>,
    links_in: BTreeMap<WireId, LinkIn>,
    last_stream: u64,
    /// What the node has not heard yet.
    pub(crate) happened: Vec<Happened>,
}

/// A connection from a node that sends to this one.
#[derive(Clone)]
struct LinkIn {
    wire: WireId,
    peer: NodeId,
    epoch: Epoch,
}

impl Origin for LinkIn {
    fn id(&self) -> LinkId {
        self.wire
    }

    fn node(&self) -> &NodeId {
        &self.peer
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }
}

struct Outbound {
    machine: Sender,
    target: usize,
    /// Which life of the target.
    epoch: Epoch,
    wire: Option<WireId>,
    /// Payload stream on that connection.
    stream: u64,
    /// The unit that is being handed to the transport, and over which connection.
    unit: Option<(UnitHeader, WireId)>,
    armed: Option<Instant>,
}

struct Inbound {
    machine: Receiver,
    wire: Option<WireId>,
    /// The offer has been told.
    told: bool,
    /// It has blocks to write to.
    leased: bool,
    armed: Option<Instant>,
}

/// The connection to one life of another node, made and kept while it is used.
struct Dialer {
    epoch: Epoch,
    up: Option<WireId>,
    backoff: Duration,
}

/// The time and what surrounds an endpoint.
pub(crate) struct Around<'a> {
    pub(crate) net: &'a mut Net,
    pub(crate) engine: &'a mut Engine,
    pub(crate) names: &'a [NodeId],
}

impl Endpoint {
    pub(crate) fn new(node: usize, epoch: Epoch, timing: Timing) -> Self {
        Self {
            node,
            epoch,
            timing,
            inbox: Inbox::new(timing.begin),
            outbound: BTreeMap::new(),
            inbound: BTreeMap::new(),
            dialers: BTreeMap::new(),
            links_in: BTreeMap::new(),
            last_stream: 0,
            happened: Vec::new(),
        }
    }

    /// Transfers under way.
    pub(crate) fn transfers(&self) -> (usize, usize) {
        assert_eq!(self.inbox.len(), self.inbound.len(), "the inbox knows every receiver");
        (self.outbound.len(), self.inbound.len())
    }

    fn timer(&self, net: &mut Net, at: Instant, what: NodeTimer) {
        net.timeline.at(at, Event::Node { node: self.node, life: self.epoch.0, what });
    }

    // The owner's inputs.

    /// Sends blocks that are leased to the transfer until its end.
    pub(crate) fn send(
        &mut self,
        manifest: Manifest,
        (target, epoch): (usize, Epoch),
        around: &mut Around<'_>,
    ) {
        let id = manifest.transfer;
        let machine = match Sender::new(around.net.now(), manifest, self.timing) {
            Ok(_) if self.outbound.contains_key(&id) => Err(SendError::Busy),
            machine => machine,
        };
        let machine = match machine {
            Ok(machine) => machine,
            Err(error) => {
                self.happened.push(Happened::Returned(id));
                return self.happened.push(Happened::Sent(id, Err(error)));
            }
        };
        let outbound =
            Outbound { machine, target, epoch, wire: None, stream: 0, unit: None, armed: None };
        let link = self.link_to(target, epoch, around);
        self.outbound.insert(id, outbound);
        match link {
            Ok(Some(wire)) => self.connected(id, wire, around),
            Ok(None) => self.settle_out(id, around),
            Err(error) => self.sender(id, around, |machine, _| machine.handle_failed(error)),
        }
    }

    /// An input for a sender, if it still runs.
    pub(crate) fn sender(
        &mut self,
        id: TransferId,
        around: &mut Around<'_>,
        input: impl FnOnce(&mut Sender, Instant),
    ) {
        if let Some(outbound) = self.outbound.get_mut(&id) {
            input(&mut outbound.machine, around.net.now());
            self.settle_out(id, around);
        }
    }

    /// Expects blocks for which there is no room yet.
    pub(crate) fn expect(
        &mut self,
        manifest: Manifest,
        (from, epoch): (NodeId, Epoch),
        around: &mut Around<'_>,
    ) {
        let id = manifest.transfer;
        let (now, lease) = (around.net.now(), self.timing.lease);
        let machine = Receiver::new(now, manifest, None, lease, &self.timing);
        let machine = machine.and_then(|machine| match self.inbox.expect(id, from, epoch, id) {
            Some(offer) => Ok((machine, offer)),
            None => Err(ReceiveError::Busy),
        });
        match machine {
            Ok((machine, offer)) => {
                let inbound =
                    Inbound { machine, wire: None, told: false, leased: false, armed: None };
                self.inbound.insert(id, inbound);
                match offer {
                    Some((link, offer)) => self.take_offer(&link, offer, around),
                    None => self.settle_in(id, around),
                }
            }
            Err(error) => {
                self.happened.push(Happened::Offered(id));
                self.happened.push(Happened::Received(id, Err(error)));
            }
        }
    }

    /// An expected transfer may write to blocks that are leased to it until its end; false: it has
    /// ended.
    pub(crate) fn reserve(&mut self, id: TransferId, held: u32, around: &mut Around<'_>) -> bool {
        let Some(inbound) = self.inbound.get_mut(&id) else { return false };
        inbound.leased = true;
        self.receiver(id, around, |machine, now| machine.reserve(now, held));
        true
    }

    /// An input for a receiver, if it still runs.
    pub(crate) fn receiver(
        &mut self,
        id: TransferId,
        around: &mut Around<'_>,
        input: impl FnOnce(&mut Receiver, Instant),
    ) {
        if let Some(inbound) = self.inbound.get_mut(&id) {
            input(&mut inbound.machine, around.net.now());
            self.settle_in(id, around);
        }
    }

    // Timers.

    pub(crate) fn sender_due(&mut self, id: TransferId, around: &mut Around<'_>) {
        let now = around.net.now();
        if let Some(outbound) = self.outbound.get_mut(&id) {
            outbound.armed = None;
            if outbound.machine.poll_timeout().is_some_and(|due| due <= now) {
                outbound.machine.handle_timeout(now);
            }
            self.settle_out(id, around);
        }
    }

    pub(crate) fn receiver_due(&mut self, id: TransferId, around: &mut Around<'_>) {
        let now = around.net.now();
        if let Some(inbound) = self.inbound.get_mut(&id) {
            inbound.armed = None;
            if inbound.machine.poll_timeout().is_some_and(|due| due <= now) {
                inbound.machine.handle_timeout(now);
            }
            self.settle_in(id, around);
        }
    }

    /// The unit that was being sent has left.
    pub(crate) fn departed(&mut self, id: TransferId, around: &mut Around<'_>) {
        let Some(outbound) = self.outbound.get_mut(&id) else { return };
        let Some((header, wire)) = outbound.unit.take() else { return };
        if outbound.wire == Some(wire) {
            let pieces = pieces(&header, around.engine);
            assert_eq!(
                checksum(&header, &pieces),
                header.checksum,
                "a block changed while it was being sent"
            );
            around.net.send_unit(wire, outbound.stream, header, pieces);
        }
        self.settle_out(id, around);
    }

    /// A dial has had the time to succeed.
    pub(crate) fn dialled(&mut self, target: usize, epoch: Epoch, around: &mut Around<'_>) {
        let dialling = |dialer: &&mut Dialer| dialer.epoch == epoch && dialer.up.is_none();
        let Some(dialer) = self.dialers.get_mut(&target).filter(dialling) else { return };
        let (own, peer) = (Party::Node(self.node), Party::Node(target));
        let net = &mut *around.net;
        if !net.answers(own, peer) {
            let pause = self.timing.message + dialer.backoff;
            dialer.backoff = (dialer.backoff * 2).min(LAST_BACKOFF);
            return self.wait((target, epoch), pause, "the handshake was too slow", around);
        }
        let theirs = Epoch(net.life(peer));
        if net.presence(peer) == Presence::Stopped {
            let error = SendError::Unreachable("nobody listens".to_owned());
            return self.hopeless((target, epoch), &error, around);
        }
        if theirs != epoch {
            let error = SendError::WrongEpoch { expected: epoch.0, theirs: theirs.0 };
            return self.hopeless((target, epoch), &error, around);
        }
        let wire = net.connect(own, peer, self.timing.idle);
        dialer.up = Some(wire);
        dialer.backoff = FIRST_BACKOFF;
        net.send(wire, 0, 0, Message::KvHello(self.epoch));
        for id in self.senders_to(target, epoch) {
            self.connected(id, wire, around);
        }
    }

    // Connections.

    /// Something arrived over a connection that this node has dialled.
    pub(crate) fn hear_out(&mut self, wire: WireId, message: Message, around: &mut Around<'_>) {
        match message {
            Message::Frame(frame) => {
                if let Some(id) = frame.transfer() {
                    self.sender(id, around, |machine, now| machine.handle_frame(now, wire, *frame));
                }
            }
            Message::Closed(why) => self.lost_out(wire, why, around),
            other => panic!("a receiver said {other:?}"),
        }
    }

    /// Something arrived over a connection from another node.
    pub(crate) fn hear_in(&mut self, wire: WireId, message: Message, around: &mut Around<'_>) {
        if let Message::KvHello(epoch) = message {
            return self.greet(wire, epoch, around);
        }
        let Some(link) = self.links_in.get(&wire).cloned() else { return };
        match message {
            Message::Frame(frame) => match *frame {
                Frame::Offer(offer) => self.take_offer(&link, offer, around),
                frame => self.pass_on(&link, frame, around),
            },
            Message::UnitBegins(unit) => self.unit_begins(&link, unit, around),
            Message::UnitEnds(unit, pieces) => self.unit_ends(&link, unit, &pieces, around),
            Message::Closed(why) => self.lost_in(wire, why == Close::Stopping, around),
            other => panic!("a sender said {other:?}"),
        }
    }

    fn link_to(
        &mut self,
        target: usize,
        epoch: Epoch,
        around: &mut Around<'_>,
    ) -> Result<Option<WireId>, SendError> {
        match self.dialers.get(&target) {
            Some(dialer) if dialer.epoch == epoch => return Ok(dialer.up),
            Some(dialer) if dialer.epoch > epoch => {
                let (expected, theirs) = (epoch.0, dialer.epoch.0);
                return Err(SendError::WrongEpoch { expected, theirs });
            }
            Some(&Dialer { epoch: earlier, up, .. }) => {
                up.iter().for_each(|&wire| around.net.close(wire, 0, Close::Plain, false));
                let error = SendError::Unreachable("another life of it is in use".to_owned());
                self.hopeless((target, earlier), &error, around);
            }
            None => {}
        }
        self.dialers.insert(target, Dialer { epoch, up: None, backoff: FIRST_BACKOFF });
        self.dial(target, epoch, Duration::ZERO, around.net);
        Ok(None)
    }

    fn dial(&self, target: usize, epoch: Epoch, pause: Duration, net: &mut Net) {
        let round_trip = net.quality.latency * 2;
        self.timer(net, net.now() + pause + round_trip, NodeTimer::Dialled { target, epoch });
    }

    fn senders_to(&self, target: usize, epoch: Epoch) -> Vec<TransferId> {
        let to = |o: &Outbound| o.target == target && o.epoch == epoch;
        self.outbound.iter().filter(|(_, o)| to(o)).map(|(&id, _)| id).collect()
    }

    fn connected(&mut self, id: TransferId, wire: WireId, around: &mut Around<'_>) {
        self.last_stream += 1;
        if let Some(outbound) = self.outbound.get_mut(&id) {
            outbound.wire = Some(wire);
            outbound.stream = self.last_stream;
        }
        self.sender(id, around, |machine, now| machine.handle_connected(now, wire));
    }

    fn hopeless(
        &mut self,
        (target, epoch): (usize, Epoch),
        error: &SendError,
        around: &mut Around<'_>,
    ) {
        self.dialers.remove(&target);
        for id in self.senders_to(target, epoch) {
            self.sender(id, around, |machine, _| machine.handle_failed(error.clone()));
        }
    }

    /// Dials again after a while, if anybody needs it.
    fn wait(
        &mut self,
        (target, epoch): (usize, Epoch),
        pause: Duration,
        why: &str,
        around: &mut Around<'_>,
    ) {
        for id in self.senders_to(target, epoch) {
            self.sender(id, around, |machine, now| machine.handle_disconnected(now, why));
        }
        if self.senders_to(target, epoch).is_empty() {
            self.dialers.remove(&target);
        } else {
            self.dial(target, epoch, pause, around.net);
        }
    }

    fn lost_out(&mut self, wire: WireId, why: Close, around: &mut Around<'_>) {
        let lost = self.dialers.iter_mut().find(|(_, dialer)| dialer.up == Some(wire));
        let Some((&target, dialer)) = lost else { return };
        dialer.up = None;
        let (to, pause) = ((target, dialer.epoch), dialer.backoff);
        dialer.backoff = (dialer.backoff * 2).min(LAST_BACKOFF);
        let error = match why {
            Close::Plain | Close::Replaced => {
                return self.wait(to, pause, "the connection was lost", around);
            }
            Close::OldEpoch => SendError::Refused(Reason::Epoch),
            Close::Stopping => SendError::Unreachable("it stops".to_owned()),
        };
        self.hopeless(to, &error, around);
    }

    /// A node has one connection here: the latest of its latest life.
    fn greet(&mut self, wire: WireId, epoch: Epoch, around: &mut Around<'_>) {
        let Some(Party::Node(peer)) = around.net.party(wire, 0) else { return };
        let peer = around.names[peer].clone();
        let current = self.links_in.values().find(|link| link.peer == peer).cloned();
        if current.as_ref().is_some_and(|current| current.epoch > epoch) {
            return around.net.close(wire, 1, Close::OldEpoch, false);
        }
        self.links_in.insert(wire, LinkIn { wire, peer: peer.clone(), epoch });
        if let Some(current) = current {
            around.net.close(current.wire, 1, Close::Replaced, false);
            self.lost_in(current.wire, false, around);
        }
        for id in self.inbox.before(&peer, epoch) {
            self.receiver(id, around, |machine, _| machine.handle_sender_gone());
        }
    }

    fn lost_in(&mut self, wire: WireId, stops: bool, around: &mut Around<'_>) {
        self.links_in.remove(&wire);
        self.inbox.forget_link(wire);
        for id in self.inbox.all() {
            self.receiver(id, around, |machine, _| {
                if stops && machine.link() == Some(wire) {
                    machine.handle_sender_gone();
                }
                machine.handle_disconnected(wire);
            });
        }
    }

    fn take_offer(&mut self, link: &LinkIn, offer: Offer, around: &mut Around<'_>) {
        match self.inbox.route(around.net.now(), link, offer) {
            Routed::Wait => {}
            Routed::Answer(frame) => {
                around.net.send(link.wire, 1, 0, Message::Frame(Box::new(frame)));
            }
            Routed::Deliver(id, offer) => {
                if let Some(inbound) = self.inbound.get_mut(&id) {
                    inbound.wire = inbound.wire.max(Some(link.wire));
                }
                self.receiver(id, around, |machine, now| {
                    machine.handle_offer(now, link.wire, &offer);
                });
            }
        }
    }

    fn pass_on(&mut self, link: &LinkIn, frame: Frame, around: &mut Around<'_>) {
        let Some(id) = frame.transfer() else { return };
        match self.inbox.find(id, link) {
            Some(id) => self.receiver(id, around, |machine, now| {
                machine.handle_frame(now, link.wire, frame);
            }),
            None if matches!(frame, Frame::Cancel(..)) => self.inbox.withdraw(id, link),
            None => {}
        }
    }

    fn unit_begins(&mut self, link: &LinkIn, unit: UnitHeader, around: &mut Around<'_>) {
        let Some(id) = self.inbox.find(unit.transfer, link) else { return };
        let mut begun = false;
        self.receiver(id, around, |machine, now| {
            begun = machine.begin_unit(now, link.wire, &unit) == Ok(true);
        });
        if begun {
            let torn = vec![Piece::TORN; unit.pieces.run.count as usize];
            self.write(id, link.wire, &unit, &torn, around);
        }
    }

    fn unit_ends(
        &mut self,
        link: &LinkIn,
        unit: UnitHeader,
        pieces: &[Piece],
        around: &mut Around<'_>,
    ) {
        let Some(id) = self.inbox.find(unit.transfer, link) else { return };
        self.write(id, link.wire, &unit, pieces, around);
        let checksum = checksum(&unit, pieces);
        self.receiver(id, around, |machine, now| machine.end_unit(now, link.wire, checksum));
    }

    fn write(
        &mut self,
        id: TransferId,
        wire: WireId,
        unit: &UnitHeader,
        pieces: &[Piece],
        around: &mut Around<'_>,
    ) {
        let now = around.net.now();
        let Some(Inbound { machine, .. }) = self.inbound.get_mut(&id) else { return };
        for (ordinal, &piece) in unit.pieces.run.range().zip(pieces) {
            if machine.accepts(now, wire, unit.pieces.layer, ordinal) {
                around.engine.write(id, unit.pieces.layer, ordinal, piece);
            }
        }
    }

    // What machines have to say.

    fn settle_out(&mut self, id: TransferId, around: &mut Around<'_>) {
        let Some(outbound) = self.outbound.get_mut(&id) else { return };
        while let Some(frame) = outbound.machine.poll_frame() {
            if let Some(wire) = outbound.wire.filter(|_| outbound.machine.link() == outbound.wire) {
                around.net.send(wire, 0, 0, Message::Frame(Box::new(frame)));
            }
        }
        if let Some(outcome) = outbound.machine.outcome().cloned() {
            self.outbound.remove(&id);
            self.happened.push(Happened::Returned(id));
            return self.happened.push(Happened::Sent(id, outcome));
        }
        self.pump(id, around);
        self.arm_sender(id, around.net);
    }

    /// One unit at a time is handed to the transport.
    fn pump(&mut self, id: TransferId, around: &mut Around<'_>) {
        let Some(outbound) = self.outbound.get_mut(&id) else { return };
        let Some(wire) = outbound.wire.filter(|_| outbound.machine.link() == outbound.wire) else {
            return;
        };
        if outbound.unit.is_some() {
            return;
        }
        let Some(run) = outbound.machine.poll_unit(around.net.now()) else { return };
        let piece_bytes = outbound.machine.manifest().geometry.piece_bytes();
        let length = run.run.count * piece_bytes as u32;
        let mut header = UnitHeader { transfer: id, pieces: run, length, checksum: 0 };
        header.checksum = checksum(&header, &pieces(&header, around.engine));
        outbound.unit = Some((header, wire));
        let departure = around.net.departure(self.node, length.into());
        self.timer(around.net, departure, NodeTimer::Departed(id));
    }

    fn arm_sender(&mut self, id: TransferId, net: &mut Net) {
        let Some(outbound) = self.outbound.get_mut(&id) else { return };
        let Some(due) = outbound.machine.poll_timeout() else { return };
        if outbound.armed.is_none_or(|armed| due < armed) {
            outbound.armed = Some(due);
            self.timer(net, due, NodeTimer::Sender(id));
        }
    }

    fn settle_in(&mut self, id: TransferId, around: &mut Around<'_>) {
        let Some(inbound) = self.inbound.get_mut(&id) else { return };
        while let Some(frame) = inbound.machine.poll_frame() {
            if let Some(wire) = inbound.wire.filter(|_| inbound.machine.link() == inbound.wire) {
                around.net.send(wire, 1, 0, Message::Frame(Box::new(frame)));
            }
        }
        let ended = inbound.machine.outcome().cloned().zip(inbound.machine.farewell());
        // Who waits for the offer hears of the end as well.
        let tell = inbound.machine.offered() || ended.is_some();
        if tell && !std::mem::replace(&mut inbound.told, true) {
            self.happened.push(Happened::Offered(id));
        }
        if let Some((outcome, farewell)) = ended {
            if inbound.leased {
                self.happened.push(Happened::Returned(id));
            }
            self.inbound.remove(&id);
            self.inbox.close(id, farewell);
            return self.happened.push(Happened::Received(id, outcome));
        }
        let Some(due) = inbound.machine.poll_timeout() else { return };
        if inbound.armed.is_none_or(|armed| due < armed) {
            inbound.armed = Some(due);
            self.timer(around.net, due, NodeTimer::Receiver(id));
        }
    }
}

fn pieces(unit: &UnitHeader, engine: &Engine) -> Vec<Piece> {
    let ordinals = unit.pieces.run.range();
    ordinals.map(|ordinal| engine.read(unit.transfer, unit.pieces.layer, ordinal)).collect()
}

fn checksum(unit: &UnitHeader, pieces: &[Piece]) -> u32 {
    // The header's own checksum is no part of what it starts from.
    let start = unit.checksum_start();
    pieces.iter().fold(start, |sum, piece| crc32c_append(sum, &piece.bytes()))
}
