//! Which incoming transfers are expected, which offers wait, and which transfers have ended.
//! No I/O and no clock.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use baton_proto::ids::{Epoch, NodeId, TransferId};

use crate::frame::{Frame, Offer, Reason};
use crate::limits::{
    MAX_INCOMING, MAX_PENDING_HASHES, MAX_PENDING_OFFERS, MAX_PENDING_OFFERS_PER_PEER,
    MAX_REMEMBERED,
};
use crate::sender::LinkId;

/// Where an offer or a peer comes from.
pub(crate) trait Origin: Clone {
    fn id(&self) -> LinkId;
    fn node(&self) -> &NodeId;
    fn epoch(&self) -> Epoch;
}

/// What becomes of an offer.
pub(crate) enum Routed<S> {
    /// It is expected: hand it to the receiver.
    Deliver(S, Offer),
    /// It will not be taken: send this back.
    Answer(Frame),
    /// It is kept until it is expected.
    Wait,
}

/// `S` is a receiver, `L` a connection.
pub(crate) struct Inbox<S, L> {
    /// How long an offer may wait.
    patience: Duration,
    expected: HashMap<TransferId, Expected<S>>,
    pending: HashMap<(NodeId, TransferId), Pending<L>>,
    /// Ended transfers with the answer to a repeated offer, oldest first in `ended_order`.
    ended: HashMap<(NodeId, TransferId), Frame>,
    ended_order: VecDeque<(NodeId, TransferId)>,
}

struct Expected<S> {
    from: NodeId,
    epoch: Epoch,
    receiver: S,
}

struct Pending<L> {
    link: L,
    offer: Offer,
    until: Instant,
}

impl<S: Clone, L: Origin> Inbox<S, L> {
    pub(crate) fn new(patience: Duration) -> Self {
        Self {
            patience,
            expected: HashMap::new(),
            pending: HashMap::new(),
            ended: HashMap::new(),
            ended_order: VecDeque::new(),
        }
    }

    /// Registers a receiver; `None` if there are too many, or this one already. Returns an offer
    /// that has waited for it, to be routed again.
    pub(crate) fn expect(
        &mut self,
        id: TransferId,
        from: NodeId,
        epoch: Epoch,
        receiver: S,
    ) -> Option<Option<(L, Offer)>> {
        if self.expected.len() >= MAX_INCOMING || self.expected.contains_key(&id) {
            return None;
        }
        let waiting = self.pending.remove(&(from.clone(), id));
        let expected = Expected { from, epoch, receiver };
        self.expected.insert(id, expected);
        Some(waiting.map(|pending| (pending.link, pending.offer)))
    }

    pub(crate) fn route(&mut self, now: Instant, link: &L, offer: Offer) -> Routed<S> {
        let id = offer.manifest.transfer;
        if let Some(expected) = self.expected.get(&id) {
            return match expected {
                e if e.from != *link.node() => cancel(id, Reason::Sender),
                e if e.epoch != link.epoch() => cancel(id, Reason::Epoch),
                e => Routed::Deliver(e.receiver.clone(), offer),
            };
        }
        let key = (link.node().clone(), id);
        if let Some(answer) = self.ended.get(&key) {
            return Routed::Answer(answer.clone());
        }
        self.pending.retain(|_, pending| pending.until > now);
        if !self.has_room(&key, offer.manifest.hashes.len()) {
            return cancel(id, Reason::Busy);
        }
        let pending = Pending { link: link.clone(), offer, until: now + self.patience };
        self.pending.insert(key, pending);
        Routed::Wait
    }

    /// The receiver of a transfer, if this peer is its sender.
    pub(crate) fn find(&self, id: TransferId, link: &L) -> Option<S> {
        let expected = self.expected.get(&id)?;
        let sender = expected.from == *link.node() && expected.epoch == link.epoch();
        sender.then(|| expected.receiver.clone())
    }

    /// The peer takes a waiting offer back.
    pub(crate) fn withdraw(&mut self, id: TransferId, link: &L) {
        self.pending.remove(&(link.node().clone(), id));
    }

    /// A transfer has ended; `answer` is for repeated offers.
    pub(crate) fn close(&mut self, id: TransferId, answer: Frame) {
        let Some(expected) = self.expected.remove(&id) else {
            return;
        };
        if self.ended_order.len() >= MAX_REMEMBERED
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
        let key = (expected.from, id);
        if self.ended.insert(key.clone(), answer).is_none() {
            self.ended_order.push_back(key);
        }
    }

    /// A connection is lost, and with it the offers that wait.
    pub(crate) fn forget_link(&mut self, link: LinkId) {
        self.pending.retain(|_, pending| pending.link.id() != link);
    }

    /// Receivers that expect something from lives of `node` before `epoch`.
    pub(crate) fn before(&self, node: &NodeId, epoch: Epoch) -> Vec<S> {
        let old = |e: &&Expected<S>| e.from == *node && e.epoch < epoch;
        let receiver = |e: &Expected<S>| e.receiver.clone();
        self.expected.values().filter(old).map(receiver).collect()
    }

    /// Every receiver.
    pub(crate) fn all(&self) -> Vec<S> {
        let receiver = |e: &Expected<S>| e.receiver.clone();
        self.expected.values().map(receiver).collect()
    }

    /// How many are expected.
    pub(crate) fn len(&self) -> usize {
        self.expected.len()
    }

    fn has_room(&self, key: &(NodeId, TransferId), hashes: usize) -> bool {
        let (mut of_peer, mut held) = (0, hashes);
        for (other, pending) in self.pending.iter().filter(|(other, _)| *other != key) {
            of_peer += usize::from(other.0 == key.0);
            held += pending.offer.manifest.hashes.len();
        }
        self.pending.len() < MAX_PENDING_OFFERS
            && of_peer < MAX_PENDING_OFFERS_PER_PEER
            && held <= MAX_PENDING_HASHES
    }
}

fn cancel<S>(id: TransferId, reason: Reason) -> Routed<S> {
    Routed::Answer(Frame::Cancel(id, reason))
}
