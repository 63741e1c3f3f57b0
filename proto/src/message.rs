//! What coordinators and nodes tell each other, in domain types.

use std::sync::Arc;
use std::time::Duration;

use crate::embedding::Pooling;
use crate::geometry::KvGeometry;
use crate::hash::{BlockHash, CacheSalt, ModelRoot};
use crate::ids::{Epoch, NodeId, Role, TransferId};
use crate::sampling::SamplingParams;
use crate::trace::TraceContext;

/// Version of the join stream; a node with another one is refused.
pub const PROTOCOL: u32 = 4;
/// Largest [`Hello::price`].
pub const MAX_PRICE: f64 = 1e6;

/// One attempt at generating or embedding one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Names the attempt.
    pub id: TransferId,
    /// The prompt, followed by what earlier attempts emitted. Shared, as both nodes of a pair get it.
    pub tokens: Arc<[u32]>,
    /// How many of `tokens` are prompt; at least 1.
    pub prompt_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Whose cached blocks may be used.
    pub salt: CacheSalt,
    /// Time left at receipt.
    pub deadline: Option<Duration>,
    /// The span of the request, if it is traced.
    pub trace: Option<TraceContext>,
}

impl Job {
    /// Output position of the next token: 0 for the first one of the request.
    #[must_use]
    pub fn next_position(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }
}

/// The other end of a KV transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Which node; its certificate must say so.
    pub node: NodeId,
    /// Which life of it.
    pub epoch: Epoch,
    /// `host:port` where it listens for KV transfers.
    pub kv_address: String,
}

/// KV that another node has, and that is worth fetching before the rest is computed. A pull that
/// fails costs time only: its tokens are then computed too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    /// Who has it; is told by [`Command::Serve`].
    pub from: Peer,
    /// Leading tokens of the job; those that fill no block are computed. At least 1.
    pub tokens: usize,
}

/// What a coordinator asks of a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Compute the prompt, stream its KV to `decode`, sample the first token.
    Prefill {
        /// The attempt.
        job: Job,
        /// Where the KV goes.
        decode: Peer,
        /// KV to fetch first.
        pull: Option<Pull>,
    },
    /// Generate tokens, from the KV that `prefill` sends or from a prompt computed here.
    Decode {
        /// The attempt.
        job: Job,
        /// Who sends the KV; `None`: compute the prompt here.
        prefill: Option<Peer>,
        /// KV to fetch first; `None` with a prefill node, which sends all.
        pull: Option<Pull>,
    },
    /// Compute the prompt and answer with its embedding. Nothing is generated: the job's sampling
    /// says nothing.
    Embed {
        /// The attempt.
        job: Job,
        /// Which hidden states.
        pooling: Pooling,
    },
    /// Send KV that the prefix cache holds: the other side of a [`Pull`]. Nothing is computed: what
    /// is not cached fails.
    Serve {
        /// The [pull](TransferId::pull) of the attempt that wants it.
        id: TransferId,
        /// Whose KV: the leading tokens of the job.
        tokens: Vec<u32>,
        /// Whose cached blocks may be used.
        salt: CacheSalt,
        /// Where the KV goes.
        to: Peer,
    },
    /// Stop the attempt and free what it holds.
    Cancel(TransferId),
    /// Say all that the prefix cache holds.
    SendSnapshot,
    /// Be this from now on. What runs ends as it began.
    SetRole(Role),
    /// Take nothing new until told otherwise, finish what runs, and stay joined.
    SetDraining(bool),
}

/// A node's introduction.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// What it does at the moment; its reports say when that changes.
    pub role: Role,
    /// Which life of it.
    pub epoch: Epoch,
    /// Name of the model that it serves.
    pub model: String,
    /// Identity of the model and its KV layout.
    pub root: ModelRoot,
    /// KV layout.
    pub geometry: KvGeometry,
    /// Most tokens of a sequence, prompt and output.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Elements of a hidden state: the size of its embeddings.
    pub hidden_size: u32,
    /// Size of the block pool.
    pub total_blocks: u64,
    /// `host:port` where it listens for KV transfers.
    pub kv_address: String,
    /// Transports that it has, best first.
    pub transports: Vec<String>,
    /// What its time costs relative to that of other nodes: above 0, at most [`MAX_PRICE`].
    pub price: f64,
}

