//! What the front's tests share: files, and a core that the test plays.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_proto::ids::{RequestId, Role};
use baton_proto::message::{BlockCounts, NodeFinish, Report};
use baton_telemetry::Tracer;
use metrics_exporter_prometheus::PrometheusBuilder;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::door::Entrance;
use super::models::Models;
use super::text::Tokenizer;
use super::{Front, serve_grpc, serve_http};
use crate::aliases::{Alias, Estimate};
use crate::core::{
    Ask, CacheView, Core, ModelInfo, NewRequest, NodeCacheView, NodeView, OutputToken,
    PlacementInfo, StatusView, SubmitError, Summary, Timings, Update, Usage,
};
use crate::testing::{hello, node};

/// A test that waits longer has failed. Far longer than a slow machine takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Context of the played model.
pub(crate) const MAX_MODEL_LEN: u32 = 64;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What comes of `future`, which is not waited for without end.
pub(crate) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it comes in time")
}

/// Tries until something comes of it.
pub(crate) async fn until<T>(mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let trying = async {
        loop {
            if let Some(value) = attempt().await {
                break value;
            }
            tokio::task::yield_now().await;
        }
    };
    in_time(trying).await
}

/// Folder of the bundled demo model.
pub(crate) fn demo_model() -> PathBuf {
    root().join("models/demo")
}

/// A file of what transformers makes of text.
pub(crate) fn golden_text(file: &str) -> Value {
    let path = root().join("tests/golden/text").join(file);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The demo model's tokenizer.
pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::load(&demo_model().join("tokenizer.json")).unwrap()
}

/// What the played core does with a request.
pub(crate) enum Play {
    /// Sends these updates, and a last one if they lack it.
    Accept(Vec<Update>),
    /// Sends these, and the last one when it is told to stop.
    UntilStopped(Vec<Update>),
    /// Sends these and nothing more.
    Silence(Vec<Update>),
    /// Refuses it.
    Refuse(SubmitError),
}

type Asked = Arc<Mutex<Vec<NewRequest>>>;
/// By model: milliseconds that a prompt would wait. A model that is not here is not ready.
type Queues = Arc<Mutex<BTreeMap<String, f64>>>;

/// A front that listens, and its played core.
pub(crate) struct Played {
    /// Address of the gRPC port.
    pub(crate) grpc: SocketAddr,
    /// What listens.
    pub(crate) front: Front,
    /// Address of the HTTP port.
    pub(crate) http: SocketAddr,
    asked: Asked,
    queues: Queues,
    dropped: tokio::sync::Mutex<mpsc::Receiver<RequestId>>,
    ready: watch::Sender<bool>,
}

impl Played {
    /// A connection to the gRPC port.
    pub(crate) fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.grpc)).unwrap().connect_lazy()
    }

    /// Requests that reached the core.
    pub(crate) fn asked(&self) -> Vec<NewRequest> {
        self.asked.lock().unwrap().clone()
    }

    /// Returns when so many have.
    pub(crate) async fn asked_for(&self, requests: usize) {
        until(async || (self.asked().len() >= requests).then_some(())).await;
    }

    /// The next request that was given up.
    pub(crate) async fn dropped(&self) -> RequestId {
        in_time(async { self.dropped.lock().await.recv().await.unwrap() }).await
    }

    /// Returns when the service is known and serves, or does not.
    pub(crate) async fn until_health(&self, service: &str, serving: bool) {
        let mut health = HealthClient::new(self.channel());
        let ask = || HealthCheckRequest { service: service.to_owned() };
        // It appears with the first look at the core.
        let mut watch = until(async || match health.watch(ask()).await {
            Ok(watch) => Some(watch.into_inner()),
            Err(status) => {
                assert_eq!(status.code(), Code::NotFound);
                None
            }
        })
        .await;
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        until(async || {
            let now = watch.message().await.unwrap().unwrap();
            (now.status() == status).then_some(())
        })
        .await;
    }

    /// From now on a prompt would wait so long for this model.
    pub(crate) fn set_queue(&self, model: &str, ms: f64) {
        self.queues.lock().unwrap().insert(model.to_owned(), ms);
    }

    /// Whether the core says that it would serve a request.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.send_replace(ready);
    }
}

