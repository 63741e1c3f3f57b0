//! The process of a node: configuration, start, signals, end.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_identity::{Identity, Part};
use baton_kvtransfer::{BindError, Endpoint, Timing};
use baton_proto::ids::{NodeId, Role};
use baton_telemetry::{Tracer, start_logging, systemd};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{Config, ConfigError};
use crate::driver::Event;
use crate::epoch::next_epoch;
use crate::load::{LoadFailure, Loaded};
use crate::node::{Node, Setup};
use crate::settings::Settings;
use crate::{metrics, supervisor};

/// Threads for sockets and timers; computing has its own.
const RUNTIME_THREADS: usize = 2;
/// How long the end waits for peers to be told.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a node did not start, in which case trying again does not help before what it names has
/// changed, or did not stay.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Identity(#[from] baton_identity::LoadError),
    #[error("the identity is coordinator {0}'s; a node needs its own, from `baton certs issue`")]
    NotANode(NodeId),
    #[error("state folder: {0}")]
    State(std::io::Error),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("cannot serve metrics: {0}")]
    Metrics(std::io::Error),
    #[error("{0}")]
    Load(#[from] LoadFailure),
    #[error("cannot watch for signals: {0}")]
    Signals(std::io::Error),
    #[error("metrics: {0}")]
    Recorder(#[from] metrics_exporter_prometheus::BuildError),
    #[error(transparent)]
    Traces(#[from] baton_telemetry::StartError),
    #[error("the engine failed")]
    Engine,
}

/// The `main` of a daemon: runs a node that begins as `role` until it is told to stop. Exit status
/// 2: the configuration is wrong; 1: the node could not start, or its engine failed.
#[must_use]
pub fn main(role: Role) -> ExitCode {
    let config = match configure(role) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("baton-{role}: {error}");
            return ExitCode::from(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build()
        .expect("a runtime needs only threads");
    let result = runtime.block_on(run(config, role));
    // A model that is still loading would hold the process up.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("baton-{role}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn configure(role: Role) -> Result<Config, String> {
    let text = |error: ConfigError| error.to_string();
    let settings = Settings::from_process(role).map_err(text)?;
    let config = Config::try_from(settings).map_err(text)?;
    start_logging(&config.log, config.log_format)?;
    Ok(config)
}

async fn run(config: Config, role: Role) -> Result<(), StartError> {
    let mut stop = Stop::new().map_err(StartError::Signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(StartError::Signals)?;
    let (drain_timeout, dir) = (config.drain_timeout, config.identity.clone());
    // Everything that can be wrong is found before the long part, loading.
    let identity = Identity::load(&dir)?;
    if identity.part() != Part::Node {
        return Err(StartError::NotANode(identity.node_id().clone()));
    }
    let mut node = tokio::select! {
        node = start(config, identity.clone(), role) => node?,
        () = stop.requested() => return Ok(()),
    };
    let (events, endpoint) = (node.events.clone(), node.endpoint.clone());
    let watch = supervisor::watch(node.engine.clone());
    let renewed = async {
        while hangup.recv().await.is_some() {
            systemd::reloading(|| reload(&identity, &dir));
        }
    };
    let stopped = async {
        stop.requested().await;
        tracing::info!("draining: taking nothing new, finishing what runs");
        supervisor::draining(drain_timeout);
        // A node that takes no events has drained.
        let _ = events.send(Event::Leave).await;
        tokio::select! {
            () = tokio::time::sleep(drain_timeout) => tracing::warn!("not drained in time"),
            () = stop.requested() => tracing::warn!("told again to stop"),
        }
    };
    tokio::select! {
        () = node.serve() => tracing::info!("nothing is left to do"),
        () = stopped => {}
        () = async { tokio::join!(watch, renewed); } => {}
    }
    let engine_stopped = node.engine_stopped();
    node.leave().await;
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.close()).await;
    if engine_stopped { Err(StartError::Engine) } else { Ok(()) }
}

/// Takes a renewed certificate; everything else of the configuration needs a restart.
fn reload(identity: &Identity, dir: &Path) {
    match identity.reload(dir) {
        Ok(()) => tracing::info!("certificate and key are loaded again"),
        Err(error) => tracing::error!(%error, "the old certificate stays"),
    }
}

async fn start(config: Config, identity: Identity, role: Role) -> Result<Node, StartError> {
    let name = identity.node_id().clone();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch =
        next_epoch(config.state.as_deref(), now.as_millis() as u64).map_err(StartError::State)?;
    let endpoint = Endpoint::bind(config.kv_listen, &identity, epoch, Timing::default())?;
    let kv_address = config.kv_address(endpoint.local_addr());
    let mut shown_at = None;
    let scraped = match config.metrics_listen {
        Some(address) => {
            let listener = TcpListener::bind(address).await.map_err(StartError::Metrics)?;
            shown_at = listener.local_addr().ok();
            Some((listener, metrics::install()?))
        }
        None => None,
    };

    let tracer = match &config.otlp_endpoint {
        Some(endpoint) => Tracer::start(endpoint, "baton-node", name.as_str(), 0.0)?,
        None => Tracer::default(),
    };

    let (loaded, config) = load(config).await?;
    let setup = Setup {
        role,
        identity,
        epoch,
        endpoint,
        kv_address: kv_address.clone(),
        kv_transports: config.kv_transports,
        cuda_libraries: config.cuda_libraries,
        model_name: config.model_name.clone(),
        engine: loaded.engine,
        grammars: loaded.grammars,
        price: config.price,
        coordinators: config.coordinators,
        tracer,
    };
    let node = Node::start(setup, loaded.executor);
    if let Some((listener, handle)) = scraped {
        tokio::spawn(metrics::serve(listener, handle, node.gauges()));
    }
    // Whoever started the daemon may have closed its end.
    let metrics = shown_at.map_or_else(String::new, |address| format!(" metrics={address}"));
    let _ = writeln!(std::io::stdout(), "ready {role}={name} kv={kv_address}{metrics}");
    supervisor::ready(&format!("{role} node {name}, KV at {kv_address}"));
    Ok(node)
}

async fn load(config: Config) -> Result<(Loaded, Config), StartError> {
    let loading = tokio::task::spawn_blocking(move || (crate::load::load(&config), config));
    let (loaded, config) = loading.await.expect("loading returns its errors");
    Ok((loaded?, config))
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
        Ok(Self { terminate: signal(terminate)?, interrupt: signal(interrupt)? })
    }

    async fn requested(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
