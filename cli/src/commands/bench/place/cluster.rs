//! A coordinator's [`Control`] and simulated nodes that answer after a fixed time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use baton_coordinator::cluster::LinkId;
use baton_coordinator::control::{Control, Options};
use baton_coordinator::core::{NewRequest, SubmitError};
use baton_coordinator::placement;
use baton_coordinator::requests::{Action, Limits};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{Epoch, NodeId, Role, TransferId};
use baton_proto::message::{
    BlockCounts, Command, Hello, NodeEvent, NodeFinish, Report, TokenEvent,
};

use super::caches::{Cache, Change};
use super::prompts::BLOCK_TOKENS;
use crate::commands::CommandError;

/// The model that the nodes serve.
pub(super) const MODEL: &str = "bench";
/// From a command to its answer.
const ANSWER_TIME: Duration = Duration::from_millis(20);
/// Time that a node says a prompt took, whatever its length: the simulated nodes are never the limit.
const PREFILL_TIME: Duration = Duration::from_millis(1);
/// What the nodes say of their speed, to the same end.
const TOKENS_PER_SECOND: f64 = 1e9;
/// Blocks of a node beside those that are cached.
const FREE_BLOCKS: u64 = 100_000;
/// Hashes per message of a snapshot.
const SNAPSHOT_PART: usize = 256;

/// See the module's description.
pub(super) struct Cluster {
    control: Control,
    nodes: Vec<Node>,
    actions: Vec<Action>,
    answers: VecDeque<(Instant, usize, NodeEvent)>,
    reported: usize,
}

struct Node {
    name: NodeId,
    cached: u64,
    /// Its last cache event.
    sequence: u64,
}

/// What the model's KV looks like.
pub(super) fn geometry() -> KvGeometry {
    let (layers, kv_heads, head_dim, dtype) = (32, 8, 128, KvDtype::F16);
    KvGeometry { layers, kv_heads, head_dim, dtype, block_tokens: BLOCK_TOKENS }
}

/// Starts all of the model's block hashes.
pub(super) fn root() -> ModelRoot {
    ModelRoot::new(&[0; 32], &geometry())
}

impl Cluster {
    /// A coordinator that `nodes` nodes have joined, and that may index `blocks` blocks.
    pub(super) fn new(nodes: usize, blocks: usize) -> Result<Self, CommandError> {
        let limits = Limits { requests: usize::MAX, tokens: usize::MAX };
        let placement = placement::Options::default();
        let options = Options { limits, index_blocks: blocks, placement };
        let mut cluster = Self {
            control: Control::new(options, Instant::now()),
            nodes: Vec::new(),
            actions: Vec::new(),
            answers: VecDeque::new(),
            reported: 0,
        };
        for at in 0..nodes {
            let name: NodeId = format!("node-{at}").parse()?;
            let hello = hello(at, MODEL, (blocks / nodes) as u64 + FREE_BLOCKS);
            let (now, out) = (Instant::now(), &mut cluster.actions);
            cluster.control.join(&name, hello, LinkId(at as u64), now, out)?;
            cluster.nodes.push(Node { name, cached: 0, sequence: 0 });
        }
        Ok(cluster)
    }

    /// A node says all that its cache holds.
    pub(super) fn fill(&mut self, node: usize, cache: &Cache) {
        let hashes = cache.all();
        self.nodes[node].cached = hashes.len() as u64;
        let count = hashes.len().div_ceil(SNAPSHOT_PART);
        for (number, part) in hashes.chunks(SNAPSHOT_PART).enumerate() {
            let (hashes, last) = (part.to_vec(), number + 1 == count);
            self.hear(node, NodeEvent::Snapshot { sequence: 0, hashes, last }, Instant::now());
        }
    }

    /// A node says what changed in its cache.
    pub(super) fn change(&mut self, node: usize, change: Change, now: Instant) {
        let Change { stored, removed } = change;
        self.nodes[node].sequence += 1;
        let sequence = self.nodes[node].sequence;
        self.hear(node, NodeEvent::Cache { sequence, stored, removed }, now);
    }

    /// The next node in turn says how busy it is.
    pub(super) fn report(&mut self, now: Instant) {
        let node = self.reported % self.nodes.len();
        self.reported += 1;
        let report = report(node, self.nodes[node].cached, FREE_BLOCKS);
        self.hear(node, NodeEvent::Report(report), now);
    }