/// Blocks of a pool by state; the four add up to the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BlockCounts {
    /// Hold nothing.
    pub free: u64,
    /// Used by a sequence.
    pub active: u64,
    /// Held by the prefix cache alone.
    pub cached: u64,
    /// Granted to, or held for, a transfer, and used by no running sequence.
    pub leased: u64,
}

/// A node's load at one moment.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Report {
    /// What the node does now.
    pub role: Role,
    /// Takes nothing new.
    pub draining: bool,
    /// Sequences not yet started.
    pub waiting: u32,
    /// Sequences started.
    pub running: u32,
    /// Prompt tokens accepted and not yet computed.
    pub queued_tokens: u64,
    /// The block pool.
    pub blocks: BlockCounts,
    /// Blocks that the waiting sequences will need. A decode node reserves a prompt's blocks when its
    /// prefill has begun; until then it waits.
    pub waiting_blocks: u64,
    /// Measured prefill speed; 0 until measured.
    pub prefill_tokens_per_second: f64,
    /// Measured duration of a decode step; 0 until measured.
    pub decode_step_ms: f64,
    /// How the KV travelled that the node has sent last; empty before.
    pub kv_transport: String,
}

/// Log-probabilities at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// Likeliest tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a node ended a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeFinish {
    /// An end-of-sequence token.
    EndOfSequence,
    /// This stop token.
    StopToken(u32),
    /// `max_tokens`, or the model's context is full.
    Length,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// The attempt.
    pub id: TransferId,
    /// Output position, counted over all attempts from 0.
    pub position: u32,
    /// The token.
    pub token: u32,
    /// If the request asked for them.
    pub logprobs: Option<Logprobs>,
    /// The sequence ends with this token.
    pub finish: Option<NodeFinish>,
    /// Time spent computing the prompt, with the token that ends a prefill.
    pub prefill: Option<Duration>,
}

/// Whether and where a failed attempt is worth repeating.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It would fail again.
    Never,
    /// On the same node, later.
    SameNode,
    /// On another node.
    OtherNode,
}

/// What a node tells a coordinator.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeEvent {
    /// Its load.
    Report(Report),
    /// Blocks that entered and left its prefix cache. Sequence numbers start at 1 and leave no gap.
    Cache {
        /// Number of this event.
        sequence: u64,
        /// Now held.
        stored: Vec<BlockHash>,
        /// No longer held.
        removed: Vec<BlockHash>,
    },
    /// A part of all that its prefix cache held just after event `sequence`.
    Snapshot {
        /// The last event that the snapshot includes.
        sequence: u64,
        /// Blocks held.
        hashes: Vec<BlockHash>,
        /// Ends the snapshot.
        last: bool,
    },
    /// The attempt left the queue.
    Started {
        /// The attempt.
        id: TransferId,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
        /// Time in the node's queue.
        queued: Duration,
    },
    /// Tokens of one step, in order for each attempt.
    Tokens(Vec<TokenEvent>),
    /// Log-probabilities of every prompt token but the first, once.
    PromptLogprobs {
        /// The attempt.
        id: TransferId,
        /// `(token, its log-probabilities)`; position 1 of the prompt first.
        tokens: Vec<(u32, Logprobs)>,
    },
    /// The embedding of the attempt's prompt; ends the attempt.
    Embedded {
        /// The attempt.
        id: TransferId,
        /// As many finite numbers as a hidden state has.
        values: Vec<f32>,
        /// Time spent computing the prompt.
        prefill: Duration,
    },
    /// The pull that belongs to an attempt is over.
    Pulled {
        /// The attempt.
        id: TransferId,
        /// Tokens whose KV arrived; 0 if it failed, for whatever reason.
        tokens: u32,
        /// From the reservation of their blocks to the arrival of the last one.
        took: Duration,
    },
    /// The KV arrived and was verified; told by the node that sent it, on its clock. Ends the
    /// attempt, or the pull, there.
    Transferred {
        /// The attempt, or the pull of one.
        id: TransferId,
        /// From the first payload to the end of prefill.
        hidden: Duration,
        /// From the end of prefill to the receiver's acknowledgement.
        exposed: Duration,
        /// Payload bytes.
        bytes: u64,
        /// Blocks moved.
        blocks: u32,
    },
    /// The attempt ended here without a result; its blocks are free.
    Failed {
        /// The attempt, or the pull that was to be served.
        id: TransferId,
        /// For people.
        reason: String,
        /// For the coordinator.
        retry: Retry,
    },
}