/// Starts a front for the demo model whose core answers requests as `play` says.
pub(crate) async fn start(play: impl Fn(&NewRequest) -> Play + Send + 'static) -> Played {
    start_with(&["demo"], Vec::new(), play).await
}

/// The same for the demo model under several names.
pub(crate) async fn start_with(
    names: &[&str],
    aliases: Vec<Alias>,
    play: impl Fn(&NewRequest) -> Play + Send + 'static,
) -> Played {
    start_in(&demo_model(), names, aliases, play).await
}

/// The same for the model in a folder.
pub(crate) async fn start_in(
    folder: &Path,
    names: &[&str],
    aliases: Vec<Alias>,
    play: impl Fn(&NewRequest) -> Play + Send + 'static,
) -> Played {
    start_behind(Entrance::open(), folder, names, aliases, play).await
}

/// The same behind an entrance.
pub(crate) async fn start_behind(
    entrance: Entrance,
    folder: &Path,
    names: &[&str],
    aliases: Vec<Alias>,
    play: impl Fn(&NewRequest) -> Play + Send + 'static,
) -> Played {
    let hello = hello(Role::Decode, 1);
    let model = |name: &&str| ModelInfo {
        name: String::from(*name),
        root: hello.root,
        geometry: hello.geometry,
        max_model_len: MAX_MODEL_LEN,
        vocab_size: 2048,
        hidden_size: 4096,
    };
    let (asks, asked_of_core) = mpsc::channel(64);
    let (drops, dropped) = mpsc::channel(64);
    let (models, models_seen) = watch::channel(Arc::new(names.iter().map(model).collect()));
    let (ready, ready_seen) = watch::channel(true);
    let (asked, queues) = (Arc::default(), Arc::default());
    let shared = (Arc::clone(&asked), Arc::clone(&queues));
    tokio::spawn(serve_core(asked_of_core, play, shared, ready_seen, models));

    let front = Front::new(
        Core::new(asks, drops, models_seen, watch::channel(0).1),
        Models::load(names.iter().map(|name| (*name, folder))).unwrap(),
        aliases,
        Tracer::default(),
    );
    let (grpc, http) = (listener().await, listener().await);
    let addresses = (grpc.local_addr().unwrap(), http.local_addr().unwrap());
    let metrics = PrometheusBuilder::new().build_recorder().handle();
    let (to_serve, door) = (front.clone(), entrance.clone());
    tokio::spawn(async move {
        serve_grpc(to_serve, grpc, &door, std::future::pending()).await.unwrap();
    });
    let to_serve = front.clone();
    tokio::spawn(async move {
        serve_http(to_serve, metrics, http, &entrance, std::future::pending()).await;
    });
    let (grpc, http) = addresses;
    Played { grpc, http, front, asked, queues, dropped: dropped.into(), ready }
}

