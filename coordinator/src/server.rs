//! A running coordinator: its listeners, its driver and its front, from start to drained.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use baton_identity::{ClientPortError, Identity};
use baton_telemetry::Tracer;
use metrics_exporter_prometheus::{BuildError, PrometheusHandle};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::config::Config;
use crate::core::Core;
use crate::driver::{Driver, FromLink};
use crate::exchange::Caller;
use crate::front::door::keys::KeysError;
use crate::front::door::{Door, Entrance, Tls};
use crate::front::models::{ModelFileError, Models};
use crate::front::{Front, serve_grpc, serve_http};
use crate::{join, metrics};

/// How long the front may take to end streams whose requests have ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between looks at how long certificates last.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(2);

/// Why a coordinator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its identity.
    #[error(transparent)]
    Identity(#[from] baton_identity::LoadError),
    /// It must act as a coordinator.
    #[error("the identity of {0} is that of a node; issue one for a coordinator")]
    NotACoordinator(baton_proto::ids::NodeId),
    /// The file of API keys.
    #[error("api_keys: {0}")]
    Keys(#[from] KeysError),
    /// The certificate of the client ports.
    #[error(transparent)]
    Tls(#[from] ClientPortError),
    /// A model's folder.
    #[error(transparent)]
    Model(#[from] ModelFileError),
    /// An address.
    #[error("{key} {address}: {source}")]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Traces.
    #[error(transparent)]
    Traces(#[from] baton_telemetry::StartError),
    /// Metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] BuildError),
}

/// A coordinator whose ports are bound and served.
pub struct Coordinator {
    /// Where gRPC clients connect.
    pub grpc: SocketAddr,
    /// Where HTTP clients connect.
    pub http: SocketAddr,
    /// Where nodes join.
    pub cluster: SocketAddr,
    core: Core,
    front: Front,
    reload: Reload,
    /// True once clients are taken no more.
    closing: watch::Sender<bool>,
    servers: JoinSet<Result<(), String>>,
    nodes: JoinSet<Result<(), String>>,
}

/// What a coordinator can read again while it runs. Cheap to clone.
#[derive(Clone)]
pub struct Reload {
    folder: PathBuf,
    identity: Identity,
    entrance: Entrance,
}

impl Reload {
    /// Reads certificates, keys and API keys again, for connections and requests from now on, and says
    /// in the log what came of it. What cannot be used changes nothing.
    pub fn reload(&self) {
        match self.identity.reload(&self.folder) {
            Ok(()) => tracing::info!("identity read again"),
            Err(error) => tracing::error!(%error, "the identity stays as it is"),
        }
        self.entrance.reload();
    }

    /// Shows when certificates expire, for as long as the process runs.
    async fn show_expiry(self) -> Result<(), String> {
        let mut interval = tokio::time::interval(EXPIRY_INTERVAL);
        loop {
            interval.tick().await;
            metrics::certificate("member", self.identity.expires_at());
            if let Some(expires) = self.entrance.expires() {
                metrics::certificate("client_port", expires);
            }
        }
    }
}

impl Coordinator {
    /// Binds and serves all ports. `shown` is what the HTTP port shows as metrics.
    pub async fn start(config: &Config, shown: PrometheusHandle) -> Result<Self, StartError> {
        let identity = Identity::load(&config.identity)?;
        if identity.part() != baton_identity::Part::Coordinator {
            return Err(StartError::NotACoordinator(identity.node_id().clone()));
        }
        let folders = config.models.iter();
        let models = Models::load(folders.map(|(name, dir)| (name.as_str(), dir.as_path())))?;
        let tls = config.tls.clone().map(Tls::load).transpose()?;
        let door = Door::new(config.api_keys.clone())?;
        let entrance = Entrance::new(door, tls, config.max_connections);
        let entrance = entrance
            .with_bodies(config.max_bodies_bytes)
            .with_overload_status(config.overload_status);
        let (grpc_listener, grpc) = bind("grpc", config.grpc).await?;
        let (http_listener, http) = bind("http", config.http).await?;
        let (cluster_listener, cluster) = bind("cluster_listen", config.cluster_listen).await?;

        let (mut driver, core, links) = Driver::new(config.options);
        if config.auto_roles {
            driver.adjust_roles(identity.node_id().clone());
        }
        let tracer = match &config.otlp_endpoint {
            Some(endpoint) => {
                let name = identity.node_id().as_str();
                Tracer::start(endpoint, "baton-coordinator", name, config.trace_ratio)?
            }
            None => Tracer::default(),
        };
        let front = Front::new(core.clone(), models, config.aliases.clone(), tracer);
        let (closing, closed) = watch::channel(false);
        tokio::spawn(driver.run());
        let listeners = (grpc_listener, http_listener);
        let servers = serve_clients(&front, shown, listeners, &entrance, &closed);
        let mut nodes = meet_members(config, &identity, cluster_listener, &core, &links);
        let reload = Reload { folder: config.identity.clone(), identity, entrance };
        nodes.spawn(reload.clone().show_expiry());
        Ok(Self { grpc, http, cluster, core, front, reload, closing, servers, nodes })
    }

    /// The handle to its core.
    #[must_use]
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// What reads its files again.
    #[must_use]
    pub fn reload(&self) -> Reload {
        self.reload.clone()
    }

    /// Waits until a server ends by itself, which it should not; says why.
    pub async fn broken(&mut self) -> String {
        let ended = tokio::select! {
            Some(ended) = self.servers.join_next() => ended,
            Some(ended) = self.nodes.join_next() => ended,
            else => return "no server is running".to_owned(),
        };
        match ended {
            Ok(Err(error)) => error,
            Ok(Ok(())) => "a server ended".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    /// Takes no more requests, which health checks are told first, and waits until those there are
    /// have been served. Health can be asked for until then.
    pub async fn drain(&mut self) {
        self.front.drain().await;
        self.closing.send_replace(true);
        while self.servers.join_next().await.is_some() {}
    }

    /// Ends all requests, frees what nodes hold for them, and closes all ports.
    pub async fn stop(mut self) {
        self.closing.send_replace(true);
        self.core.shut_down().await;
        // Clients get their errors and nodes their cancellations before the connections close.
        let closed = async { while self.servers.join_next().await.is_some() {} };
        if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
            tracing::warn!("clients kept their connections open");
        }
    }
}

/// Lets the process count, and gives what shows the counts.
pub fn install_metrics() -> Result<PrometheusHandle, StartError> {
    Ok(metrics::install()?)
}

/// Serves both client ports until `closed`.
fn serve_clients(
    front: &Front,
    shown: PrometheusHandle,
    (grpc, http): (TcpListener, TcpListener),
    entrance: &Entrance,
    closed: &watch::Receiver<bool>,
) -> JoinSet<Result<(), String>> {
    let mut servers = JoinSet::new();
    let (to_serve, door, stop) = (front.clone(), entrance.clone(), until(closed.clone()));
    servers.spawn(async move {
        serve_grpc(to_serve, grpc, &door, stop).await.map_err(|e| e.to_string())
    });
    let (to_serve, door, stop) = (front.clone(), entrance.clone(), until(closed.clone()));
    servers.spawn(async move {
        serve_http(to_serve, shown, http, &door, stop).await;
        Ok(())
    });
    servers
}

/// Serves nodes, and talks with other coordinators.
fn meet_members(
    config: &Config,
    identity: &Identity,
    listener: TcpListener,
    core: &Core,
    links: &mpsc::Sender<FromLink>,
) -> JoinSet<Result<(), String>> {
    let mut members = JoinSet::new();
    for address in config.peers.clone() {
        let (identity, core, driver) = (identity.clone(), core.clone(), links.clone());
        members.spawn(async move {
            let exchanging = Caller { identity, core, driver }.keep_exchanging(address);
            exchanging.await.map_err(|e| e.to_string())
        });
    }
    let (identity, core, links) = (identity.clone(), core.clone(), links.clone());
    let requests = config.options.limits.requests;
    members.spawn(async move {
        let never = std::future::pending();
        let served = join::serve(listener, &identity, requests, core, links, never);
        served.await.map_err(|e| e.to_string())
    });
    members
}

async fn bind(
    key: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { key, address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

async fn until(mut closed: watch::Receiver<bool>) {
    // A dropped sender means the same.
    let _ = closed.wait_for(|&closed| closed).await;
}
