//! The parts of a running node, put together: engine, KV endpoint, worker, and one task per
//! coordinator. The daemons and the tests start nodes here.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use baton_engine::channel::NcclChannels;
use baton_engine::{Engine, EngineConfig, EngineInfo, Executor};
use baton_grammar::Grammars;
use baton_identity::Identity;
use baton_kvtransfer::{Endpoint, Transport};
use baton_proto::ids::{Epoch, Role};
use baton_proto::message::Hello;
use baton_telemetry::Tracer;
use tokio::sync::{mpsc, watch};

use crate::driver::{self, Driver, Event, MAX_EVENTS};
use crate::join::Joiner;
use crate::memory::{EngineChannels, EngineMemory};
use crate::metrics;
use crate::worker::News;

/// How long leaving may take, a second to carry what is queued included.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a node is made of.
pub struct Setup {
    /// What it begins as.
    pub role: Role,
    /// Who it is.
    pub identity: Identity,
    /// Which life of it this is.
    pub epoch: Epoch,
    /// Moves its KV.
    pub endpoint: Endpoint,
    /// `host:port` under which other nodes reach `endpoint`.
    pub kv_address: String,
    /// How its KV may travel.
    pub kv_transports: Vec<Transport>,
    /// Where the libraries of CUDA are looked for first.
    pub cuda_libraries: Option<PathBuf>,
    /// Name of the model.
    pub model_name: String,
    /// Sizes of the engine.
    pub engine: EngineConfig,
    /// Compiles grammars, if the model's tokenizer is known.
    pub grammars: Option<Arc<Grammars>>,
    /// What its time costs relative to that of other nodes.
    pub price: f64,
    /// Cluster addresses of all coordinators.
    pub coordinators: Vec<String>,
    /// Traces its part in requests.
    pub tracer: Tracer,
}

/// A running node. Dropping it leaves every coordinator.
pub struct Node {
    /// Takes further events.
    pub events: mpsc::Sender<Event>,
    /// Computes.
    pub engine: Engine,
    /// Moves KV.
    pub endpoint: Endpoint,
    identity: Identity,
    model: String,
    news: watch::Receiver<News>,
    driver: Driver,
    received: mpsc::Receiver<Event>,
    sessions: tokio::task::JoinSet<()>,
}

impl Node {
    /// Starts a node that serves the model of `executor`. Must be called in a tokio runtime.
    pub fn start(setup: Setup, executor: Box<dyn Executor>) -> Self {
        let (events, received) = mpsc::channel(MAX_EVENTS);
        let sink = EngineSink(events.clone());
        let sink = Box::new(move |event| sink.tell(Event::Engine(event)));
        let engine = Engine::start(setup.engine.clone(), executor, setup.grammars.clone(), sink);
        let shares = setup.kv_transports.contains(&Transport::Ipc);
        if let Some(memory) = EngineMemory::of(engine.memory()).filter(|_| shares) {
            setup.endpoint.share(Arc::new(memory));
        }
        if setup.kv_transports.contains(&Transport::Nccl) {
            open_channels(&setup, &engine);
        }
        let hello = hello(&setup, &engine.info());
        let (news, reported) = watch::channel(News { role: hello.role, ..News::default() });
        let parts = (engine.clone(), setup.endpoint.clone(), hello.clone());
        let driver = Driver::new(parts, events.clone(), news, setup.tracer);
        let joiner = Arc::new(Joiner {
            identity: setup.identity.clone(),
            hello,
            engine: engine.clone(),
            kv: setup.endpoint.clone(),
            events: events.clone(),
            news: reported.clone(),
            streams: AtomicU64::new(0),
        });
        let mut sessions = tokio::task::JoinSet::new();
        for coordinator in setup.coordinators {
            sessions.spawn(joiner.clone().keep_joined(coordinator));
        }
        Self {
            events,
            engine,
            endpoint: setup.endpoint,
            identity: setup.identity,
            model: setup.model_name,
            news: reported,
            driver,
            received,
            sessions,
        }
    }

    /// Sets the gauges to what holds at the moment of a call.
    pub(crate) fn gauges(&self) -> impl Fn() + Clone + Send + Sync + 'static {
        let (engine, news) = (self.engine.clone(), self.news.clone());
        let (endpoint, model) = (self.endpoint.clone(), self.model.clone());
        let identity = self.identity.clone();
        move || {
            metrics::process(identity.expires_at());
            let report = driver::report(&engine, &endpoint, *news.borrow());
            metrics::report(&report, &engine.info(), &model);
        }
    }

    /// Works until the node has drained, or its engine has stopped.
    pub async fn serve(&mut self) {
        self.driver.run(&mut self.received).await;
    }

    /// Whether the engine stopped by itself: the node can do nothing any more.
    #[must_use]
    pub fn engine_stopped(&self) -> bool {
        self.driver.engine_stopped()
    }

    /// Leaves every coordinator, after what is still to be told has been, or a bounded wait.
    pub async fn leave(self) {
        let Self { driver, received, mut sessions, .. } = self;
        // Ends the streams.
        drop((driver, received));
        let all = async { while sessions.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LEAVE_TIMEOUT, all).await;
    }
}

fn open_channels(setup: &Setup, engine: &Engine) {
    match NcclChannels::of(engine.memory(), setup.cuda_libraries.as_slice()) {
        Ok(channels) => setup.endpoint.open_channels(Arc::new(EngineChannels(channels))),
        Err(reason) => {
            tracing::warn!("kv_transports has nccl, by which no KV travels here: {reason}")
        }
    }
}

/// The engine's end of the node's events. The engine's thread drops it when it ends.
struct EngineSink(mpsc::Sender<Event>);

impl EngineSink {
    /// The engine's own thread waits here if the driver falls behind.
    fn tell(&self, event: Event) {
        // Without a driver the process is ending.
        let _ = self.0.blocking_send(event);
    }
}

impl Drop for EngineSink {
    fn drop(&mut self) {
        self.tell(Event::EngineStopped);
    }
}

fn hello(setup: &Setup, engine: &EngineInfo) -> Hello {
    Hello {
        role: setup.role,
        epoch: setup.epoch,
        model: setup.model_name.clone(),
        root: engine.root,
        geometry: engine.geometry,
        max_model_len: engine.max_model_len as u32,
        vocab_size: engine.vocab_size as u32,
        hidden_size: engine.hidden_size as u32,
        total_blocks: engine.kv_blocks as u64,
        kv_address: setup.kv_address.clone(),
        transports: setup.endpoint.transports().iter().map(ToString::to_string).collect(),
        price: setup.price,
    }
}