    /// A request arrives, and its commands leave. The nodes' streams make messages of them, in other
    /// tasks.
    pub(super) fn submit(
        &mut self,
        request: NewRequest,
        chain: Vec<BlockHash>,
        arrived: Instant,
    ) -> Result<(), SubmitError> {
        let now = Instant::now();
        self.control.submit(request, chain, arrived, now, &mut self.actions)?;
        self.carry_out(now);
        Ok(())
    }

    /// When the next answer of a node comes, if one is to come.
    pub(super) fn next_answer(&self) -> Option<Instant> {
        self.answers.front().map(|&(due, ..)| due)
    }

    /// A node answers.
    pub(super) fn answer(&mut self, now: Instant) {
        if let Some((_, node, event)) = self.answers.pop_front() {
            self.hear(node, event, now);
        }
    }

    /// Does what the coordinator has to do by itself.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.control.poll_timeout().is_some_and(|due| due <= now) {
            self.control.handle_timeout(now, &mut self.actions);
            self.carry_out(now);
        }
    }

    /// Blocks in the index, pairs of a block and a node that holds it, and the index's memory.
    pub(super) fn index(&mut self) -> (u64, u64, u64) {
        let view = self.control.cache(None, &[], BLOCK_TOKENS as usize);
        let pairs = view.nodes.iter().map(|node| node.blocks).sum();
        (view.index_blocks, pairs, view.index_bytes)
    }

    /// How many nodes.
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Requests that have ended without a result.
    pub(super) fn failed(&self) -> u64 {
        self.control.totals().failed
    }

    fn hear(&mut self, node: usize, event: NodeEvent, now: Instant) {
        let (name, link) = (&self.nodes[node].name, LinkId(node as u64));
        self.control.event(name, link, event, now, &mut self.actions);
        self.carry_out(now);
    }

    fn carry_out(&mut self, now: Instant) {
        for action in self.actions.drain(..) {
            let Action::Send { to, command } = action else { continue };
            let number = to.node.as_str().strip_prefix("node-").and_then(|at| at.parse().ok());
            let node: usize = number.expect("nodes are named by their number");
            let due = now + ANSWER_TIME;
            self.answers.extend(answers(&command).into_iter().map(|event| (due, node, event)));
        }
    }
}

fn role(node: usize) -> Role {
    if node.is_multiple_of(2) { Role::Prefill } else { Role::Decode }
}

/// What node number `node` says of itself.
pub(super) fn hello(node: usize, model: &str, total_blocks: u64) -> Hello {
    Hello {
        role: role(node),
        epoch: Epoch(1),
        model: model.to_owned(),
        root: root(),
        geometry: geometry(),
        max_model_len: 1 << 24,
        vocab_size: 1 << 16,
        hidden_size: 4,
        total_blocks,
        kv_address: "127.0.0.1:1".to_owned(),
        transports: vec!["quic".to_owned()],
        price: 1.0,
    }
}

/// What node number `node` says when nothing runs on it.
pub(super) fn report(node: usize, cached: u64, free: u64) -> Report {
    Report {
        role: role(node),
        blocks: BlockCounts { free, active: 0, cached, leased: 0 },
        prefill_tokens_per_second: TOKENS_PER_SECOND,
        decode_step_ms: 20.0,
        ..Report::default()
    }
}

/// What a node says to a command, all at once.
pub(super) fn answers(command: &Command) -> Vec<NodeEvent> {
    let started = |id| NodeEvent::Started { id, cached_tokens: 0, queued: Duration::ZERO };
    match command {
        Command::Prefill { job, .. } => {
            let (id, took) = (job.id, PREFILL_TIME);
            let transferred =
                NodeEvent::Transferred { id, hidden: took, exposed: took, bytes: 1, blocks: 1 };
            vec![started(id), NodeEvent::Tokens(vec![token(id, 0)]), transferred]
        }
        Command::Decode { job, prefill: Some(_), .. } => {
            vec![NodeEvent::Tokens(vec![token(job.id, 1)])]
        }
        Command::Decode { job, prefill: None, .. } => {
            vec![started(job.id), NodeEvent::Tokens(vec![token(job.id, 0), token(job.id, 1)])]
        }
        _ => Vec::new(),
    }
}

/// The first of two tokens, or the second.
fn token(id: TransferId, position: u32) -> TokenEvent {
    TokenEvent {
        id,
        position,
        token: 1,
        logprobs: None,
        finish: (position == 1).then_some(NodeFinish::Length),
        prefill: (position == 0).then_some(PREFILL_TIME),
    }
}
