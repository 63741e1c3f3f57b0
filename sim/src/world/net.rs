//! What connects the parties: time, connections that delay, park and lose what they carry, and who
//! is there to be connected to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use baton_kvtransfer::frame::{Frame, UnitHeader};
use baton_proto::ids::Epoch;
use baton_proto::message::{Command, Hello, NodeEvent};

use super::Event;
use super::log::Log;
use super::memory::Piece;
use super::timeline::Timeline;

/// A process that others connect to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Party {
    Node(usize),
    Coordinator(usize),
}

/// Whether a process answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Presence {
    /// It runs.
    Up,
    /// Its machine says that nobody listens.
    Stopped,
    /// Its machine is gone as well: nothing answers.
    Dark,
}

/// What a connection carries.
#[derive(Debug)]
pub(crate) enum Message {
    /// Join stream, from the node: its introduction.
    Hello(Box<Hello>),
    /// Join stream, to the node: it has joined.
    Welcome,
    /// Join stream, to the node.
    Command(Box<Command>),
    /// Join stream, from the node.
    Said(Box<NodeEvent>),
    /// KV connection, from the dialler: which life of the node it is.
    KvHello(Epoch),
    /// KV connection, control stream.
    Frame(Box<Frame>),
    /// KV connection, payload stream: a unit.
    Unit(UnitHeader, Vec<Piece>),
    /// KV connection, payload stream: a unit of references to the sender's blocks.
    References(UnitHeader, Vec<u32>),
    /// The other end has closed.
    Closed(Close),
}

/// Why an end closes a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Close {
    /// The process is gone, or silent for too long, or leaves.
    Plain,
    /// The same party has opened another one.
    Replaced,
    /// The dialler is an earlier life of its node.
    OldEpoch,
    /// The node stops in good order.
    Stopping,
}

pub(crate) type WireId = u64;

/// A connection between two processes. End 0 has dialled.
pub(crate) struct Wire {
    pub(crate) ends: [End; 2],
    /// For how long an end bears silence.
    patience: Duration,
    /// When the last message of each direction and stream arrives.
    last: BTreeMap<(usize, u64), Instant>,
    /// What cannot be delivered for the time being.
    parked: Vec<(usize, Message)>,
}

#[derive(Clone, Copy)]
pub(crate) struct End {
    pub(crate) party: Party,
    pub(crate) open: bool,
}

/// How good connections are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quality {
    /// One way.
    pub(crate) latency: Duration,
    /// At most so much more, by chance; streams of one connection may overtake each other by it.
    pub(crate) jitter: Duration,
    /// Of a node's payload, in each direction, shared by all its transfers.
    pub(crate) bytes_per_second: f64,
    /// Share of the payload units that arrive damaged.
    pub(crate) damage: f64,
    /// Nodes with even numbers share a machine, and so do those with odd ones.
    pub(crate) neighbours: bool,
    /// Most time that a copy from a neighbour's memory takes.
    pub(crate) copy: Duration,
    /// Share of those copies that fail.
    pub(crate) unreadable: f64,
}

/// See the module's description.
pub(crate) struct Net {
    pub(crate) timeline: Timeline<Event>,
    pub(crate) random: fastrand::Rng,
    pub(crate) log: Log,
    pub(crate) quality: Quality,
    wires: BTreeMap<WireId, Wire>,
    next_wire: WireId,
    presence: BTreeMap<Party, (Presence, u64)>,
    /// Pairs that cannot reach each other, smaller party first.
    cut: BTreeSet<(Party, Party)>,
    /// Until when a process does nothing, though its connections stand.
    frozen: BTreeMap<Party, Instant>,
    /// When each node's connection to the network is free again: outwards, inwards.
    free: BTreeMap<usize, [Instant; 2]>,
}

impl Net {
    pub(crate) fn new(seed: u64, quality: Quality, log: Log) -> Self {
        Self {
            timeline: Timeline::new(),
            random: fastrand::Rng::with_seed(seed),
            log,
            quality,
            wires: BTreeMap::new(),
            next_wire: 1,
            presence: BTreeMap::new(),
            cut: BTreeSet::new(),
            frozen: BTreeMap::new(),
            free: BTreeMap::new(),
        }
    }

    pub(crate) fn now(&self) -> Instant {
        self.timeline.now()
    }

