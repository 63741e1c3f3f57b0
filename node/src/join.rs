//! Keeps a node joined to one coordinator: dials it over mutual TLS, says hello, reports its load
//! and carries commands to the worker and events back, again and again.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use baton_engine::Engine;
use baton_identity::{COORDINATOR_SERVER_NAME, Identity};
use baton_proto::InvalidMessage;
use baton_proto::message::{Command, Hello, NodeEvent};
use baton_proto::wire::node::join_client::JoinClient;
use baton_proto::wire::node::{FromNode, ToNode, to_node};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::driver::{self, Event};
use crate::outbox::MAX_OUTBOX;
use crate::worker::{News, StreamId};

/// A coordinator that takes longer to answer a dial or a hello is dialled again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A silent coordinator is probed this often, and given up when it does not answer in time.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a stream that this end leaves may take to carry what is queued.
const LINGER: Duration = Duration::from_secs(1);
/// Pauses between dials double from the least to the most.
const LEAST_PAUSE: Duration = Duration::from_millis(50);
const MOST_PAUSE: Duration = Duration::from_secs(1);
/// Largest message: a prompt of ten million tokens.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Blocks that come back within this time are one report.
const LEAST_REPORT_PAUSE: Duration = Duration::from_millis(5);
/// What a coordinator may choose as the pause between reports.
const REPORT_INTERVAL: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(10);

/// What every session of a node shares.
pub(crate) struct Joiner {
    /// Who the node is.
    pub(crate) identity: Identity,
    /// How it introduced itself when it started.
    pub(crate) hello: Hello,
    /// Where its reports come from.
    pub(crate) engine: Engine,
    pub(crate) kv: baton_kvtransfer::Endpoint,
    /// Where commands go.
    pub(crate) events: mpsc::Sender<Event>,
    /// What is reported at once.
    pub(crate) news: watch::Receiver<News>,
    /// Streams opened so far, to all coordinators.
    pub(crate) streams: AtomicU64,
}

