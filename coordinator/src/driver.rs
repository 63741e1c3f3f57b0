//! Gives [`Control`] a clock and channels: one task that takes what happens, one thing at a time,
//! and carries out what is decided. It never waits for a node or a client.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::ids::{Epoch, NodeId, RequestId};
use baton_proto::message::{Command, Hello, NodeEvent};
use baton_proto::share::Share;
use tokio::sync::{mpsc, oneshot, watch};

use crate::cluster::{LinkId, MAX_MODELS, Refusal};
use crate::control::{Control, Options};
use crate::core::{Ask, Core, Models, SubmitError, Summary, Update};
use crate::metrics;
use crate::requests::Action;
use crate::vllm::{self, Vllm};

/// Messages of nodes that wait for the driver; a node's stream stops being read beyond.
const MAX_NODE_MESSAGES: usize = 4096;
/// Calls of the front that wait for the driver; further ones are refused as overload.
const MAX_ASKS: usize = 4096;
/// Pause between updates of the gauges.
const GAUGE_INTERVAL: Duration = Duration::from_secs(1);

/// What a node's stream tells the driver.
#[derive(Debug)]
pub(crate) enum FromLink {
    /// The node's introduction, on a new stream.
    Hello {
        node: NodeId,
        hello: Hello,
        link: Link,
        reply: oneshot::Sender<Result<LinkId, Refusal>>,
    },
    /// The node says something.
    Event { node: NodeId, link: LinkId, event: NodeEvent },
    /// The stream ended.
    Closed { node: NodeId, link: LinkId },
    /// Another coordinator says what it has promised.
    Share { from: NodeId, share: Share },
}

/// The driver's end of a node's stream. Dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct Link {
    /// Bounded: a node that lets it fill up is disconnected. What is put in becomes messages in the
    /// stream's task: a prompt is copied there, and not here.
    pub(crate) outbox: mpsc::Sender<Command>,
    /// The reading side stops when this is dropped.
    pub(crate) _open: oneshot::Sender<()>,
}

/// Who waits for a request's updates.
#[derive(Debug)]
struct Client {
    updates: mpsc::Sender<Update>,
    /// When it was last told of tokens.
    told_at: Option<Instant>,
    /// Counts of its model.
    counts: Arc<Vllm>,
}

/// The task that owns the coordinator's state.
#[derive(Debug)]
pub(crate) struct Driver {
    control: Control,
    links: HashMap<NodeId, (LinkId, Epoch, Link)>,
    next_link: u64,
    clients: HashMap<RequestId, Client>,
    from_links: mpsc::Receiver<FromLink>,
    asks: mpsc::Receiver<Ask>,
    dropped: mpsc::Receiver<RequestId>,
    models: watch::Sender<Models>,
    events: watch::Sender<u64>,
    /// By model.
    counts: HashMap<String, Arc<Vllm>>,
    shutting_down: bool,
}

impl Driver {
    /// A driver, the handle for the front, and where nodes' streams report to.
    pub(crate) fn new(options: Options) -> (Self, Core, mpsc::Sender<FromLink>) {
        let (links_sender, from_links) = mpsc::channel(MAX_NODE_MESSAGES);
        let (asks_sender, asks) = mpsc::channel(MAX_ASKS);
        // Clients that have not read their last update still hold a slot.
        let (dropped_sender, dropped) = mpsc::channel(2 * options.limits.requests);
        let (models, models_receiver) = watch::channel(Models::default());
        let (events, events_receiver) = watch::channel(0);
        let control = Control::new(options, Instant::now());
        let driver = Self {
            control,
            links: HashMap::new(),
            next_link: 1,
            clients: HashMap::new(),
            from_links,
            asks,
            dropped,
            models,
            events,
            counts: HashMap::new(),
            shutting_down: false,
        };
        let core = Core::new(asks_sender, dropped_sender, models_receiver, events_receiver);
        (driver, core, links_sender)
    }

    /// From now on nodes are shifted between roles as load shifts. `name`: this coordinator.
    pub(crate) fn adjust_roles(&mut self, name: NodeId) {
        self.control.adjust_roles(name, Instant::now());
    }

