//! What clients do in a cluster, and what they are told.

use std::time::{Duration, Instant};

use baton_coordinator::core::{NewRequest, Update};
use baton_proto::hash::CacheSalt;

use super::client::{Client, Ended, Plan, Question, Reaction};
use super::log::note;
use super::memory::request_id;
use super::net::Party;
use super::{Event, World};

/// Most time until a client whose request was lost or refused asks again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl World {
    /// Adds a client that asks at `at`.
    pub(crate) fn add_client(&mut self, at: Instant, client: Client) {
        let number = self.clients.len();
        if let Plan::LeaveAfter(after) = client.question.plan {
            self.net.timeline.at(at + after, Event::Leave(number));
        }
        self.net.timeline.at(at, Event::Ask(number));
        self.clients.push(client);
        self.open += 1;
    }

    pub(super) fn ask(&mut self, number: usize) {
        let answers = |&at: &usize| {
            self.coordinators[at].is_some() && self.net.frozen(Party::Coordinator(at)).is_none()
        };
        let up: Vec<usize> = (0..self.coordinators.len()).filter(answers).collect();
        let client = &mut self.clients[number];
        if client.ended.is_some() || client.coordinator.is_some() {
            return;
        }
        let waited = self.net.now().saturating_duration_since(client.asked);
        let deadline = client.question.deadline.map(|most| most.saturating_sub(waited));
        if deadline.is_some_and(|left| left.is_zero()) {
            return self.end(number, Ended::Late);
        }
        if up.is_empty() {
            return self.ask_again(number);
        }
        let coordinator = up[self.net.random.usize(..up.len())];
        client.ask(coordinator);
        let Question { prompt, sampling, embed, standing, .. } = client.question.clone();
        let salt = CacheSalt::default();
        let chain = self.root.chain(salt, &prompt, self.block_tokens);
        let id = request_id(number, client.submissions);
        let model = "demo".to_owned();
        let tokens = prompt.into();
        let (tenant, trace) = Default::default();
        let request = NewRequest {
            id,
            model,
            tokens,
            sampling,
            embed,
            salt,
            standing,
            tenant,
            deadline,
            trace,
        };
        let process = self.coordinators[coordinator].as_mut().expect("it is up");
        let (result, updates) = process.submit(number, request, chain, &mut self.net);
        if let Err(error) = result {
            note!(self.net, "client {number} is refused: {error}");
            let reaction = self.clients[number].refused(&error);
            self.open -= usize::from(self.clients[number].ended.is_some());
            self.react(number, reaction);
        }
        self.tell_clients(updates);
    }

    fn ask_again(&mut self, client: usize) {
        let pause = self.net.some(ASK_AGAIN);
        self.net.timeline.after(pause, Event::Ask(client));
    }

    /// A client goes away; `satisfied`: it has what it wanted.
    pub(super) fn leave(&mut self, number: usize, satisfied: bool) {
        let client = &mut self.clients[number];
        if client.ended.is_some() || client.leaving {
            return;
        }
        client.leaving = true;
        let Some(coordinator) = client.coordinator else {
            return self.end(number, Ended::Left);
        };
        let id = request_id(number, client.submissions);
        let process = self.coordinators[coordinator].as_mut().expect("it has the request");
        let updates = process.end(id, satisfied, &mut self.net);
        self.tell_clients(updates);
    }

    fn end(&mut self, client: usize, ended: Ended) {
        self.clients[client].ended = Some(ended);
        self.open -= 1;
    }

    pub(super) fn tell_clients(&mut self, updates: Vec<(usize, Update)>) {
        let idle = self.updates.is_empty();
        self.updates.extend(updates);
        // A client's reaction may bring more; they are told from the outermost call.
        while idle && let Some((client, update)) = self.updates.pop_front() {
            let now = self.net.now();
            let reaction = self.clients[client].hear(update, now);
            if self.clients[client].ended.is_some() {
                self.open -= 1;
                if self.forgets {
                    self.clients[client].forget();
                }
            }
            self.react(client, reaction);
        }
    }

    pub(super) fn react(&mut self, client: usize, reaction: Reaction) {
        match reaction {
            Reaction::None => {}
            Reaction::Leave => self.leave(client, false),
            Reaction::Satisfied => self.leave(client, true),
            Reaction::AskAgain => self.ask_again(client),
        }
    }
}
