//! Carries out what a [`Worker`] decides: between coordinators, engine and KV endpoint.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use baton_engine::{BlockLease, Engine, EngineEvent};
use baton_kvtransfer::{
    Endpoint, FirstToken, Incoming, Outgoing, ReceiveError, ReceiveHandle, Room, SendError,
    SendHandle, Sent, Timing,
};
use baton_proto::ids::TransferId;
use baton_proto::message::{Command, Hello, NodeEvent, Report};
use baton_telemetry::Tracer;
use tokio::sync::{mpsc, oneshot, watch};

use crate::memory::{LeaseSink, LeaseSource};
use crate::metrics;
use crate::outbox::Outboxes;
use crate::spans::Spans;
use crate::worker::{Action, Input, News, StreamId, Transfer, Worker};

/// Most events that wait for the driver; their senders wait then, the engine's thread among them.
pub const MAX_EVENTS: usize = 8192;

/// Something happened.
pub enum Event {
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
    /// An expected transfer was offered.
    Offered(TransferId),
    /// An expected transfer ended.
    Received(TransferId, Result<FirstToken, ReceiveError>),
    /// An outgoing transfer ended.
    Sent(TransferId, Result<Sent, SendError>),
    /// Take nothing new, and stop when all is done.
    Leave,
}

/// The load of the engine, and what the node itself has to say.
pub(crate) fn report(
    engine: &Engine,
    endpoint: &Endpoint,
    News { role, draining, .. }: News,
) -> Report {
    let kv_transport = endpoint.last_transport().map(|last| last.to_string()).unwrap_or_default();
    Report { role, draining, kv_transport, ..engine.report() }
}

/// The worker of a node with its hands.
pub(crate) struct Driver {
    worker: Worker,
    engine: Engine,
    endpoint: Endpoint,
    hello: Hello,
    /// Takes further events.
    events: mpsc::Sender<Event>,
    outboxes: Outboxes,
    sends: HashMap<TransferId, Arc<SendHandle>>,
    receives: HashMap<TransferId, Arc<ReceiveHandle>>,
    /// Of the admission that is being handled.
    lease: Option<Arc<BlockLease>>,
    engine_stopped: bool,
    spans: Spans,
    news: watch::Sender<News>,
}

impl Driver {
    /// A driver that is fed by what `events` sends; `news` tells the sessions when to report.
    pub(crate) fn new(
        (engine, endpoint, hello): (Engine, Endpoint, Hello),
        events: mpsc::Sender<Event>,
        news: watch::Sender<News>,
        tracer: Tracer,
    ) -> Self {
        Self {
            worker: Worker::new(hello.role, hello.root, hello.geometry),
            engine,
            endpoint,
            hello,
            events,
            outboxes: Outboxes::default(),
            sends: HashMap::new(),
            receives: HashMap::new(),
            lease: None,
            engine_stopped: false,
            spans: Spans::new(tracer),
            news,
        }
    }