    /// Runs until every [`Core`] is dropped.
    pub(crate) async fn run(mut self) {
        let mut gauges = tokio::time::interval(GAUGE_INTERVAL);
        let mut actions = Vec::new();
        loop {
            let due = self.control.poll_timeout();
            let timeout = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(id) = self.dropped.recv() => {
                    // Whoever gave up may be another one, who wanted the same id in vain.
                    if self.clients.get(&id).is_some_and(|client| client.updates.is_closed()) {
                        self.control.cancel(id, Instant::now(), &mut actions);
                        self.carry_out(&mut actions);
                        self.clients.remove(&id);
                    }
                }
                Some(message) = self.from_links.recv() => self.hear(message, &mut actions),
                ask = self.asks.recv() => match ask {
                    Some(ask) => self.answer(ask, &mut actions),
                    None => return,
                },
                () = timeout => self.control.handle_timeout(Instant::now(), &mut actions),
                _ = gauges.tick() => self.show(),
            }
            self.carry_out(&mut actions);
            self.publish_events();
        }
    }

    /// Sets the gauges to what is there now.
    fn show(&self) {
        let now = Instant::now();
        let (status, nodes) = (self.control.status(now), self.control.nodes(now));
        metrics::gauges(&status, &nodes, self.control.index_blocks());
        for (model, load) in self.control.loads() {
            vllm::gauges(model, load, &nodes);
        }
    }

    fn hear(&mut self, message: FromLink, actions: &mut Vec<Action>) {
        let now = Instant::now();
        match message {
            FromLink::Hello { node, hello, link, reply } => {
                let id = LinkId(self.next_link);
                self.next_link += 1;
                let (role, epoch) = (hello.role.as_str(), hello.epoch);
                let result = self.control.join(&node, hello, id, now, actions);
                if result.is_ok() {
                    tracing::info!(%node, role, epoch = epoch.0, "joined");
                    self.links.insert(node, (id, epoch, link));
                    self.publish_models();
                }
                // If nobody waits any more, the stream's end is reported like any other's.
                let _ = reply.send(result.map(|()| id));
            }
            FromLink::Event { node, link, event } => {
                self.control.event(&node, link, event, now, actions);
            }
            FromLink::Share { from, share } => self.control.heard(&from, share, now),
            FromLink::Closed { node, link } => {
                if self.control.leave(&node, link, now, actions) {
                    tracing::info!(%node, "left");
                    self.links.remove(&node);
                    self.publish_models();
                }
            }
        }
    }

    /// Answers whose asker is gone are dropped.
    fn answer(&mut self, ask: Ask, actions: &mut Vec<Action>) {
        let now = Instant::now();
        match ask {
            Ask::Submit { request, chain, arrived, updates, reply } => {
                if updates.is_closed() {
                    return;
                }
                let (id, model) = (request.id, request.model.clone());
                let result = if self.shutting_down {
                    Err(SubmitError::ShuttingDown)
                } else {
                    self.control.submit(request, chain, arrived, now, actions)
                };
                if result.is_ok() {
                    let counts = self.counts_of(model);
                    self.clients.insert(id, Client { updates, told_at: None, counts });
                    self.control.placed_in(id, arrived.elapsed());
                }
                let _ = reply.send(result);
            }
            Ask::Stop(id) => self.control.stop(id, now, actions),
            Ask::Cancel(id) => self.control.cancel(id, now, actions),
            Ask::CancelOne { id, reply } => {
                drop(reply.send(self.control.cancel_one(id, now, actions)));
            }
            Ask::Look(look) => look.answer(&self.control, now),
            Ask::Status(reply) => drop(reply.send(self.control.status(now))),
            Ask::Share(reply) => drop(reply.send(self.control.share(now))),
            Ask::Order { node, order, force, reply } => {
                drop(reply.send(self.control.order(&node, order, force, actions)));
            }
            Ask::Nodes(reply) => drop(reply.send(self.control.nodes(now))),
            Ask::Estimates { models, tokens, reply } => {
                let estimate = |model: &String| self.control.estimate(model, tokens, now);
                drop(reply.send(models.iter().map(estimate).collect()));
            }
            Ask::Cache { node, chain, block_tokens, reply } => {
                let view = self.control.cache(node.as_ref(), &chain, block_tokens);
                drop(reply.send(view));
            }
            Ask::ShutDown(reply) => {
                self.shutting_down = true;
                self.control.shut_down(now, actions);
                self.carry_out(actions);
                let _ = reply.send(());
            }
        }
    }

    /// Those of models that nobody serves any more are let go with the models; what they have counted
    /// stays in the metrics.
    fn counts_of(&mut self, model: String) -> Arc<Vllm> {
        if self.counts.len() >= MAX_MODELS {
            self.counts.retain(|_, counts| Arc::strong_count(counts) > 1);
        }
        match self.counts.get(&model) {
            Some(counts) => counts.clone(),
            None => {
                let counts = Arc::new(Vllm::new(&model));
                self.counts.insert(model, counts.clone());
                counts
            }
        }
    }

    /// Carries out all actions, and those that follow from a node's disconnection.
    fn carry_out(&mut self, actions: &mut Vec<Action>) {
        while !actions.is_empty() {
            let mut overrun = Vec::new();
            for action in actions.drain(..) {
                match action {
                    Action::Update { request, update } => self.tell_client(request, update),
                    Action::Send { to, command } => {
                        if let Some(link) = self.send(&to.node, to.epoch, command) {
                            overrun.push((to.node, link));
                        }
                    }
                }
            }
            for (node, link) in overrun {
                tracing::warn!(%node, "disconnected: it does not take commands in time");
                self.links.remove(&node);
                self.control.leave(&node, link, Instant::now(), actions);
                self.publish_models();
            }
        }
    }

    /// Returns the stream if it has to be given up.
    fn send(&mut self, node: &NodeId, epoch: Epoch, command: Command) -> Option<LinkId> {
        let (id, _, link) = self.links.get(node).filter(|(_, life, _)| *life == epoch)?;
        match &command {
            Command::SetRole(role) => tracing::info!(%node, %role, "told its role"),
            Command::SetDraining(draining) => {
                tracing::info!(%node, draining, "told to drain or not")
            }
            _ => {}
        }
        match link.outbox.try_send(command) {
            Ok(()) => None,
            // A closed one is reported by its own task.
            Err(mpsc::error::TrySendError::Closed(_)) => None,
            Err(mpsc::error::TrySendError::Full(_)) => Some(*id),
        }
    }

    fn tell_client(&mut self, id: RequestId, update: Update) {
        let mut client = self.clients.get_mut(&id);
        let mut gap = None;
        if let (Update::Tokens(tokens), Some(client)) = (&update, &mut client) {
            let now = Instant::now();
            let told_at = client.told_at.replace(now);
            let since_last = told_at.map(|told_at| now.saturating_duration_since(told_at));
            // What comes together is as if it had come evenly.
            gap = since_last.map(|since_last| since_last / tokens.len().max(1) as u32);
        }
        metrics::update(&update, gap);
        let ended = matches!(update, Update::Done(_) | Update::Failed(_));
        match &update {
            Update::Failed(error) => tracing::info!(request = %id, %error, "failed"),
            Update::Done(summary) => log_done(id, summary),
            _ => {}
        }
        if let Some(client) = client {
            client.counts.update(&update, gap);
            // Closed: its cancellation is under way. Never full, see `Core::submit`.
            let _ = client.updates.try_send(update);
        }
        if ended {
            self.clients.remove(&id);
        }
    }

    fn publish_events(&self) {
        let newest = self.control.newest_event();
        self.events.send_if_modified(|number| std::mem::replace(number, newest) != newest);
    }

    fn publish_models(&self) {
        self.models.send_replace(Arc::new(self.control.models()));
    }
}

/// What is said of a request that went well, to those who want to know.
fn log_done(id: RequestId, Summary { usage, timings, placement, .. }: &Summary) {
    tracing::debug!(
        request = %id,
        prefill = placement.prefill.as_ref().map(NodeId::as_str),
        decode = %placement.decode,
        attempts = placement.attempts,
        prompt_tokens = usage.prompt_tokens,
        cached_tokens = usage.cached_tokens,
        output_tokens = usage.completion_tokens,
        ttft_ms = timings.first_token.as_secs_f64() * 1e3,
        total_ms = timings.total.as_secs_f64() * 1e3,
        "done"
    );
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
