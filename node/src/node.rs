//! The parts of a running node, put together: engine, KV endpoint, hub, and one task per
//! coordinator. The daemons and the tests start nodes here.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use baton_engine::{Engine, EngineConfig, EngineInfo, Forward};
use baton_identity::Identity;
use baton_kvtransfer::{Endpoint, TRANSPORTS};
use baton_proto::ids::{Epoch, Role};
use baton_proto::message::Hello;
use tokio::sync::{mpsc, watch};

use crate::hub::{Event, Hub, MAX_EVENTS, News};
use crate::join::Joiner;

/// How long leaving may take, a second to carry what is queued included.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a node is made of.
pub struct Setup {
    /// What it does.
    pub role: Role,
    /// Who it is.
    pub identity: Identity,
    /// Which life of it this is.
    pub epoch: Epoch,
    /// Moves its KV.
    pub endpoint: Endpoint,
    /// `host:port` under which other nodes reach `endpoint`.
    pub kv_address: String,
    /// Name of the model.
    pub model_name: String,
    /// Sizes of the engine.
    pub engine: EngineConfig,
    /// Cluster addresses of all coordinators.
    pub coordinators: Vec<String>,
}

/// A running node, as its role sees it. `J` is what the role keeps of a job, `T` how its
/// transfers end. Dropping it leaves every coordinator.
pub struct Node<J, T> {
    /// Gives the role its inputs.
    pub hub: Hub<J, T>,
    /// Takes further events for the hub.
    pub events: mpsc::Sender<Event<T>>,
    /// Computes.
    pub engine: Engine,
    /// Moves KV.
    pub endpoint: Endpoint,
    /// What the coordinators know about the node.
    pub hello: Hello,
    sessions: tokio::task::JoinSet<()>,
}

impl<J, T: Send + 'static> Node<J, T> {
    /// Starts a node that serves `model`. Must be called in a tokio runtime.
    pub fn start(setup: Setup, model: Box<dyn Forward>) -> Self {
        let (events, received) = mpsc::channel(MAX_EVENTS);
        let sink = EngineSink(events.clone());
        let sink = Box::new(move |event| sink.tell(Event::Engine(event)));
        let engine = Engine::start(setup.engine.clone(), model, sink);
        let hello = hello(&setup, &engine.info());
        let (news, reported) = watch::channel(News::default());
        let hub = Hub::new(received, engine.clone(), news);
        let joiner = Arc::new(Joiner {
            identity: setup.identity,
            hello: hello.clone(),
            engine: engine.clone(),
            hub: events.clone(),
            news: reported,
            streams: AtomicU64::new(0),
        });
        let mut sessions = tokio::task::JoinSet::new();
        for coordinator in setup.coordinators {
            sessions.spawn(joiner.clone().keep_joined(coordinator));
        }
        Self { hub, events, engine, endpoint: setup.endpoint, hello, sessions }
    }
}

impl<J, T> Node<J, T> {
    /// Leaves every coordinator, after what is still to be told has been, or a bounded wait.
    pub async fn leave(self) {
        let Self { hub, mut sessions, .. } = self;
        // Ends the streams.
        drop(hub);
        let all = async { while sessions.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LEAVE_TIMEOUT, all).await;
    }
}

/// The engine's end of the hub's events. The engine's thread drops it when it ends.
struct EngineSink<T>(mpsc::Sender<Event<T>>);

impl<T> EngineSink<T> {
    /// The engine's own thread waits here if the hub falls behind.
    fn tell(&self, event: Event<T>) {
        // Without a hub the process is ending.
        let _ = self.0.blocking_send(event);
    }
}

impl<T> Drop for EngineSink<T> {
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
        total_blocks: engine.kv_blocks as u64,
        kv_address: setup.kv_address.clone(),
        transports: TRANSPORTS.iter().map(ToString::to_string).collect(),
    }
}