    /// Works until the node has drained or its engine has stopped.
    pub(crate) async fn run(&mut self, received: &mut mpsc::Receiver<Event>) {
        while !(self.worker.has_left() || self.engine_stopped) {
            let due = self.worker.poll_timeout().map(tokio::time::Instant::from_std);
            let late = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = received.recv() => match event {
                    Some(event) => self.take(event),
                    None => return,
                },
                () = late => self.worker.handle_timeout(Instant::now()),
            }
            self.act();
        }
    }

    /// Whether the engine stopped by itself: the node can do nothing any more.
    pub(crate) fn engine_stopped(&self) -> bool {
        self.engine_stopped
    }

    fn take(&mut self, event: Event) {
        let input = match event {
            Event::Opened { stream, outbox, session } => {
                self.outboxes.open(stream, outbox, session);
                Input::Opened(stream)
            }
            Event::Command { stream, command } => Input::Command { stream, command },
            Event::Closed(stream) => {
                self.outboxes.close(stream);
                Input::Closed(stream)
            }
            Event::Engine(event) => self.engine_event(event),
            Event::EngineStopped => {
                self.engine_stopped = true;
                return;
            }
            Event::Offered(id) => Input::Offered(id),
            Event::Received(id, outcome) => {
                self.receives.remove(&id);
                Input::Received { id, outcome }
            }
            Event::Sent(id, outcome) => {
                metrics::sent(&outcome);
                self.spans.sent(id, &outcome);
                self.sends.remove(&id);
                Input::Sent { id, outcome }
            }
            Event::Leave => Input::Leave,
        };
        self.worker.input(Instant::now(), input);
    }

    fn engine_event(&mut self, event: EngineEvent) -> Input {
        match event {
            EngineEvent::Admitted { id, lease, cached_tokens, queued } => {
                self.lease = lease;
                self.spans.admitted(id, cached_tokens);
                if !id.is_pull() {
                    metrics::hit(cached_tokens);
                }
                let cached_blocks = cached_tokens / self.hello.geometry.block_tokens;
                Input::Admitted { id, cached_blocks, queued }
            }
            EngineEvent::KvReady { id, layer, blocks } => Input::KvReady {
                id,
                layer: layer as u32,
                blocks: blocks.start as u32..blocks.end as u32,
            },
            EngineEvent::Tokens(tokens) => {
                self.spans.tokens(&tokens);
                Input::Tokens(tokens)
            }
            EngineEvent::PromptLogprobs { id, tokens } => Input::PromptLogprobs { id, tokens },
            EngineEvent::Embedded { id, values, prefill } => {
                self.spans.embedded(id, prefill);
                Input::Embedded { id, values, prefill }
            }
            EngineEvent::Failed { id, reason, retry } => {
                self.spans.ended(id, Some(&reason));
                Input::Failed { id, reason, retry }
            }
            EngineEvent::Ended { id } => {
                self.spans.ended(id, None);
                Input::Ended(id)
            }
            EngineEvent::CacheChanged { stored, removed } => {
                metrics::evicted(removed.len());
                Input::CacheChanged { stored, removed }
            }
            EngineEvent::Snapshot(hashes) => Input::Snapshot(hashes),
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.worker.poll_action() {
            self.carry_out(action);
        }
        // Of a job that is not wanted any more.
        self.lease = None;
        let news = self.worker.news();
        self.news.send_if_modified(|told| std::mem::replace(told, news) != news);
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Tell { stream, event } => {
                if !self.outboxes.tell(stream, event) {
                    self.worker.input(Instant::now(), Input::Closed(stream));
                }
            }
            Action::AskSnapshot => self.engine.snapshot(),
            Action::Submit(submission) => {
                let id = submission.job.id;
                self.spans.submitted(&submission);
                if !id.is_pull() {
                    metrics::queried(submission.job.tokens.len());
                }
                if let Err(error) = self.engine.submit(submission) {
                    let (reason, retry) = (error.to_string(), error.retry());
                    self.spans.ended(id, Some(&reason));
                    self.worker.input(Instant::now(), Input::Failed { id, reason, retry });
                }
            }
            Action::Release(id) => self.engine.release(id),
            Action::Imported { id, first } => self.engine.imported(id, first),
            Action::Fetched(id) => self.engine.fetched(id),
            Action::Stop(id) => self.engine.cancel(id),
            Action::Send(transfer) => self.send(transfer),
            Action::Ready { id, layer, blocks } => {
                if let Some(send) = self.sends.get(&id) {
                    send.ready(layer, blocks);
                }
            }
            Action::Finish { id, first } => {
                if let Some(send) = self.sends.get(&id) {
                    send.finish(first);
                }
            }
            Action::CancelSend(id) => {
                if let Some(send) = self.sends.remove(&id) {
                    send.cancel();
                }
            }
            Action::Expect(transfer) => self.expect(transfer),
            Action::Reserve { id, held } => {
                if let (Some(receive), Some(lease)) = (self.receives.get(&id), self.lease.take()) {
                    receive.reserve(Room { held, sink: Arc::new(LeaseSink(lease)) });
                }
            }
            Action::CancelReceive(id) => {
                if let Some(receive) = self.receives.remove(&id) {
                    receive.cancel();
                }
            }
        }
    }

    fn send(&mut self, transfer: Transfer) {
        let Transfer { id, peer, hashes, blocks } = transfer;
        let Some(lease) = self.lease.take() else {
            tracing::error!(%id, "nothing was leased to be sent");
            return;
        };
        let Hello { root, geometry, .. } = self.hello;
        let source = Arc::new(LeaseSource(lease));
        let outgoing = Outgoing { transfer: id, peer, root, geometry, hashes, blocks, source };
        let send = Arc::new(self.endpoint.send(outgoing));
        self.sends.insert(id, send.clone());
        self.spans.sends(id);
        let events = self.events.clone();
        tokio::spawn(async move {
            let outcome = send.outcome().await;
            // Without a driver the process is ending.
            let _ = events.send(Event::Sent(id, outcome)).await;
        });
    }

    fn expect(&mut self, transfer: Transfer) {
        let Transfer { id, peer, hashes, blocks } = transfer;
        let incoming = Incoming {
            transfer: id,
            from: peer.node,
            epoch: peer.epoch,
            root: self.hello.root,
            geometry: self.hello.geometry,
            hashes,
            blocks,
            room: None,
            lease: Timing::default().lease,
        };
        let receive = Arc::new(self.endpoint.expect(incoming));
        self.receives.insert(id, receive.clone());
        let events = self.events.clone();
        tokio::spawn(async move {
            receive.offered().await;
            let _ = events.send(Event::Offered(id)).await;
            let outcome = receive.outcome().await;
            let _ = events.send(Event::Received(id, outcome)).await;
        });
    }
}
