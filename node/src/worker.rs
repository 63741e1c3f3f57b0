//! [`Worker`]: what a node does with what coordinators ask. Any node does any work; its role is
//! only what coordinators ask of it.
//!
//! A pure machine between three parties: the streams to coordinators, the engine and the KV
//! endpoint. Each [`Input`] is what one of them said, each [`Action`] what one of them is to do.
//! After every input, and after [`Worker::handle_timeout`], the driver carries out
//! [`Worker::poll_action`] until there is none.
//!
//! ```text
//! Prefill          → compute; once admitted, offer the blocks; send what is ready; then the token
//! Decode, remote   → expect the blocks; once offered, reserve; when all arrived, generate
//! Decode, local    → compute and generate
//! … with a pull    → fetch the prefix first; the job keeps its place in the queue, and computes
//!                    what did not come
//! Embed            → compute the prompt and tell its embedding
//! Serve            → send blocks that are cached
//! ```
//!
//! A decode node reserves when the prefill node has begun, so nobody holds blocks of one node
//! while it waits for those of another that has not begun: two coordinators cannot block each
//! other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use baton_engine::{Kind, Submission};
use baton_proto::geometry::KvGeometry;
use baton_proto::hash::ModelRoot;
use baton_proto::ids::{Role, TransferId};
use baton_proto::message::{Command, Job, NodeEvent, Retry, TokenEvent};

mod io;
mod pull;
mod streams;
#[cfg(test)]
mod tests;
mod transfers;

pub use io::{Action, FirstToken, Input, News, Transfer};
use pull::Fetch;
pub use pull::{PULL_TIMEOUT, PULL_WAIT};
pub use streams::StreamId;
use streams::Streams;

/// Most jobs and pulls at a time; the engine's own bounds are lower.
pub const MAX_TASKS: usize = 8192;

/// See the module's description.
#[derive(Debug)]
pub struct Worker {
    root: ModelRoot,
    geometry: KvGeometry,
    news: News,
    /// The process is to end: draining cannot be undone.
    leaving: bool,
    streams: Streams,
    tasks: BTreeMap<TransferId, Task>,
    /// When fetches are late; some may be over by then.
    deadlines: BTreeSet<(Instant, TransferId)>,
    actions: VecDeque<Action>,
}

/// A job, or one side of a pull.
#[derive(Debug)]
struct Task {
    /// Who asked for it.
    stream: StreamId,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// Compute the prompt and generate, or embed it; also an import whose KV is here.
    Local,
    /// Compute the prompt and send its KV; `Some` until the engine has admitted it.
    Export(Option<Transfer>),
    /// Receive the prompt's KV and generate.
    Import,
    /// Send a cached prefix; `Some` until the engine has leased it.
    Serve(Option<Transfer>),
    /// Receive a prefix for the job that is held for it.
    Fetch(Fetch),
}

impl Worker {
    /// A node that begins as `role` and has joined nobody.
    #[must_use]
    pub fn new(role: Role, root: ModelRoot, geometry: KvGeometry) -> Self {
        Self {
            root,
            geometry,
            news: News { role, draining: false, ended: 0 },
            leaving: false,
            streams: Streams::default(),
            tasks: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            actions: VecDeque::new(),
        }
    }

    /// What coordinators should hear at once when it changes.
    #[must_use]
    pub fn news(&self) -> News {
        self.news
    }