/// Starts a front for a model whose template teaches calls in the format of Hermes, in few tokens.
pub(crate) async fn start_with_tools(
    play: impl Fn(&NewRequest) -> Play + Send + 'static,
) -> Played {
    let folder = tempfile::TempDir::new().unwrap();
    std::fs::copy(demo_model().join("tokenizer.json"), folder.path().join("tokenizer.json"))
        .unwrap();
    let template = "{% if tools %}<tool_call>{% for tool in tools %}{{ tool.function.name }},{% endfor %}\
        {% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% for call in m.tool_calls %}\
        !{{ call.function.arguments | tojson }}{% endfor %};{% endfor %}";
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    start_in(folder.path(), &["demo"], Vec::new(), play).await
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

async fn serve_core(
    mut asks: mpsc::Receiver<Ask>,
    play: impl Fn(&NewRequest) -> Play,
    (asked, queues): (Asked, Queues),
    ready: watch::Receiver<bool>,
    // Kept for as long as the core lives.
    _models: watch::Sender<Arc<Vec<ModelInfo>>>,
) {
    let mut running: Vec<(RequestId, mpsc::Sender<Update>)> = Vec::new();
    while let Some(ask) = asks.recv().await {
        match ask {
            Ask::Submit { request, updates, reply, .. } => {
                asked.lock().unwrap().push(request.clone());
                let (script, ends) = match play(&request) {
                    Play::Refuse(refusal) => {
                        reply.send(Err(refusal)).unwrap();
                        continue;
                    }
                    Play::Accept(script) => (script, true),
                    Play::UntilStopped(script) | Play::Silence(script) => (script, false),
                };
                reply.send(Ok(())).unwrap();
                let is_end =
                    |update: &Update| matches!(update, Update::Done(_) | Update::Failed(_));
                let ended = script.last().is_some_and(is_end);
                let last = (ends && !ended).then(|| done(Some(NodeFinish::EndOfSequence)));
                for update in script.into_iter().chain(last) {
                    updates.send(update).await.unwrap();
                }
                running.push((request.id, updates));
            }
            Ask::Stop(id) => {
                let (_, updates) = running.iter().find(|(running, _)| *running == id).unwrap();
                updates.send(done(None)).await.unwrap();
            }
            Ask::Cancel(_) | Ask::CancelOne { .. } | Ask::Look(_) | Ask::ShutDown(_) => {}
            Ask::Status(reply) => drop(reply.send(status(*ready.borrow()))),
            Ask::Order { reply, .. } => drop(reply.send(Ok(()))),
            Ask::Estimates { models, tokens, reply } => {
                let queues = queues.lock().unwrap();
                let prefill_ms = tokens as f64;
                let estimate = |queue_ms: &f64| Estimate { queue_ms: *queue_ms, prefill_ms };
                let estimates = models.iter().map(|model| queues.get(model).map(estimate));
                drop(reply.send(estimates.collect()));
            }
            Ask::Share(reply) => drop(reply.send(baton_proto::share::Share::default())),
            Ask::Nodes(reply) => drop(reply.send(vec![decode_node()])),
            Ask::Cache { node: wanted, reply, .. } => {
                let held = NodeCacheView {
                    node: node("d0"),
                    blocks: 5,
                    matched_tokens: 4,
                    hits: Default::default(),
                };
                let nodes = [held].into_iter();
                let nodes = nodes.filter(|held| wanted.as_ref().is_none_or(|w| *w == held.node));
                let view = CacheView { nodes: nodes.collect(), ..CacheView::default() };
                drop(reply.send(view));
            }
        }
    }
}

fn status(ready: bool) -> StatusView {
    StatusView {
        ready,
        reason: if ready { String::new() } else { "no decode node".to_owned() },
        models: if ready { vec!["demo".to_owned()] } else { Vec::new() },
        decode_nodes: usize::from(ready),
        ..StatusView::default()
    }
}

fn decode_node() -> NodeView {
    let blocks = BlockCounts { free: 4, active: 3, cached: 2, leased: 1 };
    NodeView {
        node: node("d0"),
        hello: hello(Role::Decode, 1),
        report: Report { blocks, ..Report::default() },
        report_age: Duration::from_millis(5),
    }
}

/// A generated token.
pub(crate) fn output(token: u32, finish: Option<NodeFinish>) -> OutputToken {
    OutputToken { token, logprobs: None, finish }
}

/// The last update of a request that went well.
pub(crate) fn done(finish: Option<NodeFinish>) -> Update {
    Update::Done(Summary {
        finish,
        usage: Usage { prompt_tokens: 2, cached_tokens: 1, completion_tokens: 99 },
        timings: Timings { first_token: Duration::from_millis(3), ..Timings::default() },
        placement: PlacementInfo {
            prefill: Some(node("p0")),
            decode: node("d0"),
            reason: "cheapest".to_owned(),
            attempts: 1,
        },
        outcomes: Vec::new(),
    })
}
