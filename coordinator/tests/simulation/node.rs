//! A made-up node: what it has to do for the coordinator, one small step at a time.

use std::collections::BTreeMap;

use baton_proto::ids::{Epoch, NodeId, Role, TransferId};
use baton_proto::message::{Command, Job, NodeEvent, NodeFinish, Peer, TokenEvent};

/// Token ids are below this.
pub(crate) const VOCAB: u32 = 1000;

/// The model: what comes after these tokens, and whether that ends the sequence.
pub(crate) fn oracle(tokens: &[u32], emitted: usize, max_tokens: u32) -> (u32, Option<NodeFinish>) {
    let step = |state: u64, &token: &u32| (state ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
    let state = tokens.iter().fold(0xcbf2_9ce4_8422_2325, step);
    let token = (state >> 20) as u32 % VOCAB;
    let finish = if token.is_multiple_of(13) {
        Some(NodeFinish::EndOfSequence)
    } else if emitted as u32 + 1 >= max_tokens {
        Some(NodeFinish::Length)
    } else {
        None
    };
    (token, finish)
}

/// What a node is doing for one attempt.
pub(crate) struct Work {
    pub(crate) job: Job,
    /// Prefill: where the KV goes. Decode: where it comes from, if not computed here.
    pub(crate) peer: Option<Peer>,
    pub(crate) state: State,
}

#[derive(PartialEq)]
pub(crate) enum State {
    Queued,
    /// Prefill: the first token is known and the KV is on its way.
    Sending,
    /// Decode: generating.
    Running,
}

/// The KV of an attempt on its way, with the first token at its end.
pub(crate) struct Kv {
    pub(crate) id: TransferId,
    pub(crate) from: (NodeId, Epoch),
    pub(crate) to: Peer,
    pub(crate) first: TokenEvent,
}

pub(crate) struct Node {
    pub(crate) role: Role,
    pub(crate) epoch: u64,
    pub(crate) alive: bool,
    pub(crate) jobs: BTreeMap<TransferId, Work>,
    pub(crate) sent: Vec<NodeEvent>,
}

impl Node {
    pub(crate) fn new(role: Role) -> Self {
        Self { role, epoch: 1, alive: true, jobs: BTreeMap::new(), sent: Vec::new() }
    }

    pub(crate) fn command(&mut self, command: Command) {
        let (job, peer) = match command {
            Command::Prefill { job, decode, .. } => (job, Some(decode)),
            Command::Decode { job, prefill, .. } => (job, prefill),
            Command::Cancel(id) => {
                self.jobs.remove(&id);
                return;
            }
            Command::SendSnapshot => return,
            other => panic!("unexpected {other:?}"),
        };
        let work = Work { job, peer, state: State::Queued };
        assert!(self.jobs.insert(work.job.id, work).is_none(), "an attempt was sent twice");
    }

    /// One step of one attempt; KV that leaves is returned.
    pub(crate) fn work(&mut self, name: &NodeId, id: TransferId) -> Option<Kv> {
        let work = self.jobs.get_mut(&id)?;
        let local = self.role == Role::Decode && work.peer.is_none();
        match work.state {
            State::Queued if self.role == Role::Prefill || local => {
                self.sent.push(started(id));
                let first = next(&work.job, true);
                self.sent.push(NodeEvent::Tokens(vec![first.clone()]));
                if local {
                    self.advance(first);
                    return None;
                }
                work.state = State::Sending;
                let to = work.peer.clone().expect("a prefill has a target");
                let from = (name.clone(), Epoch(self.epoch));
                Some(Kv { id, from, to, first })
            }
            State::Running => {
                let token = next(&work.job, false);
                self.sent.push(NodeEvent::Tokens(vec![token.clone()]));
                self.advance(token);
                None
            }
            State::Queued | State::Sending => None,
        }
    }

    /// The KV of an attempt has landed here; false if nothing waits for it yet.
    pub(crate) fn landed(&mut self, kv: &Kv) -> bool {
        if !self.jobs.contains_key(&kv.id) {
            return false;
        }
        self.sent.push(started(kv.id));
        self.advance(kv.first.clone());
        true
    }

    fn advance(&mut self, token: TokenEvent) {
        let Some(work) = self.jobs.get_mut(&token.id) else { return };
        work.job.tokens = work.job.tokens.iter().copied().chain([token.token]).collect();
        work.state = State::Running;
        if token.finish.is_some() {
            self.jobs.remove(&token.id);
        }
    }
}

fn started(id: TransferId) -> NodeEvent {
    NodeEvent::Started { id, cached_tokens: 0, queued: std::time::Duration::ZERO }
}

fn next(job: &Job, ends_prefill: bool) -> TokenEvent {
    let position = job.next_position();
    let (token, finish) = oracle(&job.tokens, position, job.sampling.max_tokens);
    TokenEvent {
        id: job.id,
        position: position as u32,
        token,
        logprobs: None,
        finish,
        prefill: ends_prefill.then_some(std::time::Duration::from_millis(1)),
    }
}
