//! An engine on a GPU.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use baton_engine::gpu::GpuOptions;
use baton_engine::model::LoadFormat;
use baton_engine::{
    BlockLease, Engine, EngineConfig, EngineEvent, FirstToken, Kind, MemoryLost, Soon, Submission,
};
use baton_grammar::{Grammars, Vocabulary};
use baton_proto::grammar::Grammar;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::Job;
use baton_proto::sampling::SamplingParams;

use crate::common::tiny::Shape;
use crate::support::{Types, devices, load_model};
use crate::{BASE, assert_greedy, checkpoint, tokens};

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) struct Node {
    pub(crate) engine: Engine,
    events: Receiver<EngineEvent>,
}

fn id(request: u32) -> TransferId {
    TransferId { request: RequestId(request.into()), attempt: 1 }
}

/// Ends a sequence with a grammar.
const EOS: u32 = 2;

/// Tokens of printable ASCII stand for it.
fn grammars(vocab_size: usize) -> Arc<Grammars> {
    let vocab: serde_json::Map<_, _> =
        (33..100).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
    let decoder = serde_json::json!({"type": "ByteFallback"});
    let file = serde_json::json!({"decoder": decoder, "model": {"vocab": vocab}});
    Arc::new(Grammars::new(&Vocabulary::parse(&file.to_string()).unwrap(), vocab_size))
}

pub(crate) fn job(request: u32, tokens: Vec<u32>, max_tokens: u32) -> Job {
    let sampling = SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() };
    let (prompt_tokens, salt) = (tokens.len(), CacheSalt::default());
    Job {
        id: id(request),
        tokens: tokens.into(),
        prompt_tokens,
        sampling,
        salt,
        deadline: None,
        trace: None,
    }
}

impl Node {
    fn start(dir: &Path) -> Option<Self> {
        Self::start_on(dir, 1)
    }

    /// On so many devices.
    pub(crate) fn start_on(dir: &Path, count: usize) -> Option<Self> {
        Self::start_as(dir, count, Types::default())
    }

    pub(crate) fn start_as(dir: &Path, count: usize, types: Types) -> Option<Self> {
        Self::start_telling(dir, count, types, |_| {})
    }

    /// `told` hears of everything first, on the engine's thread.
    pub(crate) fn start_telling(
        dir: &Path,
        count: usize,
        types: Types,
        told: impl Fn(&EngineEvent) + Send + 'static,
    ) -> Option<Self> {
        let config = EngineConfig {
            block_tokens: 16,
            kv_blocks: 20,
            max_batch_tokens: 64,
            max_sequences: 4,
            max_waiting: 16,
        };
        let options = GpuOptions {
            dir,
            format: LoadFormat::Safetensors,
            threads: 1,
            max_model_len: None,
            weight_dtype: types.weights,
            kv_dtype: types.kv,
            block_tokens: config.block_tokens,
            max_batch_tokens: config.max_batch_tokens,
            max_sequences: config.max_sequences,
            warm_up: Duration::ZERO,
            on_progress: &mut |_| {},
        };
        let model = load_model(&devices(count)?, options).unwrap();
        let (sink, events) = channel();
        let sink = Box::new(move |event| {
            told(&event);
            drop(sink.send(event));
        });
        let grammars = Some(grammars(model.vocab_size()));
        Some(Self { engine: Engine::start(config, model, grammars, sink), events })
    }

    pub(crate) fn submit(&self, job: &Job, kind: Kind) {
        self.engine.submit(Submission { job: job.clone(), kind, held: false }).unwrap();
    }

    fn next(&self) -> EngineEvent {
        self.events.recv_timeout(PATIENCE).expect("something happens")
    }

    /// The tokens of jobs, once all of them have ended.
    pub(crate) fn until_ended(&self, jobs: usize) -> HashMap<TransferId, Vec<u32>> {
        let (mut tokens, mut ended) = (HashMap::new(), 0);
        while ended < jobs {
            match self.next() {
                EngineEvent::Tokens(more) => {
                    for token in more {
                        let all: &mut Vec<u32> = tokens.entry(token.id).or_default();
                        all.push(token.token);
                    }
                }
                EngineEvent::Ended { .. } => ended += 1,
                EngineEvent::Failed { id, reason, .. } => panic!("{id} failed: {reason}"),
                _ => {}
            }
        }
        tokens
    }

    pub(crate) fn lease(&self) -> Arc<BlockLease> {
        loop {
            if let EngineEvent::Admitted { lease: Some(lease), .. } = self.next() {
                return lease;
            }
        }
    }

    /// Nothing is left once the last step has ended, which may be one that nobody waited for.
    pub(crate) fn idle(&self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let blocks = self.engine.report().blocks;
            if (blocks.active, blocks.leased) == (0, 0) {
                return;
            }
            assert!(Instant::now() < until, "{blocks:?}");
            std::thread::yield_now();
        }
    }
}

pub(crate) fn wait<T>(soon: Soon<T>) -> Result<T, MemoryLost> {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(soon)
}

