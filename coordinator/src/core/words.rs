//! Models, requests, and what clients are told of them.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::embedding::Pooling;
use baton_proto::geometry::KvGeometry;
use baton_proto::hash::{CacheSalt, ModelRoot};
use baton_proto::ids::{NodeId, RequestId};
use baton_proto::message::{Logprobs, NodeFinish};
use baton_proto::sampling::SamplingParams;
use baton_proto::trace::TraceContext;

use crate::decision::Outcome;
use crate::placement::Standing;

/// A model that joined nodes serve.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// Its name.
    pub name: String,
    /// Its identity: the start of every block hash.
    pub root: ModelRoot,
    /// Its KV layout.
    pub geometry: KvGeometry,
    /// Most tokens of a sequence, prompt and output: the least of its nodes.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Elements of an embedding.
    pub hidden_size: u32,
}

/// A request, validated and tokenized.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Unique in the cluster.
    pub id: RequestId,
    /// Name of a served model.
    pub model: String,
    /// The prompt; at least one token.
    pub tokens: Arc<[u32]>,
    /// With a fixed seed, so that every attempt gives the same tokens.
    pub sampling: SamplingParams,
    /// An embedding of the prompt is wanted instead of tokens; `sampling` is then the default one
    /// with one token.
    pub embed: Option<Pooling>,
    /// Whose cached blocks may be used.
    pub salt: CacheSalt,
    /// Whose it is, and how urgent.
    pub standing: Standing,
    /// Name of the tenant, for people; empty if it names none.
    pub tenant: Arc<str>,
    /// Time left.
    pub deadline: Option<Duration>,
    /// Its span, if it is traced.
    pub trace: Option<TraceContext>,
}

/// A request was not accepted; nothing was started.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// No node ever offered the model.
    #[error("model {0:?} is not served here")]
    UnknownModel(String),
    /// The model's nodes are away. Trying again later helps.
    #[error("no decode node serves {0:?} now")]
    NoNodes(String),
    /// The coordinator holds all it may. Trying again later helps.
    #[error("too many requests; try again in {} s", retry_after.as_secs_f32())]
    Overloaded {
        /// When.
        retry_after: Duration,
    },
    /// It would not be answered in time. Trying again later helps.
    #[error("the request would not be answered in time; try again in {:.1} s", retry_after.as_secs_f32())]
    TooLate {
        /// When.
        retry_after: Duration,
    },
    /// The prompt leaves no room for a token.
    // Begins as OpenAI's does: clients such as LiteLLM know it by these words.
    #[error(
        "this model's maximum context length is {} tokens, so a prompt may have {limit}; this one has {tokens}",
        limit + 1
    )]
    PromptTooLong {
        /// Of the prompt.
        tokens: usize,
        /// Most tokens of a prompt.
        limit: usize,
    },
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A token id is not of the model's vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: u32,
    },
    /// A request of that id is running.
    #[error("request {0} is already running")]
    DuplicateId(RequestId),
    /// The coordinator is going down.
    #[error("the coordinator is shutting down")]
    ShuttingDown,
}

/// A request ended without its result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Its time is over.
    #[error("the request's deadline passed")]
    DeadlineExceeded,
    /// [`Core::cancel`](super::Core::cancel) was called.
    #[error("the request was cancelled")]
    Cancelled,
    /// No node came back in time. Trying again later helps.
    #[error("no node could take the request for {} s", waited.as_secs())]
    NoNodes {
        /// How long it waited.
        waited: Duration,
    },
    /// Several attempts failed without a token. Trying again later may help.
    #[error("{attempts} attempts failed; the last: {reason}")]
    Exhausted {
        /// Attempts in all.
        attempts: u32,
        /// Why the last one failed.
        reason: String,
    },
    /// A node says that it can never be done.
    #[error("{0}")]
    Rejected(String),
    /// The coordinator goes down. Trying again, at another coordinator, helps.
    #[error("the coordinator is shutting down")]
    ShuttingDown,
}

/// One generated token; tokens come in the order of their positions.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputToken {
    /// The token.
    pub token: u32,
    /// If the request asked for them.
    pub logprobs: Option<Logprobs>,
    /// The sequence ends with this token.
    pub finish: Option<NodeFinish>,
}

/// News of a request. [`Update::Done`] or [`Update::Failed`] comes exactly once, last.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// The next tokens; never empty.
    Tokens(Vec<OutputToken>),
    /// `(token, its log-probabilities)` of every prompt token but the first; at most once.
    PromptLogprobs(Vec<(u32, Logprobs)>),
    /// The embedding of the prompt; once, before it is complete.
    Embedding(Vec<f32>),
    /// It is complete.
    Done(Summary),
    /// It is not.
    Failed(RequestError),
}

/// What a complete request took.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Why the last token was the last; `None` after [`Core::stop`](super::Core::stop), and of an
    /// embedding.
    pub finish: Option<NodeFinish>,
    /// Tokens.
    pub usage: Usage,
    /// Times.
    pub timings: Timings,
    /// Nodes of the last attempt.
    pub placement: PlacementInfo,
    /// What was predicted when they were chosen, and what came of it.
    pub outcomes: Vec<Outcome>,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of the prompt, found in a prefix cache.
    pub cached_tokens: u32,
    /// Generated.
    pub completion_tokens: u32,
}

/// Times of a request, each on one machine's clock; those of the nodes from the attempt that gave
/// the first token.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Timings {
    /// Waiting here, and then in the queue of the node that computed the prompt.
    pub queue: Duration,
    /// Choosing the nodes.
    pub place: Duration,
    /// Computing the prompt.
    pub prefill: Duration,
    /// KV transfer while the prompt was still computed.
    pub transfer_hidden: Duration,
    /// KV transfer after the first token was known.
    pub transfer_exposed: Duration,
    /// Arrival to first token, or to the embedding.
    pub first_token: Duration,
    /// Arrival to end.
    pub total: Duration,
    /// Payload of the KV transfer.
    pub transfer_bytes: u64,
}

/// Where a request ran.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacementInfo {
    /// Who computed the prompt; `None`: the decode node itself.
    pub prefill: Option<NodeId>,
    /// Who generated the tokens.
    pub decode: NodeId,
    /// Why these, for people.
    pub reason: String,
    /// 1 plus the number of times that it was placed again.
    pub attempts: u32,
}