    /// A duration below `most`, by chance.
    pub(crate) fn some(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.random.f64())
    }

    pub(crate) fn presence(&self, party: Party) -> Presence {
        self.presence.get(&party).map_or(Presence::Stopped, |&(presence, _)| presence)
    }

    /// Which life of a party is its latest.
    pub(crate) fn life(&self, party: Party) -> u64 {
        self.presence.get(&party).map_or(0, |&(_, life)| life)
    }

    pub(crate) fn set_presence(&mut self, party: Party, presence: Presence, life: u64) {
        self.presence.insert(party, (presence, life));
        self.frozen.remove(&party);
    }

    /// A process stands still for a while: others hear nothing of it, and it hears everything later.
    /// Not one that stands still or is cut off already: what is held up for two reasons would get out
    /// of order.
    pub(crate) fn freeze(&mut self, party: Party, time: Duration) {
        let is_cut = self.cut.iter().any(|&(a, b)| a == party || b == party);
        if is_cut || self.frozen(party).is_some() {
            return;
        }
        self.frozen.insert(party, self.now() + time);
        for (wire, end) in self.ends_of(party) {
            self.fall_silent(wire, 1 - end);
        }
    }

    /// Until when a process stands still, if it does.
    pub(crate) fn frozen(&self, party: Party) -> Option<Instant> {
        self.frozen.get(&party).copied().filter(|&until| until > self.now())
    }

    pub(crate) fn is_cut(&self, a: Party, b: Party) -> bool {
        self.cut.contains(&(a.min(b), a.max(b)))
    }

    /// Whether a dial would get an answer, if only that nobody listens.
    pub(crate) fn answers(&self, from: Party, to: Party) -> bool {
        let runs = self.presence(to) != Presence::Dark && self.frozen(to).is_none();
        runs && !self.is_cut(from, to)
    }

    /// A new connection, whose ends bear silence for `patience`.
    pub(crate) fn connect(&mut self, from: Party, to: Party, patience: Duration) -> WireId {
        let id = self.next_wire;
        self.next_wire += 1;
        let ends = [from, to].map(|party| End { party, open: true });
        let wire = Wire { ends, patience, last: BTreeMap::new(), parked: Vec::new() };
        self.wires.insert(id, wire);
        id
    }

    /// Whether this end of a connection is open.
    pub(crate) fn is_open(&self, id: WireId, end: usize) -> bool {
        self.wires.get(&id).is_some_and(|wire| wire.ends[end].open)
    }

    /// Who is at this end.
    pub(crate) fn party(&self, id: WireId, end: usize) -> Option<Party> {
        self.wires.get(&id).map(|wire| wire.ends[end].party)
    }

    /// Sends over a stream, whose messages stay in order.
    pub(crate) fn send(&mut self, id: WireId, from: usize, stream: u64, message: Message) {
        let delay = self.quality.latency + self.some(self.quality.jitter);
        self.send_at(id, from, stream, self.now() + delay, message);
    }

    /// The same, to arrive at `at` or after the stream's last message.
    fn send_at(&mut self, id: WireId, from: usize, stream: u64, at: Instant, message: Message) {
        let Some(wire) = self.wires.get_mut(&id).filter(|wire| wire.ends[from].open) else {
            return;
        };
        let last = wire.last.entry((from, stream)).or_insert(at);
        *last = at.max(*last);
        let at = *last;
        self.timeline.at(at, Event::Deliver { wire: id, to: 1 - from, message });
    }

    /// Sends a payload unit of `bytes` over a stream: both nodes' connections carry it in turn
    /// with their other units.
    pub(crate) fn send_unit(
        &mut self,
        id: WireId,
        stream: u64,
        header: UnitHeader,
        mut pieces: Vec<Piece>,
    ) {
        if self.random.f64() < self.quality.damage {
            let at = self.random.usize(..pieces.len());
            pieces[at] = Piece::TORN;
        }
        let Some(Party::Node(target)) = self.party(id, 1) else { return };
        let takes = self.transmission(header.length.into());
        let delay = self.quality.latency + self.some(self.quality.jitter);
        let begins = self.now() + delay;
        let now = self.now();
        let free = &mut self.free.entry(target).or_insert([now; 2])[1];
        let ends = begins.max(*free + takes);
        *free = ends;
        self.send_at(id, 0, stream, ends, Message::Unit(header, pieces));
    }

    /// When a unit of `bytes` that `node` wants to send now has left it.
    pub(crate) fn departure(&mut self, node: usize, bytes: u64) -> Instant {
        let (now, takes) = (self.now(), self.transmission(bytes));
        let free = &mut self.free.entry(node).or_insert([now; 2])[0];
        *free = now.max(*free) + takes;
        *free
    }

    fn transmission(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.quality.bytes_per_second)
    }

    /// A message arrives at `to`; `None` if it does not, or not yet.
    pub(crate) fn arrive(&mut self, id: WireId, to: usize, message: Message) -> Option<Message> {
        let wire = self.wires.get_mut(&id).filter(|wire| wire.ends[to].open)?;
        let [a, b] = wire.ends.map(|end| end.party);
        if self.cut.contains(&(a.min(b), a.max(b))) {
            wire.parked.push((to, message));
            return None;
        }
        Some(message)
    }

    /// This end closes and says why. What it has sent arrives first, unless it is `abrupt`.
    pub(crate) fn close(&mut self, id: WireId, end: usize, why: Close, abrupt: bool) {
        if !self.is_open(id, end) {
            return;
        }
        if abrupt {
            let at = self.now() + self.quality.latency;
            self.timeline
                .at(at, Event::Deliver { wire: id, to: 1 - end, message: Message::Closed(why) });
        } else {
            let last = self.wires.get(&id).into_iter().flat_map(|wire| &wire.last);
            let last = last.filter(|((from, _), _)| *from == end).map(|(_, &at)| at).max();
            let at = last.unwrap_or(self.now()).max(self.now() + self.quality.latency);
            self.send_at(id, end, 0, at, Message::Closed(why));
        }
        self.shut(id, end);
    }

    /// This end is gone without a word: the other one notices after a while.
    pub(crate) fn vanish(&mut self, id: WireId, end: usize) {
        self.shut(id, end);
        if let Some(wire) = self.wires.get(&id) {
            let noticed = wire.patience + self.quality.latency;
            self.timeline.after(noticed, Event::Silence { wire: id, end: 1 - end });
        }
    }

    /// Whether an end that has heard nothing for so long still hears nothing; if so, it closes.
    pub(crate) fn lost(&mut self, id: WireId, end: usize) -> bool {
        let Some(wire) = self.wires.get(&id).filter(|wire| wire.ends[end].open) else {
            return false;
        };
        let ([a, b], other) = (wire.ends.map(|end| end.party), wire.ends[1 - end]);
        let silent = self.is_cut(a, b) || !other.open || self.frozen(other.party).is_some();
        if silent {
            self.close(id, end, Close::Plain, false);
        }
        silent
    }

    fn shut(&mut self, id: WireId, end: usize) {
        let Some(wire) = self.wires.get_mut(&id) else { return };
        wire.ends[end].open = false;
        if wire.ends.iter().all(|end| !end.open) {
            self.wires.remove(&id);
        }
    }

    /// This end has heard that the other one has closed.
    pub(crate) fn heard_close(&mut self, id: WireId, end: usize) {
        self.shut(id, end);
    }

    /// Open ends of a party.
    pub(crate) fn ends_of(&self, party: Party) -> Vec<(WireId, usize)> {
        let ends = |(&id, wire): (&WireId, &Wire)| {
            let own = |end: &usize| wire.ends[*end].party == party && wire.ends[*end].open;
            (0..2).filter(own).map(|end| (id, end)).collect::<Vec<_>>()
        };
        self.wires.iter().flat_map(ends).collect()
    }

    /// From now on nothing passes between the two, unless one of them stands still.
    pub(crate) fn cut(&mut self, a: Party, b: Party) {
        if self.frozen(a).or(self.frozen(b)).is_some() {
            return;
        }
        self.cut.insert((a.min(b), a.max(b)));
        for id in self.between(a, b) {
            (0..2).for_each(|end| self.fall_silent(id, end));
        }
    }

    /// This end hears nothing from now on.
    fn fall_silent(&mut self, id: WireId, end: usize) {
        let most = self.wires[&id].patience;
        let noticed = most / 2 + self.some(most / 2);
        self.timeline.after(noticed, Event::Silence { wire: id, end });
    }

    /// What was held up between the two arrives.
    pub(crate) fn heal(&mut self, a: Party, b: Party) {
        self.cut.remove(&(a.min(b), a.max(b)));
        for id in self.between(a, b) {
            let parked = self.wires.get_mut(&id).map(|wire| std::mem::take(&mut wire.parked));
            for (to, message) in parked.unwrap_or_default() {
                self.timeline.after(Duration::ZERO, Event::Deliver { wire: id, to, message });
            }
        }
    }

    /// All cuts end.
    pub(crate) fn heal_all(&mut self) {
        for (a, b) in self.cut.clone() {
            self.heal(a, b);
        }
    }

    fn between(&self, a: Party, b: Party) -> Vec<WireId> {
        let joins = |wire: &Wire| {
            let ends = wire.ends.map(|end| end.party);
            ends == [a, b] || ends == [b, a]
        };
        self.wires.iter().filter(|(_, wire)| joins(wire)).map(|(&id, _)| id).collect()
    }
}
