//! Connections to nodes that this one sends to: one for each life of a node, made and kept while it
//! is used.

use std::time::Duration;

use baton_kvtransfer::SendError;
use baton_kvtransfer::frame::Reason;
use baton_proto::ids::{Epoch, TransferId};

use super::{Around, Endpoint, Outbound};
use crate::world::NodeTimer;
use crate::world::net::{Close, Message, Net, Party, Presence, WireId};

/// Pauses between dials, as kvtransfer makes them.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(1);

/// The connection to one life of another node, made and kept while it is used.
pub(super) struct Dialer {
    epoch: Epoch,
    up: Option<WireId>,
    backoff: Duration,
}

impl Endpoint {
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

    pub(super) fn link_to(
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

    pub(super) fn connected(&mut self, id: TransferId, wire: WireId, around: &mut Around<'_>) {
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
}
