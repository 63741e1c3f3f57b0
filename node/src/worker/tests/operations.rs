//! What may happen to a node.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_proto::embedding::Pooling;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{Epoch, RequestId, TransferId};
use baton_proto::message::{Command, Job, Peer, Pull};
use baton_proto::sampling::SamplingParams;
use proptest::prelude::*;

use super::*;

fn id(request: usize) -> TransferId {
    TransferId { request: RequestId(request as u128), attempt: 1 }
}

fn job(request: usize, seed: u32, length: usize, max_tokens: u32) -> Job {
    Job {
        id: id(request),
        // Few different tokens, so that prompts share prefixes.
        tokens: (0..length as u32).map(|i| i / 7 * seed % 2).collect(),
        prompt_tokens: length,
        sampling: SamplingParams { max_tokens, ..SamplingParams::default() },
        salt: CacheSalt::default(),
        deadline: (seed == 2).then(|| Duration::from_millis(20)),
        trace: None,
    }
}

fn peer() -> Peer {
    let node = "other".parse().expect("a legal name");
    Peer { node, epoch: Epoch(1), kv_address: "127.0.0.1:1".to_owned() }
}

#[derive(Clone, Debug)]
pub(super) enum Operation {
    Prefill {
        stream: u64,
        seed: u32,
        length: usize,
        pull: Option<usize>,
    },
    Remote {
        stream: u64,
        seed: u32,
        length: usize,
        tokens: u32,
    },
    Local {
        stream: u64,
        seed: u32,
        length: usize,
        tokens: u32,
        pull: Option<usize>,
    },
    Embed {
        stream: u64,
        seed: u32,
        length: usize,
        pooling: Pooling,
    },
    Serve {
        stream: u64,
        seed: u32,
        length: usize,
    },
    /// By its owner, or by another coordinator.
    Cancel {
        by: Option<u64>,
        of: usize,
        pull: bool,
    },
    Offer(usize),
    Receive(usize, bool),
    Sent(usize, bool),
    Late,
    Step,
    Wait(u64),
    Drain(bool),
    Open(u64),
    Close(u64),
}

pub(super) fn operation() -> impl Strategy<Value = Operation> {
    let shape = || (1..4_u64, 0..3_u32, 1..40_usize);
    let pull = || prop::option::of(1..40_usize);
    prop_oneof![
        2 => (shape(), pull()).prop_map(|((stream, seed, length), pull)| {
            Operation::Prefill { stream, seed, length, pull }
        }),
        2 => (shape(), 2..8_u32).prop_map(|((stream, seed, length), tokens)| {
            Operation::Remote { stream, seed, length, tokens }
        }),
        2 => (shape(), 1..8_u32, pull()).prop_map(|((stream, seed, length), tokens, pull)| {
            Operation::Local { stream, seed, length, tokens, pull }
        }),
        1 => (shape(), any::<bool>()).prop_map(|((stream, seed, length), mean)| {
            let pooling = if mean { Pooling::Mean } else { Pooling::Last };
            Operation::Embed { stream, seed, length, pooling }
        }),
        1 => shape().prop_map(|(stream, seed, length)| Operation::Serve { stream, seed, length }),
        2 => (prop::option::weighted(0.2, 1..4_u64), any::<usize>(), prop::bool::weighted(0.3))
            .prop_map(|(by, of, pull)| Operation::Cancel { by, of, pull }),
        4 => any::<usize>().prop_map(Operation::Offer),
        4 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(i, well)| Operation::Receive(i, well)),
        4 => (any::<usize>(), prop::bool::weighted(0.8)).prop_map(|(i, well)| Operation::Sent(i, well)),
        2 => Just(Operation::Late),
        12 => Just(Operation::Step),
        1 => (1..3000_u64).prop_map(Operation::Wait),
        1 => any::<bool>().prop_map(Operation::Drain),
        1 => (1..4_u64).prop_map(Operation::Open),
        1 => (1..4_u64).prop_map(Operation::Close),
    ]
}

fn pick<T>(map: &BTreeMap<TransferId, T>, i: usize) -> Option<TransferId> {
    map.keys().nth(i.checked_rem(map.len())?).copied()
}

impl World {
    pub(super) fn apply(&mut self, operation: Operation) {
        let next = self.begun.len() + 1;
        let pulled = |pull: Option<usize>, length: usize| {
            pull.map(|tokens| Pull { from: peer(), tokens: tokens.min(length) })
        };
        match operation {
            Operation::Prefill { stream, seed, length, pull } => {
                let (job, pull) = (job(next, seed, length, 9), pulled(pull, length));
                self.command(stream, Command::Prefill { job, decode: peer(), pull });
            }
            Operation::Remote { stream, seed, length, tokens } => {
                let (job, prefill) = (job(next, seed, length, tokens), Some(peer()));
                self.command(stream, Command::Decode { job, prefill, pull: None });
            }
            Operation::Local { stream, seed, length, tokens, pull } => {
                let (job, pull) = (job(next, seed, length, tokens), pulled(pull, length));
                self.command(stream, Command::Decode { job, prefill: None, pull });
            }
            Operation::Embed { stream, seed, length, pooling } => {
                let job = job(next, seed, length, 1);
                self.command(stream, Command::Embed { job, pooling });
            }
            Operation::Serve { stream, seed, length } => {
                let Job { tokens, salt, .. } = job(next, seed, length, 1);
                let id = id(next).pull();
                self.command(
                    stream,
                    Command::Serve { id, tokens: tokens.to_vec(), salt, to: peer() },
                );
            }
            Operation::Cancel { by, of, pull } => {
                if let Some(id) = pick(&self.begun, of) {
                    let stream = by.unwrap_or(self.begun[&id].0);
                    let id = if pull { id.pull() } else { id };
                    self.command(stream, Command::Cancel(id));
                }
            }
            Operation::Offer(i) => {
                if let Some(id) = pick(&self.receives, i) {
                    self.offer(id);
                }
            }
            Operation::Receive(i, well) => {
                if let Some(id) = pick(&self.receives, i) {
                    self.receive(id, well);
                }
            }
            Operation::Sent(i, well) => {
                if let Some(id) = pick(&self.sends, i) {
                    self.sent(id, well);
                }
            }
            Operation::Late => {
                for input in std::mem::take(&mut self.late) {
                    self.input(input);
                }
            }
            Operation::Step => self.step(),
            Operation::Wait(ms) => self.wait(ms),
            Operation::Drain(draining) => self.command(1, Command::SetDraining(draining)),
            Operation::Open(stream) if !self.streams.contains_key(&StreamId(stream)) => {
                self.open(stream)
            }
            Operation::Close(stream) if stream > 1 => self.close(stream),
            Operation::Open(_) | Operation::Close(_) => {}
        }
    }
}
