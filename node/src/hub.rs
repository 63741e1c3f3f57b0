//! Where a node's inputs meet: what coordinators command, what the engine and the transfers
//! report. One task owns it, so that nothing here needs a lock.
//!
//! The hub knows which coordinator owns which job. It drops commands that are void, turns a lost
//! coordinator into the cancellation of its jobs, and tells every coordinator what the prefix cache
//! holds.

use std::collections::HashMap;

use baton_engine::{Engine, EngineEvent};
use baton_proto::ids::TransferId;
use baton_proto::message::{Command, Job, NodeEvent, Peer, Retry, TokenEvent};
use tokio::sync::{mpsc, oneshot, watch};

use crate::streams::{StreamId, Streams};

/// Most events that wait for the hub; their senders wait then, the engine's thread among them.
pub const MAX_EVENTS: usize = 8192;

/// Something that happened. `T` is how a transfer ends.
pub enum Event<T> {
    /// A coordinator was joined.
    Opened {
        /// The stream.
        stream: StreamId,
        /// Takes what it is to be told.
        outbox: mpsc::Sender<NodeEvent>,
        /// Ends the session when dropped.
        session: oneshot::Sender<()>,
    },
    /// A coordinator said something.
    Command {
        /// Its stream.
        stream: StreamId,
        /// What.
        command: Box<Command>,
    },
    /// A stream ended.
    Closed(StreamId),
    /// The engine reports.
    Engine(EngineEvent),
    /// The engine's thread is gone; its jobs' failures came before.
    EngineStopped,
    /// A transfer ended.
    Transfer {
        /// The attempt.
        id: TransferId,
        /// How.
        outcome: T,
    },
    /// Take nothing new, and stop when all is done.
    Drain,
}

/// What a role has to act on. `J` is what it keeps of a job.
pub enum Input<J, T> {
    /// A job to begin. Answer with [`Hub::begin`] or [`Hub::refuse`].
    Begin {
        /// Who asks.
        stream: StreamId,
        /// The job; whether it fits the model is for the engine to say.
        job: Box<Job>,
        /// What is to be done.
        kind: JobKind,
    },
    /// A job to stop; the hub has forgotten it already.
    Cancelled {
        /// The attempt.
        id: TransferId,
        /// What the role kept.
        job: J,
    },
    /// The engine reports; never about the prefix cache.
    Engine(EngineEvent),
    /// The transfer of a job ended.
    Transfer {
        /// The attempt.
        id: TransferId,
        /// How.
        outcome: T,
    },
}

/// What a coordinator wants done with a job.
#[derive(Debug)]
pub enum JobKind {
    /// Compute the prompt; send its KV to this peer.
    Prefill(Peer),
    /// Generate, from the KV that this peer sends or from a prompt computed here.
    Decode(Option<Peer>),
}

/// Why a job is not begun or does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For people.
    pub reason: String,
    /// For the coordinator.
    pub retry: Retry,
}

impl Refusal {
    /// A refusal for `reason`.
    pub fn new(reason: impl ToString, retry: Retry) -> Self {
        Self { reason: reason.to_string(), retry }
    }
}

/// See the module's description.
pub struct Hub<J, T> {
    events: mpsc::Receiver<Event<T>>,
    streams: Streams,
    jobs: HashMap<TransferId, Owned<J>>,
    /// Jobs whose coordinator is lost, still to be cancelled.
    orphans: Vec<TransferId>,
    engine: Engine,
    engine_stopped: bool,
    news: watch::Sender<News>,
}

/// What sessions report without waiting for their interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// The node takes nothing new.
    pub draining: bool,
    /// Jobs whose blocks have come back since the start.
    pub ended: u64,
}

struct Owned<J> {
    stream: StreamId,
    job: J,
}

impl<J, T> Hub<J, T> {
    /// A hub fed by `events`; `news` tells the sessions when to report.
    pub fn new(
        events: mpsc::Receiver<Event<T>>,
        engine: Engine,
        news: watch::Sender<News>,
    ) -> Self {
        let (streams, jobs, orphans) = (Streams::default(), HashMap::new(), Vec::new());
        Self { events, streams, jobs, orphans, engine, engine_stopped: false, news }
    }

    /// Whether the engine stopped by itself: the node can do nothing any more.
    #[must_use]
    pub fn engine_stopped(&self) -> bool {
        self.engine_stopped
    }

    /// The next input; `None` when the node has drained, or its engine has stopped.
    pub async fn next(&mut self) -> Option<Input<J, T>> {
        loop {
            while let Some(id) = self.orphans.pop() {
                if let Some(job) = self.end(id) {
                    return Some(Input::Cancelled { id, job });
                }
            }
            let drained = self.news.borrow().draining && self.jobs.is_empty();
            if drained || self.engine_stopped {
                return None;
            }
            let event = self.events.recv().await?;
            if let Some(input) = self.take(event) {
                return Some(input);
            }
        }
    }

