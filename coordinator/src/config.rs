//! What a coordinator's operator can set: flags win over `BATON_*` variables, which win over the
//! file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_proto::config::load_toml;
use baton_telemetry::LogFormat;
use clap::{Args, Parser};
use serde::Deserialize;

use crate::aliases::Alias;
use crate::control::Options;
use crate::front::door::{MAX_CONNECTIONS, TlsFiles};
use crate::front::{PlaintextRefused, check_plaintext};
use crate::peers::MAX_PEERS;
use crate::placement::{self, LocalPrefill};
use crate::requests::Limits;

/// Default of [`AliasSettings::target_ttft_ms`].
const TARGET_TTFT_MS: f64 = 2000.0;

/// Every key as it was given. In the file a key has `_` where its flag has `-`.
#[derive(Args, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where nodes join, over mutual TLS; port 0 takes a free one. Default: 127.0.0.1:7400.
    #[arg(long, env = "BATON_CLUSTER_LISTEN", value_name = "ADDR")]
    pub cluster_listen: Option<SocketAddr>,
    /// Cluster addresses of the other coordinators of the same nodes, `HOST:PORT`. It is enough if
    /// one of two coordinators names the other. Can be given several times.
    #[arg(long, env = "BATON_PEERS", value_name = "ADDR", value_delimiter = ',')]
    pub peers: Option<Vec<String>>,
    /// Where gRPC clients connect. Default: 127.0.0.1:7401.
    #[arg(long, env = "BATON_GRPC", value_name = "ADDR")]
    pub grpc: Option<SocketAddr>,
    /// Where HTTP clients connect, for health and metrics as well. Default: 127.0.0.1:7402.
    #[arg(long, env = "BATON_HTTP", value_name = "ADDR")]
    pub http: Option<SocketAddr>,
    /// Certificate chain of `grpc` and `http` as PEM, from any authority; together with `tls_key`.
    /// Read again on SIGHUP. Default: none, they are plaintext.
    #[arg(long, env = "BATON_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key as PEM, which other users must not be able to read.
    #[arg(long, env = "BATON_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Authorities as PEM: clients then need a certificate of one of them. Default: they need none.
    #[arg(long, env = "BATON_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// File of API keys, made with `baton keys new`. Read again on SIGHUP. Default: none, everybody
    /// who reaches the ports may do everything.
    #[arg(long, env = "BATON_API_KEYS", value_name = "FILE")]
    pub api_keys: Option<PathBuf>,
    /// Most connections of clients, half of them from one address. Default: 4096.
    #[arg(long, env = "BATON_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,
    /// Lets `grpc` and `http` listen without TLS on addresses that other machines reach, where prompts
    /// and API keys can be read on the way. For networks that are encrypted themselves.
    #[arg(long, env = "BATON_ALLOW_PLAINTEXT", num_args = 0..=1, default_missing_value = "true")]
    pub allow_plaintext: Option<bool>,
    /// Folder of this coordinator's certificate and key, from `baton certs issue`. Required.
    #[arg(long, env = "BATON_IDENTITY", value_name = "DIR")]
    pub identity: Option<PathBuf>,
    /// Folder of a served model: tokenizer, chat template, generation_config.json; no weights are
    /// read. Can be given several times. At least one is required.
    #[arg(long, env = "BATON_MODEL", value_name = "DIR", value_delimiter = ',')]
    pub model: Option<Vec<PathBuf>>,
    /// Names of the models, in the same order; the same as on their nodes. Default: the folders'
    /// names.
    #[arg(long, env = "BATON_MODEL_NAME", value_name = "NAME", value_delimiter = ',')]
    pub model_name: Option<Vec<String>>,
    /// Names that stand for several models each, `[[aliases]]` in the file; they have no flag.
    #[arg(skip)]
    pub aliases: Option<Vec<AliasSettings>>,
    /// Most requests at a time; further ones are refused. Default: 4096.
    #[arg(long, env = "BATON_MAX_REQUESTS", value_name = "N")]
    pub max_requests: Option<usize>,
    /// Most tokens of all requests, prompts and outputs; further requests are refused.
    /// Default: 67108864 (256 MiB).
    #[arg(long, env = "BATON_MAX_HELD_TOKENS", value_name = "N")]
    pub max_held_tokens: Option<usize>,
    /// Most KV blocks in the index of the nodes' caches, 24 bytes each; more than all nodes
    /// hold is best. Default: 4194304.
    #[arg(long, env = "BATON_INDEX_BLOCKS", value_name = "N")]
    pub index_blocks: Option<usize>,
    /// When decode nodes compute prompts themselves: `auto`, when that is cheaper, or `never`, unless
    /// there is no prefill node. Default: auto.
    #[arg(long, env = "BATON_LOCAL_PREFILL", value_name = "WHEN")]
    pub local_prefill: Option<LocalPrefill>,
    /// Refuses a request at once if its first token would take more seconds than this, once speeds are
    /// known. Default: no limit but the request's own deadline.
    #[arg(long, env = "BATON_MAX_WAIT_S", value_name = "SECONDS")]
    pub max_wait_s: Option<f64>,
    /// Makes decode nodes prefill nodes, and the other way round, as load shifts. Set it on all
    /// coordinators of the same nodes or on none. Default: false.
    #[arg(long, env = "BATON_AUTO_ROLES", num_args = 0..=1, default_missing_value = "true")]
    pub auto_roles: Option<bool>,
    /// Seconds that running requests get to finish after SIGTERM. Default: 60.
    #[arg(long, env = "BATON_DRAIN_TIMEOUT_S", value_name = "SECONDS")]
    pub drain_timeout_s: Option<u64>,
    /// What is logged to standard error, e.g. `info` or `info,baton_coordinator=debug`.
    /// Default: info.
    #[arg(long, env = "BATON_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// `text`, `json`, or `journal` for systemd's journal with its fields. Default: journal under
    /// systemd, else text.
    #[arg(long, env = "BATON_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Where traces are sent, as OTLP over gRPC, e.g. http://127.0.0.1:4317. Default: nowhere.
    #[arg(long, env = "BATON_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Share of the requests that are traced, from 0 to 1; those whose client says so always are.
    /// Default: 1.
    #[arg(long, env = "BATON_TRACE_RATIO", value_name = "SHARE")]
    pub trace_ratio: Option<f64>,
}

