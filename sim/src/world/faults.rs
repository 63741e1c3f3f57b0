//! What goes wrong, and its mending.

use std::time::Duration;

use baton_coordinator::orders::Order;

use super::client::Ended;
use super::net::{Close, Party, Presence};
use super::{Event, World, note};

/// See the module's description.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// A process dies; `dark`: with its machine, so that nobody is told.
    Die { party: Party, dark: bool },
    /// It starts again, in a new life.
    Start(Party),
    /// Two parties cannot reach each other.
    Cut(Party, Party),
    /// They can again.
    Heal(Party, Party),
    /// A node's steps take so many times longer.
    Slow { node: usize, times: f64 },
    /// A process stands still for so long, and then goes on as if nothing had been.
    Freeze(Party, Duration),
    /// The connections between two parties break.
    Break(Party, Party),
    /// An operator asks something of a node.
    Order { node: usize, order: Order },
    /// Everything is mended.
    Mend,
    /// Operators take back what they asked for.
    RestoreOrders,
}

impl World {
    pub(crate) fn happen(&mut self, fault: Fault) {
        match fault {
            Fault::Die { party, dark } => self.die(party, dark),
            Fault::Start(Party::Node(node)) => self.start_node(node),
            Fault::Start(Party::Coordinator(coordinator)) => self.start_coordinator(coordinator),
            Fault::Cut(a, b) => self.net.cut(a, b),
            Fault::Heal(a, b) => self.net.heal(a, b),
            Fault::Slow { node, times } => {
                if let Some(node) = &mut self.nodes[node] {
                    node.engine.slowness = times;
                }
            }
            Fault::Freeze(party, time) => self.net.freeze(party, time),
            Fault::Break(a, _) if self.net.frozen(a).is_some() => {}
            Fault::Break(a, b) => self.break_between(a, b),
            Fault::Order { node, order } => self.order(node, order),
            Fault::Mend => self.mend(),
            Fault::RestoreOrders => self.restore_orders(),
        }
    }

    fn die(&mut self, party: Party, dark: bool) {
        if self.net.presence(party) != Presence::Up {
            return;
        }
        let presence = if dark { Presence::Dark } else { Presence::Stopped };
        let life = self.net.life(party);
        self.net.set_presence(party, presence, life);
        for (wire, end) in self.net.ends_of(party) {
            let other = self.net.party(wire, 1 - end);
            // The end of a process ends its TCP streams; QUIC peers wait in vain.
            let quic = matches!((party, other), (Party::Node(_), Some(Party::Node(_))));
            if dark || quic {
                self.net.vanish(wire, end);
            } else {
                let abrupt = self.net.random.bool();
                self.net.close(wire, end, Close::Plain, abrupt);
            }
        }
        match party {
            Party::Node(node) => self.nodes[node] = None,
            Party::Coordinator(coordinator) => {
                let process = self.coordinators[coordinator].take().expect("it was up");
                for client in process.clients() {
                    let reaction = self.clients[client].abandoned();
                    self.open -= usize::from(self.clients[client].ended == Some(Ended::Left));
                    note!(self.net, "client {client} has lost its coordinator");
                    self.react(client, reaction);
                }
            }
        }
    }

    /// Through some coordinator that knows the node. Nothing forces the last decode node away.
    fn order(&mut self, node: usize, order: Order) {
        for at in 0..self.coordinators.len() {
            if self.net.frozen(Party::Coordinator(at)).is_some() {
                continue;
            }
            let Some(process) = &mut self.coordinators[at] else { continue };
            match process.order(&self.names[node], order, &mut self.net) {
                Ok(()) => return,
                Err(error) => note!(self.net, "coordinator-{at} does not pass it on: {error}"),
            }
        }
    }

    /// Each end notices by itself.
    fn break_between(&mut self, a: Party, b: Party) {
        for (wire, end) in self.net.ends_of(a) {
            if self.net.party(wire, 1 - end) == Some(b) {
                self.net.close(wire, end, Close::Plain, true);
                self.connection_lost(wire, end, a, b, Close::Plain);
            }
        }
    }

    fn mend(&mut self) {
        self.net.heal_all();
        (0..self.options.len()).for_each(|coordinator| self.start_coordinator(coordinator));
        for node in 0..self.specs.len() {
            self.start_node(node);
            self.happen(Fault::Slow { node, times: 1.0 });
        }
        self.restore_orders();
    }

    /// Nodes do again what they were meant to do. Those that are away hear it later.
    fn restore_orders(&mut self) {
        for node in 0..self.specs.len() {
            self.order(node, Order::Drain(false));
            self.order(node, Order::Role(self.specs[node].role));
        }
    }

    /// Arranges that faults happen.
    pub(crate) fn arrange(&mut self, after: Duration, fault: Fault) {
        self.net.timeline.after(after, Event::Fault(fault));
    }
}
