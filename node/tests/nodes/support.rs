//! A scripted coordinator, and a prefill and a decode node that join it over real sockets.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use baton_engine::model::{LoadFormat, LoadOptions, Model};
use baton_engine::staging::UNIT_BYTES;
use baton_engine::testing::FakeModel;
use baton_engine::testing::delayed::Clocks;
use baton_engine::{Engine, EngineConfig, Executor, HostExecutor};
use baton_identity::{ClusterCa, Identity, Part};
use baton_kvtransfer::{Endpoint, Timing, Transport};
use baton_node::Event;
use baton_node::node::{Node, Setup};
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{Epoch, RequestId, Role, TransferId};
use baton_proto::message::{Command, Hello, Job, NodeEvent, Peer, Report, Retry, TokenEvent};
use baton_proto::sampling::SamplingParams;
use baton_proto::wire::node::join_server::{Join, JoinServer};
use baton_proto::wire::node::{FromNode, ToNode, Welcome, to_node};
use baton_telemetry::Tracer;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Certificate, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

/// Longest wait for something that must happen; a test that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) async fn patiently<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("never happened: {what}"),
    }
}

// === the coordinator ===

/// One node's stream.
pub(crate) struct Joined {
    pub(crate) hello: Hello,
    events: Streaming<FromNode>,
    commands: mpsc::Sender<Result<ToNode, Status>>,
}

impl Joined {
    pub(crate) async fn command(&self, command: Command) {
        self.commands.send(Ok(command.into())).await.expect("the node listens");
    }

    /// The next event of whatever kind.
    pub(crate) async fn any(&mut self) -> NodeEvent {
        let message = patiently("an event", self.events.message()).await;
        let message = message.expect("the stream is whole").expect("the node stays");
        NodeEvent::try_from(message).expect("a legal event")
    }

    /// The next event about a job.
    pub(crate) async fn next(&mut self) -> NodeEvent {
        loop {
            match self.any().await {
                NodeEvent::Report(_) | NodeEvent::Cache { .. } | NodeEvent::Snapshot { .. } => {}
                event => return event,
            }
        }
    }

    /// Skips to the next token of `id`.
    pub(crate) async fn token(&mut self, id: TransferId) -> TokenEvent {
        loop {
            if let NodeEvent::Tokens(mut tokens) = self.next().await
                && let Some(at) = tokens.iter().position(|token| token.id == id)
            {
                assert_eq!(tokens.len(), 1, "one sequence at a time");
                return tokens.remove(at);
            }
        }
    }

    /// Tokens of `id` up to the one that ends it.
    pub(crate) async fn rest(&mut self, id: TransferId) -> Vec<TokenEvent> {
        let mut tokens = Vec::new();
        while tokens.last().is_none_or(|last: &TokenEvent| last.finish.is_none()) {
            tokens.push(self.token(id).await);
        }
        tokens
    }

