//! Which incoming transfers are expected, which offers wait, and which transfers have ended.
//! No I/O and no clock.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use baton_proto::ids::{Epoch, NodeId, TransferId};

use crate::frame::{Frame, Offer, Reason};
use crate::limits::{
    MAX_INCOMING, MAX_PENDING_HASHES, MAX_PENDING_OFFERS, MAX_PENDING_OFFERS_PER_PEER,
    MAX_REMEMBERED,
};
use crate::sender::LinkId;

/// Where an offer or a peer comes from.
pub trait Origin: Clone {
    /// The connection.
    fn id(&self) -> LinkId;
    /// The peer's node.
    fn node(&self) -> &NodeId;
    /// Which life of it.
    fn epoch(&self) -> Epoch;
}

/// What becomes of an offer.
pub enum Routed<S> {
    /// It is expected: hand it to the receiver.
    Deliver(S, Offer),
    /// It will not be taken: send this back.
    Answer(Frame),
    /// It is kept until it is expected.
    Wait,
}

/// `S` is a receiver, `L` a connection.
pub struct Inbox<S, L> {
    /// How long an offer may wait.
    patience: Duration,
    expected: BTreeMap<TransferId, Expected<S>>,
    pending: BTreeMap<(NodeId, TransferId), Pending<L>>,
    /// Ended transfers with the answer to a repeated offer, oldest first in `ended_order`.
    ended: BTreeMap<(NodeId, TransferId), Frame>,
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
    /// Nothing is expected; an offer may wait for `patience`.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self {
            patience,
            expected: BTreeMap::new(),
            pending: BTreeMap::new(),
            ended: BTreeMap::new(),
            ended_order: VecDeque::new(),
        }
    }

    /// Registers a receiver; `None` if there are too many, or this one already. Returns an offer
    /// that has waited for it, to be routed again.
    pub fn expect(
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

    /// An offer came over `link`.
    pub fn route(&mut self, now: Instant, link: &L, offer: Offer) -> Routed<S> {
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
    #[must_use]
    pub fn find(&self, id: TransferId, link: &L) -> Option<S> {
        let expected = self.expected.get(&id)?;
        let sender = expected.from == *link.node() && expected.epoch == link.epoch();
        sender.then(|| expected.receiver.clone())
    }

    /// The peer takes a waiting offer back.
    pub fn withdraw(&mut self, id: TransferId, link: &L) {
        self.pending.remove(&(link.node().clone(), id));
    }

    /// A transfer has ended; `answer` is for repeated offers.
    pub fn close(&mut self, id: TransferId, answer: Frame) {
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
    pub fn forget_link(&mut self, link: LinkId) {
        self.pending.retain(|_, pending| pending.link.id() != link);
    }

    /// Receivers that expect something from lives of `node` before `epoch`.
    #[must_use]
    pub fn before(&self, node: &NodeId, epoch: Epoch) -> Vec<S> {
        let old = |e: &&Expected<S>| e.from == *node && e.epoch < epoch;
        let receiver = |e: &Expected<S>| e.receiver.clone();
        self.expected.values().filter(old).map(receiver).collect()
    }

    /// Every receiver.
    #[must_use]
    pub fn all(&self) -> Vec<S> {
        let receiver = |e: &Expected<S>| e.receiver.clone();
        self.expected.values().map(receiver).collect()
    }

    /// How many are expected.
    #[must_use]
    pub fn len(&self) -> usize {
        self.expected.len()
    }

    /// Whether nothing is expected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.expected.is_empty()
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

#[cfg(test)]
mod tests {
    use baton_proto::geometry::{KvDtype, KvGeometry};
    use baton_proto::hash::ModelRoot;
    use baton_proto::ids::RequestId;

    use super::*;
    use crate::frame::Manifest;

    #[derive(Clone, PartialEq, Debug)]
    struct FakeLink(LinkId, NodeId, Epoch);

    impl Origin for FakeLink {
        fn id(&self) -> LinkId {
            self.0
        }

        fn node(&self) -> &NodeId {
            &self.1
        }

        fn epoch(&self) -> Epoch {
            self.2
        }
    }

    const PATIENCE: Duration = Duration::from_secs(9);

    fn id(request: usize) -> TransferId {
        TransferId { request: RequestId(request as u128), attempt: 1 }
    }

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    fn link(number: LinkId, name: &str) -> FakeLink {
        FakeLink(number, node(name), Epoch(1))
    }

    fn offer(request: usize) -> Offer {
        Offer {
            manifest: Manifest {
                transfer: id(request),
                root: ModelRoot([0; 16]),
                geometry: KvGeometry {
                    layers: 1,
                    kv_heads: 1,
                    head_dim: 1,
                    dtype: KvDtype::F32,
                    block_tokens: 16,
                },
                blocks: 1,
                hashes: Vec::new(),
            },
            lease: PATIENCE,
        }
    }

    fn reason(routed: &Routed<u32>) -> Option<Reason> {
        match routed {
            Routed::Answer(Frame::Cancel(_, reason)) => Some(*reason),
            _ => None,
        }
    }

    #[test]
    fn an_offer_meets_its_receiver_in_either_order() {
        let (now, p0) = (Instant::now(), link(1, "p0"));
        let mut inbox: Inbox<u32, FakeLink> = Inbox::new(PATIENCE);
        assert!(inbox.expect(id(1), node("p0"), Epoch(1), 11).unwrap().is_none());
        assert!(matches!(inbox.route(now, &p0, offer(1)), Routed::Deliver(11, _)));
        assert!(matches!(inbox.route(now, &p0, offer(2)), Routed::Wait));
        let waited = inbox.expect(id(2), node("p0"), Epoch(1), 22).unwrap();
        assert_eq!(waited, Some((p0, offer(2))));
    }

    #[test]
    fn a_stranger_can_neither_take_nor_block_a_transfer() {
        let (now, p1) = (Instant::now(), link(2, "p1"));
        let mut inbox: Inbox<u32, FakeLink> = Inbox::new(PATIENCE);
        assert!(matches!(inbox.route(now, &p1, offer(1)), Routed::Wait));
        assert!(inbox.expect(id(1), node("p0"), Epoch(1), 11).unwrap().is_none());
        let again = inbox.route(now, &p1, offer(1));
        assert_eq!(reason(&again), Some(Reason::Sender));
        assert_eq!(inbox.find(id(1), &p1), None);
        let old = FakeLink(3, node("p0"), Epoch(0));
        assert_eq!(reason(&inbox.route(now, &old, offer(1))), Some(Reason::Epoch));
        assert_eq!(inbox.find(id(1), &old), None);
        assert_eq!(inbox.find(id(1), &link(4, "p0")), Some(11));
    }

    #[test]
    fn an_ended_transfer_is_answered_for_a_while() {
        let (now, p0) = (Instant::now(), link(1, "p0"));
        let mut inbox: Inbox<u32, FakeLink> = Inbox::new(PATIENCE);
        for request in 0..=MAX_REMEMBERED {
            inbox.expect(id(request), node("p0"), Epoch(1), 0).unwrap();
            inbox.close(id(request), Frame::Complete(id(request)));
        }
        let newest = inbox.route(now, &p0, offer(MAX_REMEMBERED));
        assert!(matches!(newest, Routed::Answer(Frame::Complete(_))));
        assert!(matches!(inbox.route(now, &p0, offer(0)), Routed::Wait));
        assert_eq!(inbox.ended.len(), MAX_REMEMBERED);
    }

    #[test]
    fn waiting_offers_are_bounded_and_do_not_wait_for_ever() {
        let (now, p0) = (Instant::now(), link(1, "p0"));
        let mut inbox: Inbox<u32, FakeLink> = Inbox::new(PATIENCE);
        for request in 0..MAX_PENDING_OFFERS_PER_PEER {
            assert!(matches!(inbox.route(now, &p0, offer(request)), Routed::Wait));
        }
        let one_more = offer(MAX_PENDING_OFFERS_PER_PEER);
        let refused = inbox.route(now, &p0, one_more.clone());
        assert_eq!(reason(&refused), Some(Reason::Busy));
        let other = link(2, "p1");
        assert!(matches!(inbox.route(now, &other, offer(0)), Routed::Wait));
        let later = now + PATIENCE;
        assert!(matches!(inbox.route(later, &p0, one_more), Routed::Wait));
        assert_eq!(inbox.pending.len(), 1, "the others have waited long enough");
        inbox.forget_link(1);
        assert!(inbox.pending.is_empty());
    }

    #[test]
    fn receivers_are_bounded() {
        let mut inbox: Inbox<u32, FakeLink> = Inbox::new(PATIENCE);
        for request in 0..MAX_INCOMING {
            inbox.expect(id(request), node("p0"), Epoch(1), 0).unwrap();
        }
        assert!(inbox.expect(id(MAX_INCOMING), node("p0"), Epoch(1), 0).is_none());
    }
}
