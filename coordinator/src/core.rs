//! The handle through which the front reaches the coordinator's core.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::hash::BlockHash;
use baton_proto::ids::{NodeId, RequestId};
use baton_proto::share::Share;
use tokio::sync::{mpsc, oneshot, watch};

use crate::aliases::Estimate;
use crate::history::{FindError, IdPrefix};
use crate::metrics;
use crate::orders::{Order, OrderError};

mod looks;
mod views;
mod words;

pub(crate) use looks::Look;
pub use looks::{Explained, Pulse, RequestList};
pub use views::{CacheQuery, CacheView, NodeCacheView, NodeView, StatusView};
pub use words::{
    ModelInfo, NewRequest, OutputToken, PlacementInfo, RequestError, SubmitError, Summary, Timings,
    Update, Usage,
};

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
    CancelOne {
        id: IdPrefix,
        reply: oneshot::Sender<Result<RequestId, FindError>>,
    },
    Look(Look),
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
    /// Number of the newest event.
    events: watch::Receiver<u64>,
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
        events: watch::Receiver<u64>,
    ) -> Self {
        Self { asks, dropped, models, events }
    }

    /// Starts a request.
    pub async fn submit(&self, request: NewRequest) -> Result<Updates, SubmitError> {
        self.try_submit(request).await.inspect_err(metrics::refused)
    }

    async fn try_submit(&self, request: NewRequest) -> Result<Updates, SubmitError> {
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
