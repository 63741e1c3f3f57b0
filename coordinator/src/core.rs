//! The handle through which the front reaches the coordinator's core, and the words they share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::geometry::KvGeometry;
use baton_proto::hash::{BlockHash, CacheSalt, ModelRoot};
use baton_proto::ids::{NodeId, RequestId};
use baton_proto::message::{Hello, Logprobs, NodeFinish, Report};
use baton_proto::sampling::SamplingParams;
use baton_proto::share::Share;
use tokio::sync::{mpsc, oneshot, watch};

use crate::aliases::Estimate;
use crate::orders::{Order, OrderError};
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
}

/// A request, validated and tokenized.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Unique in the cluster.
    pub id: RequestId,
    /// Name of a served model.
    pub model: String,
    /// The prompt; at least one token.
    pub tokens: Vec<u32>,
    /// With a fixed seed, so that every attempt gives the same tokens.
    pub sampling: SamplingParams,
    /// Whose cached blocks may be used.
    pub salt: CacheSalt,
    /// Whose it is, and how urgent.
    pub standing: Standing,
    /// Time left.
    pub deadline: Option<Duration>,
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
    #[error("the prompt has {tokens} tokens; this model takes at most {limit}")]
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
    /// [`Core::cancel`] was called.
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
    /// It is complete.
    Done(Summary),
    /// It is not.
    Failed(RequestError),
}

/// What a complete request took.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Why the last token was the last; `None` after [`Core::stop`].
    pub finish: Option<NodeFinish>,
    /// Tokens.
    pub usage: Usage,
    /// Times.
    pub timings: Timings,
    /// Nodes of the last attempt.
    pub placement: PlacementInfo,
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
    /// In the queue of the node that computed the prompt.
    pub queue: Duration,
    /// Choosing the nodes.
    pub place: Duration,
    /// Computing the prompt.
    pub prefill: Duration,
    /// KV transfer while the prompt was still computed.
    pub transfer_hidden: Duration,
    /// KV transfer after the first token was known.
    pub transfer_exposed: Duration,
    /// Arrival to first token.
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

/// The coordinator as a whole.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct StatusView {
    /// A probe request would be served now.
    pub ready: bool,
    /// Why not, if not.
    pub reason: String,
    /// Names of models that can be served now.
    pub models: Vec<String>,
    /// Requests running.
    pub requests_active: usize,
    /// Of these, requests that wait here for their turn on a node.
    pub requests_waiting: usize,
    /// Joined prefill nodes.
    pub prefill_nodes: usize,
    /// Joined decode nodes.
    pub decode_nodes: usize,
    /// Other coordinators that are heard.
    pub peers: Vec<String>,
    /// Since the start.
    pub uptime: Duration,
    /// Requests that ended with a result.
    pub requests_finished: u64,
    /// Requests that ended without one, cancelled ones included.
    pub requests_failed: u64,
    /// Attempts after the first.
    pub requests_retried: u64,
}

/// A joined node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Its name.
    pub node: NodeId,
    /// What it said of itself.
    pub hello: Hello,
    /// Its last report.
    pub report: Report,
    /// Age of that report, or time since it joined.
    pub report_age: Duration,
}

/// What the prefix caches hold, as far as the coordinator knows.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CacheView {
    /// Of each node.
    pub nodes: Vec<NodeCacheView>,
    /// Blocks in the index.
    pub index_blocks: u64,
    /// Memory of the index.
    pub index_bytes: u64,
}

/// What one node's prefix cache holds.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeCacheView {
    /// The node.
    pub node: NodeId,
    /// Its blocks in the index.
    pub blocks: u64,
    /// Leading tokens of the prompt asked about.
    pub matched_tokens: u64,
}

/// Whose cache a [`Core::cache`] call asks about.
#[derive(Clone, Debug, Default)]
pub struct CacheQuery {
    /// Only this node.
    pub node: Option<NodeId>,
    /// Match this prompt: model, salt and tokens.
    pub prompt: Option<(String, CacheSalt, Vec<u32>)>,
}

/// What the handle asks of the driver.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large one is the frequent one")]
pub(crate) enum Ask {
    Submit {
        request: NewRequest,
        chain: Vec<BlockHash>,
        arrived: Instant,
        updates: mpsc::Sender<Update>,
        reply: oneshot::Sender<Result<(), SubmitError>>,
    },
    Stop(RequestId),
    Cancel(RequestId),
    Status(oneshot::Sender<StatusView>),
    Nodes(oneshot::Sender<Vec<NodeView>>),
    Share(oneshot::Sender<Share>),
    Order {
        node: NodeId,
        order: Order,
        force: bool,
        reply: oneshot::Sender<Result<(), OrderError>>,
    },
    Cache {
        node: Option<NodeId>,
        chain: Vec<BlockHash>,
        block_tokens: usize,
        reply: oneshot::Sender<CacheView>,
    },
    Estimates {
        models: Vec<String>,
        tokens: usize,
        reply: oneshot::Sender<Vec<Option<Estimate>>>,
    },
    ShutDown(oneshot::Sender<()>),
}

/// Models by name, as last published by the driver.
pub(crate) type Models = Arc<Vec<ModelInfo>>;

/// The running core. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Core {
    asks: mpsc::Sender<Ask>,
    /// One reserved slot per [`Updates`], so that dropping one never fails to be heard.
    dropped: mpsc::Sender<RequestId>,
    models: watch::Receiver<Models>,
}

/// News of one request. Dropping it before the end cancels the request at once.
#[derive(Debug)]
pub struct Updates {
    id: RequestId,
    updates: mpsc::Receiver<Update>,
    guard: Option<mpsc::OwnedPermit<RequestId>>,
}

