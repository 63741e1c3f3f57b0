//! [`Engine`]: the handle of a device and the start of the thread that owns it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use baton_grammar::Grammars;
use baton_proto::geometry::KvGeometry;
use baton_proto::hash::ModelRoot;
use baton_proto::ids::TransferId;
use baton_proto::message::{BlockCounts, Report};

use crate::events::{EngineEvent, FirstToken, Kind, Submission, SubmitError};
use crate::executor::Executor;
use crate::guiding::Guides;
use crate::inbox::Inbox;
use crate::memory::KvMemory;
use crate::scheduler::{Limits, Scheduler};
use crate::step::Device;

/// Hears what happens in an engine. Called by the engine's thread, which waits for it.
pub type Sink = Box<dyn Fn(EngineEvent) + Send>;

/// Sizes of an engine. Zeros count as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens of one KV block.
    pub block_tokens: usize,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Most tokens computed in one step.
    pub max_batch_tokens: usize,
    /// Most sequences admitted at once; at most `max_batch_tokens` count.
    pub max_sequences: usize,
    /// Most sequences that wait for admission.
    pub max_waiting: usize,
}

/// What an engine serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// Identity of the model and its KV layout.
    pub root: ModelRoot,
    /// KV layout.
    pub geometry: KvGeometry,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Elements of a hidden state, and of an embedding.
    pub hidden_size: usize,
    /// Most tokens of a sequence, prompt and output: what the model allows and the KV cache holds.
    pub max_model_len: usize,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
}

/// One model on one device, owned by a thread of its own. Clones are handles of the same engine;
/// when the last one is dropped the thread ends, and jobs that it still has fail.
#[derive(Clone)]
pub struct Engine(Arc<Handle>);

struct Handle {
    inbox: Arc<Inbox>,
    report: Arc<Mutex<Report>>,
    info: EngineInfo,
    memory: KvMemory,
    follows_grammars: bool,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inbox.stop();
    }
}

impl Engine {
    /// Allocates the KV cache and starts the thread. `sink` hears of all that happens. Without
    /// `grammars`, jobs that have one are refused.
    ///
    /// # Panics
    /// If the operating system has no memory for the KV cache, or no thread.
    #[must_use]
    pub fn start(
        config: EngineConfig,
        mut executor: Box<dyn Executor>,
        grammars: Option<Arc<Grammars>>,
        sink: Sink,
    ) -> Self {
        let info = info(&config, &*executor);
        let memory = executor.allocate(info.geometry.block_tokens, info.kv_blocks);
        let limits = Limits {
            block_tokens: info.geometry.block_tokens as usize,
            kv_blocks: info.kv_blocks,
            max_batch_tokens: config.max_batch_tokens.max(1),
            max_sequences: config.max_sequences.clamp(1, config.max_batch_tokens.max(1)),
            max_model_len: info.max_model_len,
            vocab_size: info.vocab_size,
        };
        let inbox = Arc::new(Inbox::new(config.max_waiting.max(1)));
        let free = BlockCounts { free: info.kv_blocks as u64, ..BlockCounts::default() };
        let report = Arc::new(Mutex::new(Report { blocks: free, ..Report::default() }));
        let scheduler = Scheduler::new(limits, info.root);
        let guides = grammars.map(|grammars| Guides::start(&grammars, &inbox));
        let follows_grammars = guides.is_some();
        let parts = (scheduler, executor, memory.clone(), guides);
        let block_tokens = info.geometry.block_tokens as usize;
        let device = Device::new(parts, block_tokens, inbox.clone(), report.clone(), sink);
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || device.run())
            .expect("the operating system has a thread for the engine");
        Self(Arc::new(Handle { inbox, report, info, memory, follows_grammars }))
    }

    /// Queues a job; does not block.
    pub fn submit(&self, submission: Submission) -> Result<(), SubmitError> {
        self.0.info.check(&submission)?;
        if submission.job.sampling.grammar.is_some() && !self.0.follows_grammars {
            return Err(SubmitError::NoGrammars);
        }
        self.0.inbox.submit(submission, Instant::now())
    }

    /// Every piece of an import's blocks has been written: it joins the running batch. Without
    /// effect on other jobs.
    pub fn imported(&self, id: TransferId, first: FirstToken) {
        self.0.inbox.imported(id, first);
    }

    /// Lets a job that was submitted held be admitted. Without effect on other jobs.
    pub fn release(&self, id: TransferId) {
        self.0.inbox.release(id);
    }

    /// Every piece of a fetch's blocks has been written: they are cached. Without effect on other
    /// jobs.
    pub fn fetched(&self, id: TransferId) {
        self.0.inbox.fetched(id);
    }

    /// Ends a job in whatever phase it is. An unknown id is fine.
    pub fn cancel(&self, id: TransferId) {
        self.0.inbox.cancel(id);
    }

    /// The load after the last step.
    #[must_use]
    pub fn report(&self) -> Report {
        self.0.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks for an [`EngineEvent::Snapshot`].
    pub fn snapshot(&self) {
        self.0.inbox.request_snapshot();
    }

    /// Makes the thread look for input, even if there is none: if it lives, [`Self::turns`] grows.
    pub fn nudge(&self) {
        self.0.inbox.nudge();
    }

    /// How often the thread has looked for input. It does so before every step.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.0.inbox.turns()
    }

    /// Where the KV cache is.
    #[must_use]
    pub fn memory(&self) -> &KvMemory {
        &self.0.memory
    }

    /// What this engine serves.
    #[must_use]
    pub fn info(&self) -> EngineInfo {
        self.0.info
    }
}

impl EngineInfo {
    /// What would break the model or the scheduler later is refused here.
    pub fn check(&self, Submission { job, kind, .. }: &Submission) -> Result<(), SubmitError> {
        let (tokens, limit) = (job.tokens.len(), self.max_model_len);
        if job.prompt_tokens == 0 || job.prompt_tokens > tokens {
            let what = format!("{} of {tokens} tokens are prompt", job.prompt_tokens);
            return Err(SubmitError::Invalid(what));
        }
        if matches!(kind, Kind::Embed(_)) && job.prompt_tokens < tokens {
            return Err(SubmitError::Invalid("only a prompt is embedded".to_owned()));
        }
        if tokens >= limit {
            return Err(SubmitError::TooLong { tokens, limit });
        }
        if let Some(token) = job.tokens.iter().find(|&&token| token as usize >= self.vocab_size) {
            let what = format!("token {token} is outside the vocabulary of {}", self.vocab_size);
            return Err(SubmitError::Invalid(what));
        }
        if job.next_position() >= job.sampling.max_tokens as usize {
            return Err(SubmitError::Invalid("it has all its tokens already".to_owned()));
        }
        let vocab_size = u32::try_from(self.vocab_size).unwrap_or(u32::MAX);
        job.sampling.check(vocab_size).map_err(|error| SubmitError::Invalid(error.to_string()))
    }
}

fn info(config: &EngineConfig, executor: &dyn Executor) -> EngineInfo {
    let block_tokens = u32::try_from(config.block_tokens.max(1)).unwrap_or(u32::MAX);
    let geometry = executor.geometry(block_tokens);
    let kv_blocks = config.kv_blocks.max(1);
    let capacity = kv_blocks.saturating_mul(config.block_tokens.max(1));
    EngineInfo {
        root: ModelRoot::new(&executor.revision(), &geometry),
        geometry,
        vocab_size: executor.vocab_size(),
        hidden_size: executor.hidden_size(),
        max_model_len: executor.max_model_len().min(capacity),
        kv_blocks,
    }
}
