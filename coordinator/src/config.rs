//! A coordinator's configuration, checked and complete.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use axum::http::StatusCode;
use baton_telemetry::LogFormat;

use crate::aliases::Alias;
use crate::control::Options;
use crate::front::door::{MAX_BODIES_BYTES, MAX_CONNECTIONS, TlsFiles};
use crate::front::{MAX_BODY_BYTES, PlaintextRefused, check_plaintext};
use crate::peers::MAX_PEERS;
use crate::placement;
use crate::requests::Limits;
use crate::settings::{AliasSettings, Settings};

/// Default of [`AliasSettings::target_ttft_ms`].
const TARGET_TTFT_MS: f64 = 2000.0;

/// Most requests that a coordinator may be told to hold.
const MAX_REQUESTS: usize = 1 << 20;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot.
    #[error(transparent)]
    File(#[from] baton_proto::config::ConfigError),
    /// Nothing was given and there is no default.
    #[error("{0} is not set; give --{0}, or {0} in the configuration file")]
    Missing(&'static str),
    /// A value that cannot be used.
    #[error("{key} {problem}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// An address that would carry prompts in the clear.
    #[error(transparent)]
    Plaintext(#[from] PlaintextRefused),
}

/// A complete configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where nodes join.
    pub cluster_listen: SocketAddr,
    /// Where the other coordinators' nodes join.
    pub peers: Vec<String>,
    /// Where gRPC clients connect.
    pub grpc: SocketAddr,
    /// Where HTTP clients connect.
    pub http: SocketAddr,
    /// The certificate of both; `None` is plaintext.
    pub tls: Option<TlsFiles>,
    /// The file of API keys; `None` lets everybody in.
    pub api_keys: Option<PathBuf>,
    /// Most connections of clients.
    pub max_connections: usize,
    /// Most bytes of all requests' bodies that are read or parsed at a time.
    pub max_bodies_bytes: usize,
    /// What HTTP clients are told when the cluster has all it can take.
    pub overload_status: StatusCode,
    /// Folder of the identity.
    pub identity: PathBuf,
    /// Names and folders of the models.
    pub models: Vec<(String, PathBuf)>,
    /// Further names, each for several models.
    pub aliases: Vec<Alias>,
    /// Bounds on what is held, and how requests are placed.
    pub options: Options,
    /// Whether nodes are shifted between roles.
    pub auto_roles: bool,
    /// What running requests get after SIGTERM.
    pub drain_timeout: Duration,
    /// Log filter.
    pub log: String,
    /// How a line of the log looks; `None`: whatever is usual where it goes.
    pub log_format: Option<LogFormat>,
    /// Where traces are sent.
    pub otlp_endpoint: Option<String>,
    /// Share of the requests that are traced.
    pub trace_ratio: f64,
}

impl TryFrom<Settings> for Config {
    type Error = ConfigError;

    fn try_from(settings: Settings) -> Result<Self, ConfigError> {
        let models = models(&settings)?;
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let (grpc, http) =
            (settings.grpc.unwrap_or(loopback(7401)), settings.http.unwrap_or(loopback(7402)));
        let tls = tls(&settings)?;
        let allow = tls.is_some() || settings.allow_plaintext.unwrap_or(false);
        check_plaintext(grpc, allow)?;
        check_plaintext(http, allow)?;
        let above_0 = |key, value: usize| match value {
            0 => Err(ConfigError::Value { key, problem: "must be above 0".to_owned() }),
            more => Ok(more),
        };
        let limits = Limits {
            requests: requests(settings.max_requests.unwrap_or(4096))?,
            tokens: above_0("max_held_tokens", settings.max_held_tokens.unwrap_or(64 << 20))?,
        };
        let index_blocks = above_0("index_blocks", settings.index_blocks.unwrap_or(4 << 20))?;
        let local_prefill = settings.local_prefill.unwrap_or_default();
        let most_wait = settings.max_wait_s.map(most_wait).transpose()?;
        let placement =
            placement::Options { local_prefill, most_wait, ..placement::Options::default() };
        let log_format = settings.log_format.as_deref().map(log_format).transpose()?;
        Ok(Self {
            cluster_listen: settings.cluster_listen.unwrap_or(loopback(7400)),
            peers: peers(settings.peers)?,
            grpc,
            http,
            tls,
            api_keys: settings.api_keys,
            max_connections: above_0(
                "max_connections",
                settings.max_connections.unwrap_or(MAX_CONNECTIONS),
            )?,
            max_bodies_bytes: bodies(settings.max_bodies_bytes.unwrap_or(MAX_BODIES_BYTES))?,
            overload_status: overload_status(settings.overload_status.unwrap_or(529))?,
            identity: settings.identity.ok_or(ConfigError::Missing("identity"))?,
            aliases: aliases(settings.aliases, &models)?,
            models,
            options: Options { limits, index_blocks, placement },
            auto_roles: settings.auto_roles.unwrap_or(false),
            drain_timeout: Duration::from_secs(settings.drain_timeout_s.unwrap_or(60)),
            log: settings.log.unwrap_or_else(|| "info".to_owned()),
            log_format,
            otlp_endpoint: settings.otlp_endpoint,
            trace_ratio: trace_ratio(settings.trace_ratio.unwrap_or(1.0))?,
        })
    }
}

/// Queues are made for all of them.
fn requests(most: usize) -> Result<usize, ConfigError> {
    if (1..=MAX_REQUESTS).contains(&most) {
        return Ok(most);
    }
    let problem = format!("is {most}; it must be from 1 to {MAX_REQUESTS}");
    Err(ConfigError::Value { key: "max_requests", problem })
}

/// Those that clients understand as "come back later".
fn overload_status(status: u16) -> Result<StatusCode, ConfigError> {
    let known = [529, 503, 429].contains(&status).then(|| StatusCode::from_u16(status));
    let problem = format!("is {status}; it must be 529, 503 or 429");
    known.and_then(Result::ok).ok_or(ConfigError::Value { key: "overload_status", problem })
}

/// One body must find room.
fn bodies(bytes: usize) -> Result<usize, ConfigError> {
    if bytes >= MAX_BODY_BYTES {
        return Ok(bytes);
    }
    let problem = format!("is {bytes}; it must be at least {MAX_BODY_BYTES}");
    Err(ConfigError::Value { key: "max_bodies_bytes", problem })
}

fn models(settings: &Settings) -> Result<Vec<(String, PathBuf)>, ConfigError> {
    let folders = settings.model.as_deref().filter(|folders| !folders.is_empty());
    let folders = folders.ok_or(ConfigError::Missing("model"))?;
    let own_name = |folder: &PathBuf| {
        let name = folder.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        let problem = format!("{} has no name; set model_name", folder.display());
        name.ok_or(ConfigError::Value { key: "model", problem })
    };
    let names = match &settings.model_name {
        Some(names) => names.clone(),
        None => folders.iter().map(own_name).collect::<Result<_, _>>()?,
    };
    let value = |problem| Err(ConfigError::Value { key: "model_name", problem });
    if names.len() != folders.len() {
        return value(format!("has {} names for {} models", names.len(), folders.len()));
    }
    let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    if let Some((_, name)) = twice {
        return value(format!("names {name:?} twice"));
    }
    Ok(names.into_iter().zip(folders.iter().cloned()).collect())
}

fn tls(settings: &Settings) -> Result<Option<TlsFiles>, ConfigError> {
    let alone = |key, other: &str| {
        Err(ConfigError::Value { key, problem: format!("is set without {other}") })
    };
    let client_ca = settings.tls_client_ca.clone();
    match (settings.tls_cert.clone(), settings.tls_key.clone()) {
        (Some(cert), Some(key)) => Ok(Some(TlsFiles { cert, key, client_ca })),
        (Some(_), None) => alone("tls_cert", "tls_key"),
        (None, Some(_)) => alone("tls_key", "tls_cert"),
        (None, None) if client_ca.is_some() => alone("tls_client_ca", "tls_cert"),
        (None, None) => Ok(None),
    }
}

fn log_format(name: &str) -> Result<LogFormat, ConfigError> {
    let problem = |error: baton_telemetry::UnknownFormat| format!("is {name:?}; it {error}");
    name.parse().map_err(|e| ConfigError::Value { key: "log_format", problem: problem(e) })
}

fn trace_ratio(ratio: f64) -> Result<f64, ConfigError> {
    if (0.0..=1.0).contains(&ratio) {
        return Ok(ratio);
    }
    let problem = format!("is {ratio}; it must be from 0 to 1");
    Err(ConfigError::Value { key: "trace_ratio", problem })
}

fn most_wait(seconds: f64) -> Result<Duration, ConfigError> {
    let wait = Duration::try_from_secs_f64(seconds).ok().filter(|wait| !wait.is_zero());
    let problem = format!("is {seconds}; it must be above 0");
    wait.ok_or(ConfigError::Value { key: "max_wait_s", problem })
}

fn aliases(
    given: Option<Vec<AliasSettings>>,
    models: &[(String, PathBuf)],
) -> Result<Vec<Alias>, ConfigError> {
    let mut aliases: Vec<Alias> = Vec::new();
    for given in given.unwrap_or_default() {
        let alias = alias(given, models)?;
        if aliases.iter().any(|other| other.name == alias.name) {
            let problem = format!("names {:?} twice", alias.name);
            return Err(ConfigError::Value { key: "aliases.name", problem });
        }
        aliases.push(alias);
    }
    Ok(aliases)
}

fn alias(given: AliasSettings, models: &[(String, PathBuf)]) -> Result<Alias, ConfigError> {
    let AliasSettings { name, models: own, prices, target_ttft_ms } = given;
    let wrong = |key, problem: String| Err(ConfigError::Value { key, problem });
    let is_model = |name: &String| models.iter().any(|(model, _)| model == name);
    if name.is_empty() || is_model(&name) {
        return wrong("aliases.name", format!("is {name:?}, which is empty or a model's"));
    }
    if own.is_empty() {
        return wrong("aliases.models", format!("of {name:?} is empty"));
    }
    if let Some(unknown) = own.iter().find(|model| !is_model(model)) {
        return wrong(
            "aliases.models",
            format!("of {name:?} has {unknown:?}, which is not served"),
        );
    }
    let prices = prices.unwrap_or_else(|| vec![1.0; own.len()]);
    if prices.len() != own.len() {
        let (prices, models) = (prices.len(), own.len());
        return wrong(
            "aliases.prices",
            format!("of {name:?} has {prices} prices for {models} models"),
        );
    }
    if let Some(price) = prices.iter().find(|&&price| !(price > 0.0 && price.is_finite())) {
        return wrong("aliases.prices", format!("of {name:?} has {price}; it must be above 0"));
    }
    let target_ttft_ms = target_ttft_ms.unwrap_or(TARGET_TTFT_MS);
    if !(target_ttft_ms > 0.0 && target_ttft_ms.is_finite()) {
        let problem = format!("of {name:?} is {target_ttft_ms}; it must be above 0");
        return wrong("aliases.target_ttft_ms", problem);
    }
    Ok(Alias { name, models: own, prices, target_ttft_ms })
}

fn peers(given: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let given = given.unwrap_or_default();
    let value = |problem| Err(ConfigError::Value { key: "peers", problem });
    let has_port = |address: &str| {
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        port.is_some_and(|(_, port)| port.parse().is_ok_and(|port: u16| port > 0))
    };
    if let Some(address) = given.iter().find(|address| !has_port(address)) {
        return value(format!("has {address:?}, which is not HOST:PORT"));
    }
    if given.len() > MAX_PEERS {
        return value(format!("has {} addresses; at most {MAX_PEERS} are possible", given.len()));
    }
    Ok(given)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