    fn take(&mut self, event: Event<T>) -> Option<Input<J, T>> {
        match event {
            Event::Opened { stream, outbox, session } => {
                self.streams.open(stream, outbox, session);
                self.engine.snapshot();
            }
            Event::Closed(stream) => {
                self.streams.close(stream);
                let lost = self.jobs.iter().filter(|(_, owned)| owned.stream == stream);
                self.orphans.extend(lost.map(|(id, _)| *id));
            }
            Event::Command { stream, command } => return self.command(stream, *command),
            Event::Engine(EngineEvent::CacheChanged { stored, removed }) => {
                self.streams.cache_changed(&stored, &removed);
            }
            Event::Engine(EngineEvent::Snapshot(hashes)) => self.streams.snapshot(&hashes),
            Event::Engine(event) => {
                if matches!(event, EngineEvent::Ended { .. } | EngineEvent::Failed { .. }) {
                    self.news.send_modify(|news| news.ended += 1);
                }
                return Some(Input::Engine(event));
            }
            Event::EngineStopped => self.engine_stopped = true,
            Event::Transfer { id, outcome } => return Some(Input::Transfer { id, outcome }),
            Event::Drain => {
                self.news.send_modify(|news| news.draining = true);
            }
        }
        None
    }

    fn command(&mut self, stream: StreamId, command: Command) -> Option<Input<J, T>> {
        let (job, kind) = match command {
            Command::Prefill { job, decode, .. } => (job, JobKind::Prefill(decode)),
            Command::Decode { job, prefill, .. } => (job, JobKind::Decode(prefill)),
            Command::Cancel(id) => {
                // A coordinator has no say over another one's jobs.
                self.jobs.get(&id).filter(|owned| owned.stream == stream)?;
                return self.end(id).map(|job| Input::Cancelled { id, job });
            }
            Command::SendSnapshot => {
                self.streams.want_snapshot(stream);
                self.engine.snapshot();
                return None;
            }
            Command::Serve { id, .. } => {
                let refusal = Refusal::new("this node serves no pulls", Retry::OtherNode);
                self.refuse(stream, id, refusal);
                return None;
            }
            Command::SetRole(_) | Command::SetDraining(_) => {
                tracing::warn!("this node changes neither its role nor its mind");
                return None;
            }
        };
        if !self.streams.is_open(stream) {
            // Nobody would cancel it.
            return None;
        }
        if self.jobs.contains_key(&job.id) {
            tracing::warn!(id = %job.id, "ignoring a second command for a running attempt");
            return None;
        }
        if self.news.borrow().draining {
            self.refuse(stream, job.id, Refusal::new("the node is draining", Retry::OtherNode));
            return None;
        }
        Some(Input::Begin { stream, job: Box::new(job), kind })
    }

    /// The job of `stream` runs; `job` is what the role keeps of it.
    pub fn begin(&mut self, stream: StreamId, id: TransferId, job: J) {
        self.jobs.insert(id, Owned { stream, job });
    }

    /// The job of `stream` does not begin.
    pub fn refuse(&mut self, stream: StreamId, id: TransferId, refusal: Refusal) {
        tracing::debug!(%id, reason = refusal.reason, "refused");
        let Refusal { reason, retry } = refusal;
        self.streams.send(stream, NodeEvent::Failed { id, reason, retry });
    }

    /// What the role keeps of a running job.
    pub fn job(&mut self, id: TransferId) -> Option<&mut J> {
        self.jobs.get_mut(&id).map(|owned| &mut owned.job)
    }

    /// Tells the coordinator of a running job about it.
    pub fn tell(&mut self, id: TransferId, event: NodeEvent) {
        if let Some(owned) = self.jobs.get(&id) {
            self.streams.send(owned.stream, event);
        }
    }

    /// Tells each coordinator the tokens of its jobs.
    pub fn tell_tokens(&mut self, mut tokens: Vec<TokenEvent>) {
        tokens.retain(|token| self.jobs.contains_key(&token.id));
        // One coordinator owns them all, nearly always.
        while let Some(first) = tokens.first() {
            let stream = self.jobs[&first.id].stream;
            let (its, rest) =
                tokens.into_iter().partition(|token| self.jobs[&token.id].stream == stream);
            self.streams.send(stream, NodeEvent::Tokens(its));
            tokens = rest;
        }
    }

    /// Forgets a running job.
    pub fn end(&mut self, id: TransferId) -> Option<J> {
        self.jobs.remove(&id).map(|owned| owned.job)
    }

    /// Forgets a running job and tells its coordinator that it failed.
    pub fn fail(&mut self, id: TransferId, refusal: Refusal) -> Option<J> {
        let Owned { stream, job } = self.jobs.remove(&id)?;
        self.refuse(stream, id, refusal);
        Some(job)
    }
}
