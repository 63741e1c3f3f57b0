//! A node's end of all its KV transfers under virtual time: the real `Sender`, `Receiver` and
//! `Inbox`, with modelled connections. Mirrors what kvtransfer does over QUIC.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use baton_kvtransfer::frame::{FirstToken, Manifest, UnitHeader};
use baton_kvtransfer::inbox::Inbox;
use baton_kvtransfer::{ReceiveError, Receiver, SendError, Sender, Sent, Timing, Transport};
use baton_proto::ids::{Epoch, NodeId, TransferId};
use crc32c::crc32c_append;

use super::engine::Engine;
use super::memory::Piece;
use super::net::{Message, Net, WireId};
use super::{Event, NodeTimer};

mod accept;
mod dial;

use accept::LinkIn;
use dial::Dialer;

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
    /// Copies from neighbours that have begun, in order.
    copies: VecDeque<Copy>,
    copied_by: Option<Instant>,
    last_inbound: u64,
    /// What the node has not heard yet.
    pub(crate) happened: Vec<Happened>,
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

/// A unit that is copied from a neighbour's memory.
#[derive(Debug)]
pub(crate) struct Copy {
    id: TransferId,
    /// Which receiver of that transfer.
    inbound: u64,
    pub(crate) from: usize,
    /// Which life of it.
    pub(crate) epoch: Epoch,
    pub(crate) layer: u32,
    first: u32,
    pub(crate) blocks: Vec<u32>,
}

struct Inbound {
    number: u64,
    machine: Receiver,
    wire: Option<WireId>,
    /// The offer has been told.
    told: bool,
    /// It has blocks to write to.
    leased: bool,
    armed: Option<Instant>,
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
            copies: VecDeque::new(),
            copied_by: None,
            last_inbound: 0,
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

    /// Whether blocks of a transfer are being copied from a neighbour.
    pub(crate) fn copies(&self, id: TransferId) -> bool {
        self.copies.iter().any(|copy| copy.id == id)
    }

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
                self.last_inbound += 1;
                let number = self.last_inbound;
                let inbound = Inbound {
                    number,
                    machine,
                    wire: None,
                    told: false,
                    leased: false,
                    armed: None,
                };
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
        let run = header.pieces.run;
        if outbound.wire == Some(wire) && header.transport != Transport::Quic {
            let blocks = run.range().map(|ordinal| around.engine.block(id, ordinal)).collect();
            around.net.send(wire, 0, outbound.stream, Message::References(header, blocks));
        } else if outbound.wire == Some(wire) {
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
        let transport = outbound.machine.transport();
        let length = match transport {
            Transport::Quic | Transport::Nccl => run.run.count * piece_bytes as u32,
            Transport::Ipc => run.run.count * size_of::<u32>() as u32,
        };
        let mut header = UnitHeader { transfer: id, pieces: run, transport, length, checksum: 0 };
        if transport == Transport::Quic {
            header.checksum = checksum(&header, &pieces(&header, around.engine));
        }
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
            let (leased, number) = (inbound.leased, inbound.number);
            self.inbound.remove(&id);
            // Copies keep the lease until they have ended.
            if leased && !self.copies.iter().any(|copy| copy.inbound == number) {
                self.happened.push(Happened::Returned(id));
            }
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
