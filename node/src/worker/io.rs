//! What a [`Worker`](super::Worker) hears and says.

use std::ops::Range;
use std::time::Duration;

use baton_engine::Submission;
pub use baton_kvtransfer::FirstToken;
use baton_kvtransfer::{ReceiveError, SendError, Sent};
use baton_proto::hash::BlockHash;
use baton_proto::ids::{Role, TransferId};
use baton_proto::message::{Command, Logprobs, NodeEvent, Peer, Retry, TokenEvent};

use super::StreamId;

/// What coordinators should hear of the node itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct News {
    /// What it does.
    pub role: Role,
    /// It takes nothing new.
    pub draining: bool,
    /// Jobs that the engine has ended since the start: blocks have come back.
    pub ended: u64,
}

/// The blocks of a transfer and its other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Names it at both ends; also the engine's job whose blocks these are.
    pub id: TransferId,
    /// The other end.
    pub peer: Peer,
    /// Hash chain of the full blocks.
    pub hashes: Vec<BlockHash>,
    /// All blocks, a partial last one included.
    pub blocks: u32,
}

/// Something happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// A coordinator was joined.
    Opened(StreamId),
    /// A stream ended, or its coordinator does not read it.
    Closed(StreamId),
    /// A coordinator said something.
    Command {
        /// On which stream.
        stream: StreamId,
        /// What.
        command: Box<Command>,
    },
    /// The process is told to end: take nothing new, finish what runs.
    Leave,

    /// Engine: a job has blocks. Those that are leased for a transfer are given back if no
    /// [`Action::Send`] or [`Action::Reserve`] of the job follows.
    Admitted {
        /// The job.
        id: TransferId,
        /// Leading blocks that have their content.
        cached_blocks: u32,
        /// Time in the queue.
        queued: Duration,
    },
    /// Engine: these blocks of an export are complete in a layer.
    KvReady {
        /// The job.
        id: TransferId,
        /// The layer.
        layer: u32,
        /// Ordinals of blocks.
        blocks: Range<u32>,
    },
    /// Engine: the tokens of one step.
    Tokens(Vec<TokenEvent>),
    /// Engine: log-probabilities of a prompt.
    PromptLogprobs {
        /// The job.
        id: TransferId,
        /// `(token, its log-probabilities)`.
        tokens: Vec<(u32, Logprobs)>,
    },
    /// Engine: the embedding of a prompt.
    Embedded {
        /// The job.
        id: TransferId,
        /// The vector.
        values: Vec<f32>,
        /// Time spent computing the prompt.
        prefill: Duration,
    },
    /// Engine: the job ended without a result, or was not even taken.
    Failed {
        /// The job.
        id: TransferId,
        /// For people.
        reason: String,
        /// For the coordinator.
        retry: Retry,
    },
    /// Engine: the job is over and its blocks are free.
    Ended(TransferId),
    /// Engine: what entered and left the prefix cache.
    CacheChanged {
        /// Now cached.
        stored: Vec<BlockHash>,
        /// No longer cached.
        removed: Vec<BlockHash>,
    },
    /// Engine: all that the prefix cache holds.
    Snapshot(Vec<BlockHash>),

    /// Endpoint: the sender of an expected transfer has offered it.
    Offered(TransferId),
    /// Endpoint: an expected transfer is over; its blocks are not written any more.
    Received {
        /// The transfer.
        id: TransferId,
        /// How it ended.
        outcome: Result<FirstToken, ReceiveError>,
    },
    /// Endpoint: an outgoing transfer is over; its blocks are not read any more.
    Sent {
        /// The transfer.
        id: TransferId,
        /// How it ended.
        outcome: Result<Sent, SendError>,
    },
}

/// Something to do, in order. What concerns a job or transfer that is gone is without effect.
#[derive(Clone, Debug)]
pub enum Action {
    /// Say this to a coordinator. If it does not read, its stream is [closed](Input::Closed).
    Tell {
        /// On which stream.
        stream: StreamId,
        /// What.
        event: NodeEvent,
    },

    /// Engine: ask for an [`Input::Snapshot`].
    AskSnapshot,
    /// Engine: take a job; [`Input::Failed`] if it does not.
    Submit(Submission),
    /// Engine: a held job may be admitted.
    Release(TransferId),
    /// Engine: all KV of an import is in place.
    Imported {
        /// The job.
        id: TransferId,
        /// Its first token.
        first: baton_engine::FirstToken,
    },
    /// Engine: all KV of a fetch is in place.
    Fetched(TransferId),
    /// Engine: end the job.
    Stop(TransferId),

    /// Endpoint: offer the blocks that were just leased.
    Send(Transfer),
    /// Endpoint: these blocks of a transfer may be sent.
    Ready {
        /// The transfer.
        id: TransferId,
        /// The layer.
        layer: u32,
        /// Ordinals of blocks.
        blocks: Range<u32>,
    },
    /// Endpoint: nothing follows what is ready.
    Finish {
        /// The transfer.
        id: TransferId,
        /// The first token.
        first: FirstToken,
    },
    /// Endpoint: stop sending.
    CancelSend(TransferId),
    /// Endpoint: expect a transfer, for which there is no room yet.
    Expect(Transfer),
    /// Endpoint: write to the blocks that were just leased.
    Reserve {
        /// The transfer.
        id: TransferId,
        /// Leading blocks that have their content.
        held: u32,
    },
    /// Endpoint: stop receiving.
    CancelReceive(TransferId),
}