impl Updates {
    /// The request.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next update; `None` after the last one.
    pub async fn recv(&mut self) -> Option<Update> {
        let update = self.updates.recv().await;
        if matches!(update, None | Some(Update::Done(_) | Update::Failed(_))) {
            self.guard = None;
        }
        update
    }
}

impl Drop for Updates {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            // First, so that a driver that has not seen the request yet sees that nobody waits.
            self.updates.close();
            guard.send(self.id);
        }
    }
}

impl Core {
    pub(crate) fn new(
        asks: mpsc::Sender<Ask>,
        dropped: mpsc::Sender<RequestId>,
        models: watch::Receiver<Models>,
    ) -> Self {
        Self { asks, dropped, models }
    }

    /// Starts a request.
    pub async fn submit(&self, request: NewRequest) -> Result<Updates, SubmitError> {
        let arrived = Instant::now();
        let model = self.model(&request.model);
        let model = model.ok_or_else(|| SubmitError::UnknownModel(request.model.clone()))?;
        check(&request, &model)?;
        // Hashed here, in the caller's task: the driver serves all requests.
        let block_tokens = model.geometry.block_tokens as usize;
        let chain = model.root.chain(request.salt, &request.tokens, block_tokens);
        let overloaded = SubmitError::Overloaded { retry_after: RETRY_AFTER };
        let guard = self.dropped.clone().try_reserve_owned().map_err(|_| overloaded.clone())?;
        let id = request.id;
        // Every update but two carries a token, so this never fills.
        let (sender, updates) = mpsc::channel(request.sampling.max_tokens as usize + 2);
        let (reply, answer) = oneshot::channel();
        let ask = Ask::Submit { request, chain, arrived, updates: sender, reply };
        self.asks.try_send(ask).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => overloaded,
            mpsc::error::TrySendError::Closed(_) => SubmitError::ShuttingDown,
        })?;
        // From here on a caller that goes away drops `updates`, which cancels.
        let mut updates = Updates { id, updates, guard: Some(guard) };
        let result = answer.await.unwrap_or(Err(SubmitError::ShuttingDown));
        if result.is_err() {
            updates.guard = None;
        }
        result.map(|()| updates)
    }

    /// Ends a request as complete: its last update is [`Update::Done`] without a finish reason.
    /// No token follows. For a stop string, which only the front can see.
    pub async fn stop(&self, id: RequestId) {
        // A closed channel means that the core is gone, and the request with it.
        let _ = self.asks.send(Ask::Stop(id)).await;
    }

    /// Ends a request: its last update is [`RequestError::Cancelled`].
    pub async fn cancel(&self, id: RequestId) {
        let _ = self.asks.send(Ask::Cancel(id)).await;
    }

    /// A model that a joined node serves or served.
    #[must_use]
    pub fn model(&self, name: &str) -> Option<ModelInfo> {
        self.models.borrow().iter().find(|model| model.name == name).cloned()
    }

    /// All models that joined nodes serve or served.
    #[must_use]
    pub fn models(&self) -> Vec<ModelInfo> {
        self.models.borrow().to_vec()
    }

    /// The coordinator as a whole.
    pub async fn status(&self) -> StatusView {
        let gone = StatusView { reason: "shutting down".to_owned(), ..StatusView::default() };
        self.ask(Ask::Status).await.unwrap_or(gone)
    }

    /// Joined nodes, by name.
    pub async fn nodes(&self) -> Vec<NodeView> {
        self.ask(Ask::Nodes).await.unwrap_or_default()
    }

    /// Asks something of a node. `force`: even if that takes the last decode node of a model away.
    pub async fn order(&self, node: NodeId, order: Order, force: bool) -> Result<(), OrderError> {
        let ask = |reply| Ask::Order { node, order, force, reply };
        self.ask(ask).await.unwrap_or(Err(OrderError::ShuttingDown))
    }

    /// What a prompt of so many tokens, none of them cached, would take with each of these models;
    /// `None` for one that cannot be served now.
    pub(crate) async fn estimates(
        &self,
        models: Vec<String>,
        tokens: usize,
    ) -> Vec<Option<Estimate>> {
        self.ask(|reply| Ask::Estimates { models, tokens, reply }).await.unwrap_or_default()
    }

    /// What to tell other coordinators; `None` once the core is gone.
    pub(crate) async fn share(&self) -> Option<Share> {
        self.ask(Ask::Share).await
    }

    /// What the prefix caches hold.
    pub async fn cache(&self, query: CacheQuery) -> CacheView {
        let (mut chain, mut block_tokens) = (Vec::new(), 0);
        if let Some((model, salt, tokens)) = query.prompt
            && let Some(model) = self.model(&model)
        {
            block_tokens = model.geometry.block_tokens as usize;
            chain = model.root.chain(salt, &tokens, block_tokens);
        }
        let node = query.node;
        let ask = |reply| Ask::Cache { node, chain, block_tokens, reply };
        self.ask(ask).await.unwrap_or_default()
    }

    /// Ends all requests and takes no more.
    pub async fn shut_down(&self) {
        self.ask(Ask::ShutDown).await;
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(ask(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// What an overloaded coordinator tells clients to wait.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

fn check(request: &NewRequest, model: &ModelInfo) -> Result<(), SubmitError> {
    let tokens = request.tokens.len();
    let limit = (model.max_model_len as usize).saturating_sub(1);
    if tokens == 0 {
        return Err(SubmitError::EmptyPrompt);
    }
    if tokens > limit {
        return Err(SubmitError::PromptTooLong { tokens, limit });
    }
    let vocab_size = model.vocab_size;
    match request.tokens.iter().find(|&&token| token >= vocab_size) {
        Some(&token) => Err(SubmitError::UnknownToken { token, vocab_size }),
        None => Ok(()),
    }
}
