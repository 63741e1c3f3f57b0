//! What a user of an [`Engine`](crate::Engine) tells it and hears from it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::embedding::Pooling;
use baton_proto::hash::BlockHash;
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, Logprobs, NodeFinish, Retry, TokenEvent};

use crate::lease::BlockLease;

/// What is to be done with a job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Compute the prompt and generate here.
    Local,
    /// Compute the prompt and tell its embedding. Nothing is generated.
    Embed(Pooling),
    /// Compute the prompt, sample one token, and keep the blocks for a transfer away from here.
    Export,
    /// Reserve the prompt's blocks, wait until their KV has been written, then generate.
    Import,
    /// Lease the tokens' full blocks to be read, all of which must be cached. Nothing is computed.
    Serve,
    /// Lease the tokens' full blocks to be written, and cache them when they have been. Nothing is
    /// computed. Fails at once where there is no room.
    Fetch,
}

/// A job and what is to be done with it.
#[derive(Clone, Debug)]
pub struct Submission {
    /// The job; its id may not name a job that the engine still has.
    pub job: Job,
    /// What to do with it.
    pub kind: Kind,
    /// It keeps its place in the queue but is not admitted before
    /// [`Engine::release`](crate::Engine::release). Of jobs that compute or import.
    pub held: bool,
}

/// A job was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many sequences wait already.
    #[error("{0} sequences wait already")]
    Full(usize),
    /// The engine takes nothing new.
    #[error("the engine is stopping")]
    Draining,
    /// The sequence, or its KV, is longer than the engine can hold.
    #[error("{tokens} tokens leave no room for an answer; the limit is {limit}")]
    TooLong {
        /// Length of the job.
        tokens: usize,
        /// Most tokens of a sequence, prompt and output.
        limit: usize,
    },
    /// The engine still has a job of this id.
    #[error("{0} is already here")]
    Duplicate(TransferId),
    /// The engine was started without what grammars need.
    #[error("this node has no tokenizer.json by which it could follow a grammar")]
    NoGrammars,
    /// The job contradicts itself or the model.
    #[error("invalid job: {0}")]
    Invalid(String),
}

impl SubmitError {
    /// Whether and where the job is worth submitting again.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Full(_) | Self::Draining | Self::NoGrammars => Retry::OtherNode,
            Self::TooLong { .. } | Self::Duplicate(_) | Self::Invalid(_) => Retry::Never,
        }
    }
}

/// The first token of an imported sequence, as the exporting engine sampled it.
#[derive(Clone, Debug, PartialEq)]
pub struct FirstToken {
    /// The token.
    pub token: u32,
    /// If the request asked for them.
    pub logprobs: Option<Logprobs>,
    /// The sequence ends with this token.
    pub finish: Option<NodeFinish>,
}

/// What an engine tells its sink. Every submitted job gets exactly one [`Self::Ended`] or
/// [`Self::Failed`], which is the last event of its id.
#[derive(Debug)]
pub enum EngineEvent {
    /// The job left the queue and has the blocks of its tokens. At most once per job.
    Admitted {
        /// The job.
        id: TransferId,
        /// The blocks to read (export, serve) or to write (import, fetch); `None` for jobs
        /// of this node alone.
        lease: Option<Arc<BlockLease>>,
        /// Leading tokens whose KV was found in the prefix cache.
        cached_tokens: u32,
        /// Time since submission.
        queued: Duration,
    },
    /// Export: one layer of these blocks is complete and may be read. Told from inside the step,
    /// while the next layer computes; blocks that were complete at admission
    /// ([`BlockLease::ready_blocks`]) are not told again.
    KvReady {
        /// The job.
        id: TransferId,
        /// The layer.
        layer: usize,
        /// Ordinals of blocks of the sequence.
        blocks: Range<usize>,
    },
    /// The tokens of one step. An import's first token is not among them: the exporter told it.
    Tokens(Vec<TokenEvent>),
    /// Log-probabilities of the prompt's tokens from position 1 on; once, never for imports.
    PromptLogprobs {
        /// The job.
        id: TransferId,
        /// `(token, its log-probabilities)`.
        tokens: Vec<(u32, Logprobs)>,
    },
    /// The embedding of a job's prompt: as many finite numbers as a hidden state has.
    Embedded {
        /// The job.
        id: TransferId,
        /// The vector.
        values: Vec<f32>,
        /// Time spent computing the prompt.
        prefill: Duration,
    },
    /// The job ended without a result. Its blocks are free, but for those that its lease, if it
    /// has one, holds until it is dropped.
    Failed {
        /// The job.
        id: TransferId,
        /// For people.
        reason: String,
        /// Whether and where it is worth repeating.
        retry: Retry,
    },
    /// The job is over and its lease was dropped: it holds no block.
    Ended {
        /// The job.
        id: TransferId,
    },
    /// What entered and left the prefix cache since the last such event; no hash is in both.
    CacheChanged {
        /// Now cached.
        stored: Vec<BlockHash>,
        /// No longer cached.
        removed: Vec<BlockHash>,
    },
    /// All that the prefix cache holds: the sum of every [`Self::CacheChanged`] so far.
    Snapshot(Vec<BlockHash>),
}
