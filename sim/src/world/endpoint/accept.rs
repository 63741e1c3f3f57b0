//! Connections from nodes that send to this one, and what arrives over them.

use baton_kvtransfer::frame::{Frame, LayerRun, Offer, Run, UnitHeader};
use baton_kvtransfer::inbox::{Origin, Routed};
use baton_kvtransfer::{LinkId, Receiver, Transport};
use baton_proto::ids::{Epoch, NodeId};

use super::{Around, Copy, Endpoint, Happened, checksum};
use crate::world::NodeTimer;
use crate::world::memory::Piece;
use crate::world::net::{Close, Message, Party, WireId};

/// A connection from a node that sends to this one.
#[derive(Clone)]
pub(super) struct LinkIn {
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

impl Endpoint {
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
            Message::Unit(unit, pieces) => self.unit(&link, unit, &pieces, around),
            Message::References(unit, blocks) => self.references(&link, unit, blocks, around),
            Message::Closed(why) => self.lost_in(wire, why == Close::Stopping, around),
            other => panic!("a sender said {other:?}"),
        }
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

    pub(super) fn take_offer(&mut self, link: &LinkIn, offer: Offer, around: &mut Around<'_>) {
        match self.inbox.route(around.net.now(), link, offer) {
            Routed::Wait => {}
            Routed::Answer(frame) => {
                around.net.send(link.wire, 1, 0, Message::Frame(Box::new(frame)));
            }
            Routed::Deliver(id, offer) => {
                if let Some(inbound) = self.inbound.get_mut(&id) {
                    inbound.wire = inbound.wire.max(Some(link.wire));
                }
                let best = self.best(link, around);
                self.receiver(id, around, |machine, now| {
                    machine.handle_offer(now, link.wire, &offer, best);
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

    fn best(&self, link: &LinkIn, around: &Around<'_>) -> Transport {
        match around.net.party(link.wire, 0) {
            Some(Party::Node(peer)) if around.net.quality.neighbours => {
                if peer % 2 == self.node % 2 { Transport::Ipc } else { Transport::Quic }
            }
            _ => Transport::Quic,
        }
    }

    /// Begins a copy, which ends after those that have begun before.
    fn references(
        &mut self,
        link: &LinkIn,
        unit: UnitHeader,
        blocks: Vec<u32>,
        around: &mut Around<'_>,
    ) {
        let Some(id) = self.inbox.find(unit.transfer, link) else { return };
        let mut sound = false;
        self.receiver(id, around, |machine, now| {
            sound = matches!(machine.unit(now, link.wire, &unit, unit.checksum), Ok(Some(_)));
        });
        let from = around.net.party(link.wire, 0);
        let (Some(Party::Node(from)), Some(inbound), true) = (from, self.inbound.get(&id), sound)
        else {
            return;
        };
        let (inbound, epoch) = (inbound.number, link.epoch);
        let (layer, first) = (unit.pieces.layer, unit.pieces.run.first);
        self.copies.push_back(Copy { id, inbound, from, epoch, layer, first, blocks });
        let most = around.net.quality.copy;
        let ends = around.net.now() + around.net.some(most);
        let ends = self.copied_by.map_or(ends, |last| last.max(ends));
        self.copied_by = Some(ends);
        self.timer(around.net, ends, NodeTimer::Copied);
    }

    /// The oldest copy, which has just ended.
    pub(crate) fn take_copy(&mut self) -> Option<Copy> {
        self.copies.pop_front()
    }

    /// What a copy has read, if it could.
    pub(crate) fn copied(&mut self, copy: &Copy, read: Option<&[Piece]>, around: &mut Around<'_>) {
        let Copy { id, inbound, layer, first, .. } = *copy;
        for (ordinal, &piece) in (first..).zip(read.unwrap_or_default()) {
            around.engine.write(id, layer, ordinal, piece);
        }
        if self.inbound.get(&id).is_some_and(|current| current.number == inbound) {
            self.receiver(id, around, |machine, now| match read {
                Some(_) => machine.applied(now),
                None => machine.unreadable(now),
            });
        } else if !self.copies.iter().any(|copy| copy.inbound == inbound) {
            self.happened.push(Happened::Returned(id));
        }
    }

    fn unit(&mut self, link: &LinkIn, unit: UnitHeader, pieces: &[Piece], around: &mut Around<'_>) {
        let Some(id) = self.inbox.find(unit.transfer, link) else { return };
        let checksum = checksum(&unit, pieces);
        let mut new = None;
        self.receiver(id, around, |machine, now| {
            new = machine.unit(now, link.wire, &unit, checksum).ok().flatten();
        });
        let Some(new) = new else { return };
        let LayerRun { layer, run } = unit.pieces;
        for ordinal in new.into_iter().flat_map(Run::range) {
            let piece = pieces[(ordinal - run.first) as usize];
            around.engine.write(id, layer, ordinal, piece);
        }
        self.receiver(id, around, Receiver::applied);
    }
}