    /// Nothing is left of a node that is to end.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.leaving && self.tasks.is_empty()
    }

    /// Jobs and pulls that are not over.
    #[must_use]
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(by, _)| by)
    }

    /// Gives up what has waited for too long.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.expire_pulls(now);
    }

    /// Something happened.
    pub fn input(&mut self, now: Instant, input: Input) {
        match input {
            Input::Opened(stream) => {
                self.streams.open(stream);
                self.actions.push_back(Action::AskSnapshot);
            }
            Input::Closed(stream) => self.closed(stream),
            Input::Command { stream, command } => self.command(now, stream, *command),
            Input::Leave => {
                self.leaving = true;
                self.news.draining = true;
            }
            Input::Admitted { id, cached_blocks, queued } => {
                if !id.is_pull() {
                    let cached_tokens = cached_blocks * self.geometry.block_tokens;
                    self.tell(id, NodeEvent::Started { id, cached_tokens, queued });
                }
                self.admitted(now, id, cached_blocks);
            }
            Input::KvReady { id, layer, blocks } => {
                if let Some(Work::Export(None)) = self.work(id) {
                    self.actions.push_back(Action::Ready { id, layer, blocks });
                }
            }
            Input::Tokens(tokens) => self.tokens(tokens),
            Input::PromptLogprobs { id, tokens } => {
                self.tell(id, NodeEvent::PromptLogprobs { id, tokens });
            }
            Input::Embedded { id, values, prefill } => {
                self.tell(id, NodeEvent::Embedded { id, values, prefill });
            }
            Input::Failed { id, reason, retry } => {
                self.news.ended += 1;
                self.failed(now, id, reason, retry);
            }
            Input::Ended(id) => self.ended(id),
            Input::CacheChanged { stored, removed } => {
                self.streams.cache_changed(&stored, &removed, &mut self.actions);
            }
            Input::Snapshot(hashes) => self.streams.snapshot(&hashes, &mut self.actions),
            Input::Offered(id) => self.offered(now, id),
            Input::Received { id, outcome } => self.received(now, id, outcome),
            Input::Sent { id, outcome } => self.sent(id, outcome),
        }
    }

    fn command(&mut self, now: Instant, stream: StreamId, command: Command) {
        if !self.streams.is_open(stream) {
            // Nobody would cancel what it asks for.
            return;
        }
        let new = match &command {
            Command::Prefill { job, .. }
            | Command::Decode { job, .. }
            | Command::Embed { job, .. } => Some(job.id),
            Command::Serve { id, .. } => Some(*id),
            _ => None,
        };
        if new.is_some_and(|id| !self.may_begin(stream, id)) {
            return;
        }
        match command {
            Command::Prefill { job, decode, pull } => {
                let held = self.start_pull(now, stream, &job, pull);
                let transfer = self.transfer(&job, decode);
                self.begin(stream, job.id, Work::Export(Some(transfer)));
                self.submit(job, Kind::Export, held);
            }
            Command::Decode { job, prefill: Some(prefill), .. } => {
                self.begin(stream, job.id, Work::Import);
                let transfer = self.transfer(&job, prefill);
                // Until the offer comes.
                self.submit(job, Kind::Import, true);
                self.actions.push_back(Action::Expect(transfer));
            }
            Command::Decode { job, prefill: None, pull } => {
                let held = self.start_pull(now, stream, &job, pull);
                self.begin(stream, job.id, Work::Local);
                self.submit(job, Kind::Local, held);
            }
            Command::Embed { job, pooling } => {
                self.begin(stream, job.id, Work::Local);
                self.submit(job, Kind::Embed(pooling), false);
            }
            Command::Serve { id, tokens, salt, to } => {
                self.serve(stream, pull::prefix(id, tokens, salt), to);
            }
            Command::Cancel(id) => self.cancel(now, stream, id),
            Command::SendSnapshot => {
                self.streams.want_snapshot(stream);
                self.actions.push_back(Action::AskSnapshot);
            }
            Command::SetRole(role) => self.news.role = role,
            Command::SetDraining(draining) => self.news.draining = draining || self.leaving,
        }
    }

    fn may_begin(&mut self, stream: StreamId, id: TransferId) -> bool {
        if self.tasks.contains_key(&id) {
            tracing::warn!(%id, "ignoring a second command for a running attempt");
            return false;
        }
        let reason = match (self.news.draining, self.tasks.len() >= MAX_TASKS) {
            (true, _) => "the node is draining",
            (_, true) => "the node has too many jobs",
            (false, false) => return true,
        };
        self.refuse(stream, id, reason.to_owned(), Retry::OtherNode);
        false
    }

    fn begin(&mut self, stream: StreamId, id: TransferId, work: Work) {
        self.tasks.insert(id, Task { stream, work });
    }

    fn submit(&mut self, job: Job, kind: Kind, held: bool) {
        self.actions.push_back(Action::Submit(Submission { job, kind, held }));
    }

    /// To the client first: the decode node's copy waits for the rest of the KV anyway.
    fn tokens(&mut self, mut tokens: Vec<TokenEvent>) {
        tokens.retain(|token| self.tasks.contains_key(&token.id));
        let mut firsts = Vec::new();
        for TokenEvent { id, token, logprobs, finish, .. } in &tokens {
            if let Some(Work::Export(_)) = self.work(*id) {
                let first =
                    FirstToken { token: *token, logprobs: logprobs.clone(), finish: *finish };
                firsts.push(Action::Finish { id: *id, first });
            }
        }
        // One coordinator owns them all, nearly always.
        while let Some(first) = tokens.first() {
            let stream = self.tasks[&first.id].stream;
            let (its, rest) =
                tokens.into_iter().partition(|token| self.tasks[&token.id].stream == stream);
            self.actions.push_back(Action::Tell { stream, event: NodeEvent::Tokens(its) });
            tokens = rest;
        }
        self.actions.extend(firsts);
    }

    /// The engine's last word, or the endpoint's, about a job that has no result.
    fn failed(&mut self, now: Instant, id: TransferId, reason: String, retry: Retry) {
        if matches!(self.work(id), Some(Work::Fetch(_))) {
            tracing::debug!(%id, reason, "a pull has failed");
            self.actions.push_back(Action::CancelReceive(id));
            return self.pull_over(now, id, false);
        }
        let Some(Task { stream, work }) = self.tasks.remove(&id) else { return };
        self.drop_transfer(id, &work);
        self.stop_fetch_of(id);
        self.refuse(stream, id, reason, retry);
    }

    /// The engine is done with a job, and its blocks are free.
    fn ended(&mut self, id: TransferId) {
        self.news.ended += 1;
        // The coordinator knows it from the last token's finish. A transfer outlives the sequence
        // that it sends, and its end is the job's.
        if let Some(Work::Local | Work::Import) = self.work(id) {
            self.tasks.remove(&id);
        }
    }

    /// A coordinator has no say over another one's jobs.
    fn cancel(&mut self, now: Instant, stream: StreamId, id: TransferId) {
        let Some(task) = self.tasks.get(&id).filter(|task| task.stream == stream) else { return };
        self.actions.push_back(Action::Stop(id));
        if matches!(task.work, Work::Fetch(_)) {
            // The job goes on without it.
            self.actions.push_back(Action::CancelReceive(id));
            return self.pull_over(now, id, false);
        }
        if let Some(Task { work, .. }) = self.tasks.remove(&id) {
            self.drop_transfer(id, &work);
        }
        self.stop_fetch_of(id);
    }

    /// Nobody is left who could want the stream's jobs.
    fn closed(&mut self, stream: StreamId) {
        self.streams.close(stream);
        let lost = self.tasks.iter().filter(|(_, task)| task.stream == stream);
        let lost: Vec<TransferId> = lost.map(|(id, _)| *id).collect();
        for id in lost {
            if let Some(Task { work, .. }) = self.tasks.remove(&id) {
                self.actions.push_back(Action::Stop(id));
                self.drop_transfer(id, &work);
            }
        }
    }

    fn work(&self, id: TransferId) -> Option<&Work> {
        self.tasks.get(&id).map(|task| &task.work)
    }

    fn tell(&mut self, id: TransferId, event: NodeEvent) {
        if let Some(Task { stream, .. }) = self.tasks.get(&id) {
            self.actions.push_back(Action::Tell { stream: *stream, event });
        }
    }

    fn refuse(&mut self, stream: StreamId, id: TransferId, reason: String, retry: Retry) {
        tracing::debug!(%id, reason, "without a result");
        let event = NodeEvent::Failed { id, reason, retry };
        self.actions.push_back(Action::Tell { stream, event });
    }
}