    /// Skips to the failure of `wanted`, which may have started or even have its first token.
    pub(crate) async fn failure(&mut self, wanted: TransferId) -> (Retry, String) {
        loop {
            match self.next().await {
                NodeEvent::Failed { id, reason, retry } if id == wanted => return (retry, reason),
                NodeEvent::Started { .. } | NodeEvent::Tokens(_) => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    /// Skips to a report of a node that holds nothing for any job; asserts that none failed.
    pub(crate) async fn idle(&mut self) -> Report {
        loop {
            match self.any().await {
                NodeEvent::Report(report) if is_idle(&report) => return report,
                NodeEvent::Failed { reason, .. } => panic!("a job failed: {reason}"),
                _ => {}
            }
        }
    }
}

pub(crate) fn is_idle(report: &Report) -> bool {
    let blocks = report.blocks;
    (blocks.active, blocks.leased, report.running, report.waiting) == (0, 0, 0, 0)
}

struct Service(mpsc::Sender<Joined>);

#[tonic::async_trait]
impl Join for Service {
    type JoinStream = ReceiverStream<Result<ToNode, Status>>;

    async fn join(
        &self,
        request: Request<Streaming<FromNode>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let mut events = request.into_inner();
        let hello = events.message().await?.expect("a hello");
        let hello = Hello::try_from(hello).expect("a legal hello");
        let (commands, receiver) = mpsc::channel(64);
        let welcome = Welcome { coordinator: "test".to_owned(), report_interval_ms: 10 };
        let welcome = ToNode { message: Some(to_node::Message::Welcome(welcome)) };
        commands.send(Ok(welcome)).await.expect("open");
        let joined = Joined { hello, events, commands };
        self.0.send(joined).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

// === the pair ===

/// A node of the test.
pub(crate) struct TestNode {
    pub(crate) engine: Engine,
    pub(crate) endpoint: Endpoint,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) serving: JoinHandle<()>,
}

impl TestNode {
    fn start(setup: Setup, model: Box<dyn Executor>) -> Self {
        let mut node = Node::start(setup, model);
        Self {
            engine: node.engine.clone(),
            endpoint: node.endpoint.clone(),
            events: node.events.clone(),
            serving: tokio::spawn(async move {
                node.serve().await;
                node.leave().await;
            }),
        }
    }

    /// So many transfers are expected here.
    pub(crate) async fn expects(&self, count: usize) {
        let expects = async {
            while self.endpoint.transfers() != (0, count) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        patiently("the blocks are reserved", expects).await;
    }

    /// Neither the engine nor the endpoint holds anything for a job.
    pub(crate) async fn idle(&self) {
        let idle = async {
            while !is_idle(&self.engine.report()) || self.endpoint.transfers() != (0, 0) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        patiently("a node that holds nothing", idle).await;
        let blocks = self.engine.report().blocks;
        let sum = blocks.free + blocks.active + blocks.cached + blocks.leased;
        assert_eq!(sum, KV_BLOCKS as u64, "no block is lost");
    }
}

pub(crate) const BLOCK_TOKENS: usize = 4;
pub(crate) const KV_BLOCKS: usize = 256;

/// A coordinator with one prefill and one decode node.
pub(crate) struct Pair {
    pub(crate) joined: mpsc::Receiver<Joined>,
    pub(crate) prefill: TestNode,
    pub(crate) decode: TestNode,
}

impl Pair {
    pub(crate) async fn start() -> Self {
        Self::with(|| Box::new(HostExecutor::new(model()))).await
    }

    /// Nodes whose KV is in the memory of devices; if they are not `neighbours`, they cannot reach
    /// each other's.
    pub(crate) async fn on_devices(neighbours: bool) -> Self {
        Self::with(|| {
            let clocks = Clocks::default();
            clocks.run();
            if !neighbours {
                clocks.into.blind();
            }
            clocks.before(Box::new(HostExecutor::new(model())), (3, UNIT_BYTES))
        })
        .await
    }

    /// The same with a model of one's own.
    pub(crate) async fn with(model: impl Fn() -> Box<dyn Executor>) -> Self {
        Self::of([model(), model()], Timing::default(), |_| {}).await
    }

    /// The same with a model for each, the prefill node's first, and what else is `change`d.
    pub(crate) async fn of(
        [first, second]: [Box<dyn Executor>; 2],
        timing: Timing,
        change: impl Fn(&mut Setup),
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let ca = ClusterCa::create(&folder.path().join("ca")).expect("a new authority");
        let (sender, joined) = mpsc::channel(8);
        let own = identity(&ca, &folder, Part::Coordinator, "coordinator");
        let coordinator = serve(&own, sender).await;
        let setup = |role, name| {
            let identity = identity(&ca, &folder, Part::Node, name);
            let mut setup = setup(role, identity, coordinator, timing);
            change(&mut setup);
            setup
        };
        let prefill = TestNode::start(setup(Role::Prefill, "prefill-0"), first);
        let decode = TestNode::start(setup(Role::Decode, "decode-0"), second);
        Self { joined, prefill, decode }
    }

    /// The next two streams: the prefill node's and the decode node's.
    pub(crate) async fn streams(&mut self) -> (Joined, Joined) {
        let one = patiently("a node joins", self.joined.recv()).await.expect("serving");
        let other = patiently("a node joins", self.joined.recv()).await.expect("serving");
        match (one.hello.role, other.hello.role) {
            (Role::Prefill, Role::Decode) => (one, other),
            (Role::Decode, Role::Prefill) => (other, one),
            both => panic!("two of the same role: {both:?}"),
        }
    }

    /// Both nodes hold nothing for any job.
    pub(crate) async fn idle(&self) {
        self.prefill.idle().await;
        self.decode.idle().await;
    }
}

fn identity(ca: &ClusterCa, folder: &tempfile::TempDir, part: Part, name: &str) -> Identity {
    let folder = folder.path().join(name);
    let node = name.parse().expect("a legal name");
    ca.issue(part, &node, &[], &folder).expect("a new identity");
    Identity::load(&folder).expect("just made")
}

async fn serve(identity: &Identity, joined: mpsc::Sender<Joined>) -> SocketAddr {
    let tls = ServerTlsConfig::new()
        .identity(tonic::transport::Identity::from_pem(identity.cert_pem(), identity.key_pem()))
        .client_ca_root(Certificate::from_pem(identity.ca_pem()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = Server::builder().tls_config(tls).expect("a legal identity");
    let server = { server }.add_service(JoinServer::new(Service(joined)));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

fn setup(role: Role, identity: Identity, coordinator: SocketAddr, timing: Timing) -> Setup {
    let epoch = Epoch(7);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::bind(any, &identity, epoch, timing).expect("a port");
    Setup {
        role,
        identity,
        epoch,
        kv_address: endpoint.local_addr().to_string(),
        endpoint,
        kv_transports: vec![Transport::Ipc, Transport::Quic],
        cuda_libraries: None,
        model_name: "fake".to_owned(),
        price: 1.0,
        grammars: None,
        engine: EngineConfig {
            block_tokens: BLOCK_TOKENS,
            kv_blocks: KV_BLOCKS,
            max_batch_tokens: 16,
            max_sequences: 8,
            max_waiting: 8,
        },
        coordinators: vec![coordinator.to_string()],
        tracer: Tracer::default(),
    }
}

// === jobs ===

pub(crate) fn id(request: u128) -> TransferId {
    TransferId { request: RequestId(request), attempt: 1 }
}

/// A greedy job; `length` prompt tokens that `seed` determines.
pub(crate) fn job(id: TransferId, seed: u32, length: usize, max_tokens: u32) -> Job {
    let tokens = (0..length as u32).map(|n| (seed * 31 + n % 89 * n) % 97).collect();
    Job {
        id,
        tokens,
        prompt_tokens: length,
        sampling: SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() },
        salt: CacheSalt::default(),
        deadline: None,
        trace: None,
    }
}

/// Skips to the start of `id`.
pub(crate) async fn started(node: &mut Joined, wanted: TransferId) {
    while !matches!(node.next().await, NodeEvent::Started { id, .. } if id == wanted) {}
}

pub(crate) fn peer(node: &Joined, name: &str) -> Peer {
    Peer {
        node: name.parse().expect("a legal name"),
        epoch: node.hello.epoch,
        kv_address: node.hello.kv_address.clone(),
    }
}

/// Sends `job` to both nodes, as a coordinator does.
pub(crate) async fn hand_over(prefill: &Joined, decode: &Joined, job: &Job) {
    let command =
        Command::Decode { job: job.clone(), prefill: Some(peer(prefill, "prefill-0")), pull: None };
    decode.command(command).await;
    let command =
        Command::Prefill { job: job.clone(), decode: peer(decode, "decode-0"), pull: None };
    prefill.command(command).await;
}

pub(crate) async fn cancel(prefill: &Joined, decode: &Joined, id: TransferId) {
    prefill.command(Command::Cancel(id)).await;
    decode.command(Command::Cancel(id)).await;
}

/// A prompt that begins with this token is too much for the model. No other job's does.
pub(crate) const POISON: u32 = 127;

/// A model whose tokens depend on every byte of KV that it reads, and whose steps take time as
/// those of real ones do.
fn model() -> FakeModel {
    FakeModel::new(128, 1000).on_step(Box::new(|chunks| {
        let poison = chunks.iter().any(|chunk| chunk.start == 0 && chunk.tokens[0] == POISON);
        assert!(!poison, "a defect of the model");
        std::thread::sleep(Duration::from_micros(300));
    }))
}

/// The bundled demo model.
pub(crate) fn demo_model() -> Box<dyn Executor> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let model = Model::load(LoadOptions {
        dir: &dir,
        format: LoadFormat::Safetensors,
        threads: 1,
        max_model_len: None,
        kv_dtype: None,
        on_progress: &mut |_| {},
    });
    Box::new(HostExecutor::new(model.expect("the demo model is complete")))
}

/// What `job` must generate.
pub(crate) fn expected(job: &Job) -> Vec<u32> {
    FakeModel::new(128, 1000).expect(&job.tokens, job.sampling.max_tokens as usize)
}