/// Why a session with a coordinator ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("cannot connect: {}", with_causes(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("the coordinator ended the stream: {}", .0.message())]
    Stream(#[from] tonic::Status),
    #[error("the coordinator closed the stream")]
    Closed,
    #[error(transparent)]
    Protocol(#[from] InvalidMessage),
    #[error("the coordinator did not answer in time")]
    Timeout(#[from] tokio::time::error::Elapsed),
    #[error("the coordinator does not read what it is told")]
    Slow,
    #[error("this node left")]
    Left,
}

/// tonic's own text says only "transport error".
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// How long to wait before dial number `attempt` (from 0) after a loss; `random` spreads the
/// nodes of a cluster over the second half of each pause.
fn pause(attempt: u32, random: u64) -> Duration {
    let full = LEAST_PAUSE.saturating_mul(1 << attempt.min(16)).min(MOST_PAUSE);
    full / 2 + (full / 2).mul_f64(random as f64 / u64::MAX as f64)
}

impl Joiner {
    /// Dials `coordinator` (`host:port`), again and again until the node ends.
    pub(crate) async fn keep_joined(self: Arc<Self>, coordinator: String) {
        let random = RandomState::new();
        let mut attempt = 0;
        while !self.events.is_closed() {
            let begun = Instant::now();
            let Err(error) = self.session(&coordinator).await;
            if begun.elapsed() > MOST_PAUSE {
                attempt = 0;
            }
            tracing::warn!(coordinator, "{error}");
            tokio::time::sleep(pause(attempt, random.hash_one(attempt))).await;
            attempt += 1;
        }
    }

    async fn session(&self, coordinator: &str) -> Result<std::convert::Infallible, SessionError> {
        let channel = self.dial(coordinator).await?;
        let (outbox, events) = mpsc::channel::<NodeEvent>(MAX_OUTBOX);
        let hello = Hello { role: self.news.borrow().role, ..self.hello.clone() };
        let hello = tokio_stream::once(FromNode::from(hello));
        let outgoing = hello.chain(ReceiverStream::new(events).map(FromNode::from));
        let mut client = JoinClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let answer = tokio::time::timeout(CONNECT_TIMEOUT, client.join(outgoing)).await??;
        let mut incoming = answer.into_inner();
        let interval = tokio::time::timeout(CONNECT_TIMEOUT, welcome(&mut incoming)).await??;

        let stream = StreamId(self.streams.fetch_add(1, Ordering::Relaxed));
        let (session, ended) = oneshot::channel();
        self.pass_on(Event::Opened { stream, outbox: outbox.clone(), session }).await?;
        tracing::info!(coordinator, "joined");
        let listen = self.listen(stream, incoming);
        tokio::pin!(listen);
        let result = tokio::select! {
            result = &mut listen => result,
            result = self.report(interval, outbox) => result,
            _ = ended => Err(SessionError::Left),
        };
        let closed = self.pass_on(Event::Closed(stream)).await;
        if matches!(result, Err(SessionError::Left)) {
            // The last sender is gone, so the stream ends after what is queued; the coordinator
            // closes its side when it has read all.
            let _ = tokio::time::timeout(LINGER, listen).await;
        }
        closed?;
        result
    }

    async fn dial(&self, coordinator: &str) -> Result<Channel, SessionError> {
        let identity = &self.identity;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(identity.ca_pem()))
            .identity(tonic::transport::Identity::from_pem(identity.cert_pem(), identity.key_pem()))
            .domain_name(COORDINATOR_SERVER_NAME);
        let endpoint = Endpoint::from_shared(format!("https://{coordinator}"))?
            .tls_config(tls)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        Ok(endpoint.connect().await?)
    }

    /// Carries commands to the worker.
    async fn listen(
        &self,
        stream: StreamId,
        mut incoming: Streaming<ToNode>,
    ) -> Result<std::convert::Infallible, SessionError> {
        while let Some(message) = incoming.message().await? {
            let command = Box::new(Command::try_from(message)?);
            self.pass_on(Event::Command { stream, command }).await?;
        }
        Err(SessionError::Closed)
    }

    /// Reports the load every `interval`, and at once when there is [`News`].
    async fn report(
        &self,
        interval: Duration,
        outbox: mpsc::Sender<NodeEvent>,
    ) -> Result<std::convert::Infallible, SessionError> {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut news = self.news.clone();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                Ok(()) = news.changed() => tokio::time::sleep(LEAST_REPORT_PAUSE).await,
            }
            let report = driver::report(&self.engine, &self.kv, *news.borrow_and_update());
            outbox.try_send(NodeEvent::Report(report)).map_err(|_| SessionError::Slow)?;
        }
    }

    async fn pass_on(&self, event: Event) -> Result<(), SessionError> {
        // The driver ends with the process.
        self.events.send(event).await.map_err(|_| SessionError::Closed)
    }
}

/// Waits for the coordinator's first message; how often it wants reports.
async fn welcome(incoming: &mut Streaming<ToNode>) -> Result<Duration, SessionError> {
    match incoming.message().await?.and_then(|first| first.message) {
        Some(to_node::Message::Welcome(welcome)) => {
            let interval = Duration::from_millis(welcome.report_interval_ms.into());
            Ok(interval.clamp(*REPORT_INTERVAL.start(), *REPORT_INTERVAL.end()))
        }
        Some(_) => Err(InvalidMessage("the first message is no welcome".to_owned()).into()),
        None => Err(SessionError::Closed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_spread() {
        for attempt in 0..100 {
            let (least, most) = (pause(attempt, 0), pause(attempt, u64::MAX));
            assert!(least >= LEAST_PAUSE / 2 && most <= MOST_PAUSE && least * 2 == most);
            assert!(pause(attempt + 1, 0) >= least);
        }
        assert_eq!(pause(0, u64::MAX), LEAST_PAUSE);
        assert_eq!(pause(20, u64::MAX), MOST_PAUSE);
    }
}