/// A name for several models. A request that names it is served by the cheapest of those that would
/// begin to answer in time, or by whichever begins first.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct AliasSettings {
    /// The name; no model has it.
    pub name: String,
    /// Names of served models, in order of preference.
    pub models: Vec<String>,
    /// Relative prices of a second of device time of each, in the same order. Default: 1 each.
    pub prices: Option<Vec<f64>>,
    /// Milliseconds to the first token that are in time. Default: 2000.
    pub target_ttft_ms: Option<f64>,
}

/// The coordinator of a Baton cluster.
#[derive(Parser)]
#[command(name = "baton-coordinator", version)]
struct CommandLine {
    /// TOML file with any of the keys below.
    #[arg(long, env = "BATON_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot.
    #[error(transparent)]
    File(#[from] baton_proto::config::ConfigError),
    /// Nothing was given and there is no default.
    #[error("{0} is not set")]
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

impl Config {
    /// Reads the process's flags and environment and the file that they name. Bad flags end the
    /// process with status 2, as clap does.
    pub fn from_process() -> Result<Self, ConfigError> {
        let line = CommandLine::parse();
        match line.config {
            Some(file) => line.settings.over(Settings::from_file(&file)?).try_into(),
            None => line.settings.try_into(),
        }
    }
}

impl Settings {
    /// Reads a configuration file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        Ok(load_toml(path)?)
    }

    /// These settings, completed by `other` where they say nothing.
    #[must_use]
    pub fn over(self, other: Self) -> Self {
        Self {
            cluster_listen: self.cluster_listen.or(other.cluster_listen),
            peers: self.peers.or(other.peers),
            grpc: self.grpc.or(other.grpc),
            http: self.http.or(other.http),
            tls_cert: self.tls_cert.or(other.tls_cert),
            tls_key: self.tls_key.or(other.tls_key),
            tls_client_ca: self.tls_client_ca.or(other.tls_client_ca),
            api_keys: self.api_keys.or(other.api_keys),
            max_connections: self.max_connections.or(other.max_connections),
            allow_plaintext: self.allow_plaintext.or(other.allow_plaintext),
            identity: self.identity.or(other.identity),
            model: self.model.or(other.model),
            model_name: self.model_name.or(other.model_name),
            aliases: self.aliases.or(other.aliases),
            max_requests: self.max_requests.or(other.max_requests),
            max_held_tokens: self.max_held_tokens.or(other.max_held_tokens),
            index_blocks: self.index_blocks.or(other.index_blocks),
            local_prefill: self.local_prefill.or(other.local_prefill),
            max_wait_s: self.max_wait_s.or(other.max_wait_s),
            auto_roles: self.auto_roles.or(other.auto_roles),
            drain_timeout_s: self.drain_timeout_s.or(other.drain_timeout_s),
            log: self.log.or(other.log),
            log_format: self.log_format.or(other.log_format),
            otlp_endpoint: self.otlp_endpoint.or(other.otlp_endpoint),
            trace_ratio: self.trace_ratio.or(other.trace_ratio),
        }
    }

    fn models(&self) -> Result<Vec<(String, PathBuf)>, ConfigError> {
        let folders = self.model.as_deref().filter(|folders| !folders.is_empty());
        let folders = folders.ok_or(ConfigError::Missing("model"))?;
        let own_name = |folder: &PathBuf| {
            let name = folder.file_name().and_then(|name| name.to_str()).map(str::to_owned);
            let problem = format!("{} has no name; set model_name", folder.display());
            name.ok_or(ConfigError::Value { key: "model", problem })
        };
        let names = match &self.model_name {
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
}

impl TryFrom<Settings> for Config {
    type Error = ConfigError;

    fn try_from(settings: Settings) -> Result<Self, ConfigError> {
        let models = settings.models()?;
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
            requests: above_0("max_requests", settings.max_requests.unwrap_or(4096))?,
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
mod tests {
    use baton_proto::config::parse_toml;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let settings: Settings = parse_toml(text, Path::new("c.toml"))?;
        settings.try_into()
    }

    #[test]
    fn every_key_is_a_flag_and_a_file_key() {
        let line = CommandLine::parse_from(["x", "--grpc", "127.0.0.1:0", "--model", "/m/a"]);
        let file: Settings = parse_toml(
            "grpc = '127.0.0.1:9'\nidentity = '/i'\nmax_wait_s = 1.5",
            Path::new("c.toml"),
        )
        .unwrap();
        let config: Config = line.settings.over(file).try_into().unwrap();
        assert_eq!(config.grpc.port(), 0, "flags win");
        assert_eq!(config.models, [("a".to_owned(), PathBuf::from("/m/a"))]);
        assert_eq!(config.options.placement.most_wait, Some(Duration::from_millis(1500)));
    }

    fn aliased(alias: &str) -> Result<Config, ConfigError> {
        parse(&format!("model = ['/m/large', '/m/small']\nidentity = '/i'\n[[aliases]]\n{alias}"))
    }

    #[test]
    fn an_alias_stands_for_several_models() {
        let config = aliased("name = 'chat'\nmodels = ['large', 'small']").unwrap();
        let [alias] = &config.aliases[..] else { panic!("{:?}", config.aliases) };
        assert_eq!((alias.prices.as_slice(), alias.target_ttft_ms), (&[1.0, 1.0][..], 2000.0));
        let cases = [
            ("name = 'large'\nmodels = ['small']", "aliases.name is \"large\", which"),
            ("name = 'a'\nmodels = []", "aliases.models of \"a\" is empty"),
            ("name = 'a'\nmodels = ['x']", "has \"x\", which is not served"),
            ("name = 'a'\nmodels = ['small']\nprices = []", "has 0 prices for 1 models"),
            ("name = 'a'\nmodels = ['small']\nprices = [0.0]", "has 0; it must be above 0"),
            ("name = 'a'\nmodels = ['small']\ntarget_ttft_ms = -1.0", "is -1; it must be"),
            ("name = 'a'\nmodel = []", "unknown key `model`; did you mean `models`?"),
        ];
        for (alias, message) in cases {
            let error = aliased(alias).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            ("modle = ['/m']", "c.toml:1:1: unknown key `modle`; did you mean `model`?"),
            ("identity = '/i'", "model is not set"),
            ("model = ['/m']", "identity is not set"),
            ("model = ['/m/a', '/n/a']", "model_name names \"a\" twice"),
            ("model = ['/m']\nmodel_name = []", "model_name has 0 names for 1 models"),
            ("model = ['/m']\nmax_requests = 0", "max_requests must be above 0"),
            ("model = ['/m']\nmax_wait_s = -1", "max_wait_s is -1; it must be above 0"),
            (
                "model = ['/m']\nidentity = '/i'\npeers = ['10.0.0.1']",
                "peers has \"10.0.0.1\", which is not HOST:PORT",
            ),
            (
                "model = ['/m']\nidentity = '/i'\ngrpc = '0.0.0.0:1'",
                "0.0.0.0:1 is open to other machines without encryption; set tls_cert and tls_key, \
                 listen on a loopback address, or set allow_plaintext = true",
            ),
            ("model = ['/m']\ntls_cert = '/c'", "tls_cert is set without tls_key"),
            ("model = ['/m']\ntls_client_ca = '/c'", "tls_client_ca is set without tls_cert"),
        ];
        for (text, message) in cases {
            assert_eq!(parse(text).unwrap_err().to_string(), message);
        }
    }
}