#[test]
fn grammars_are_followed_beside_free_sequences() {
    let dir = checkpoint(&BASE, None);
    let Some(node) = Node::start(dir.path()) else { return };
    let guided = |n: u32, temperature| {
        let mut job = job(n, tokens(10 + n as usize, 101, u64::from(n)), 12);
        let grammar = Grammar::Regex("[A-C]{3}(-[D-F])*".to_owned());
        (job.sampling.grammar, job.sampling.temperature) = (Some(Arc::new(grammar)), temperature);
        (job.sampling.eos_token_ids, job.sampling.min_tokens) = (vec![EOS], 2);
        job.sampling.frequency_penalty = 0.5;
        job
    };
    let jobs = [guided(1, 1.0), job(2, tokens(20, 101, 2), 12), guided(3, 1.0), guided(4, 0.0)];
    jobs.iter().for_each(|job| node.submit(job, Kind::Local));
    let outputs = node.until_ended(jobs.len());
    assert_greedy(&dir, &jobs[1].tokens, &outputs[&id(2)]);
    for n in [1, 3, 4] {
        let output = &outputs[&id(n)];
        for (at, token) in output.iter().enumerate() {
            let allowed: &[u32] = match at {
                0..3 => &[65, 66, 67],
                _ if at % 2 == 1 => &[45, EOS],
                _ => &[68, 69, 70],
            };
            assert!(allowed.contains(token), "{output:?}");
        }
        assert!(output.len() == 12 || output.last() == Some(&EOS), "{output:?}");
    }
    node.idle();
}

#[test]
fn jobs_of_all_lengths_are_served_together() {
    let dir = checkpoint(&BASE, None);
    let Some(node) = Node::start(dir.path()) else { return };
    let jobs: Vec<_> = [(1, 40, 6), (2, 3, 11), (3, 16, 1), (4, 70, 4), (5, 21, 8), (6, 40, 6)]
        .map(|(n, length, count)| job(n, tokens(length, 101, u64::from(n)), count))
        .into();
    for job in &jobs {
        node.submit(job, Kind::Local);
    }
    let found = node.until_ended(jobs.len());
    for job in &jobs {
        assert_eq!(found[&job.id].len(), job.sampling.max_tokens as usize);
        assert_greedy(&dir, &job.tokens, &found[&job.id]);
    }
    node.idle();
}

#[test]
fn a_stop_token_ends_a_sequence_although_the_next_step_was_queued() {
    let dir = checkpoint(&BASE, None);
    let Some(node) = Node::start(dir.path()) else { return };
    let free = job(1, tokens(9, 101, 1), 12);
    node.submit(&free, Kind::Local);
    let all = node.until_ended(1).remove(&free.id).unwrap();
    let mut stopped = job(2, tokens(9, 101, 1), 12);
    stopped.sampling.stop_token_ids = vec![all[5]];
    node.submit(&stopped, Kind::Local);
    let first = all.iter().position(|token| *token == all[5]).unwrap();
    assert_eq!(node.until_ended(1)[&stopped.id], all[..=first]);
    node.idle();
}

#[test]
fn a_cancel_while_steps_are_in_flight_leaves_nothing_behind() {
    let dir = checkpoint(&BASE, None);
    let Some(node) = Node::start(dir.path()) else { return };
    for round in 0..3 {
        let (long, other) = (2 * round + 1, 2 * round + 2);
        node.submit(&job(long, tokens(20, 101, 1), 90), Kind::Local);
        let kept = job(other, tokens(30, 101, 2), 9);
        node.submit(&kept, Kind::Local);
        loop {
            if let EngineEvent::Tokens(tokens) = node.next()
                && tokens.iter().any(|token| token.id == id(long) && token.position >= round)
            {
                break;
            }
        }
        node.engine.cancel(id(long));
        node.until_ended(2);
    }
    node.idle();
}

#[test]
fn a_sequence_goes_on_with_blocks_from_another_device() {
    let dir = checkpoint(&Shape { qwen3: true, ..BASE }, None);
    let Some(from) = Node::start(dir.path()) else { return };
    let (job, output) = hand_over(&from, &Node::start(dir.path()).unwrap());
    assert_eq!(output, alone(&from, &job));
    assert_greedy(&dir, &job.tokens, &output);
}

/// The tokens of a job that one node computes all of.
pub(crate) fn alone(node: &Node, job: &Job) -> Vec<u32> {
    let local = Job { id: id(2), ..job.clone() };
    node.submit(&local, Kind::Local);
    node.until_ended(1).remove(&local.id).unwrap()
}

/// Lets a node go on with a sequence that another one has begun. The job, and its tokens.
pub(crate) fn hand_over(from: &Node, to: &Node) -> (Job, Vec<u32>) {
    // Few enough tokens for one chunk, so that both compute the same steps.
    let job = job(1, tokens(14, 101, 5), 9);
    to.submit(&job, Kind::Import);
    let import = to.lease();
    from.submit(&job, Kind::Export);
    let export = from.lease();
    let first = loop {
        match from.next() {
            EngineEvent::KvReady { layer, blocks, .. } => {
                let pieces = wait(export.read(layer, blocks.clone())).unwrap();
                let bytes = pieces[0].as_ref().to_vec();
                let mut place = wait(import.place(layer, blocks.clone())).unwrap();
                place.write(blocks.start, 0, &bytes);
                wait(place.apply()).unwrap();
            }
            EngineEvent::Tokens(tokens) => break tokens[0].token,
            _ => {}
        }
    };
    drop((import, export));
    to.engine.imported(job.id, FirstToken { token: first, logprobs: None, finish: None });
    let rest = to.until_ended(1).remove(&job.id).unwrap();
    from.until_ended(1);
    from.idle();
    to.idle();
    (job, [vec![first], rest].concat())
}
