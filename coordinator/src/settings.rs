//! What a coordinator's operator can set: flags win over `BATON_*` variables, which win over the
//! file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use baton_proto::config::load_toml;
use clap::{Args, CommandFactory, Parser};
use serde::Deserialize;

use crate::config::ConfigError;
use crate::placement::LocalPrefill;

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
    /// Most bytes of the bodies of all requests that are read or parsed at a time, as received: parsed
    /// they take up to a few times as much memory. At least 16777216; further requests are refused.
    /// Default: 268435456 (256 MiB).
    #[arg(long, env = "BATON_MAX_BODIES_BYTES", value_name = "N")]
    pub max_bodies_bytes: Option<usize>,
    /// HTTP status of requests that are refused because the cluster has all it can take: 529, 503 or 429,
    /// for clients and proxies that know no 529. Default: 529.
    #[arg(long, env = "BATON_OVERLOAD_STATUS", value_name = "STATUS")]
    pub overload_status: Option<u16>,
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
    /// Most requests at a time, at most 1048576; further ones are refused. Default: 4096.
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

/// The daemon's command line, as its manual page shows it.
#[must_use]
pub fn command() -> clap::Command {
    CommandLine::command()
}

impl Settings {
    /// Reads the process's flags and environment and the file that they name. Bad flags end the
    /// process with status 2, as clap does.
    pub fn from_process() -> Result<Self, ConfigError> {
        let line = CommandLine::parse();
        let file = line.config.as_deref().map(Self::from_file).transpose()?;
        Ok(line.settings.over(file.unwrap_or_default()))
    }

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
            max_bodies_bytes: self.max_bodies_bytes.or(other.max_bodies_bytes),
            overload_status: self.overload_status.or(other.overload_status),
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
}

#[cfg(test)]
mod tests {
    use baton_proto::config::parse_toml;

    use super::*;

    #[test]
    fn every_key_is_a_flag_and_a_file_key() {
        let line = CommandLine::parse_from(["x", "--grpc", "127.0.0.1:0", "--model", "/m/a"]);
        let file = "grpc = '127.0.0.1:9'\nidentity = '/i'\nmax_wait_s = 1.5";
        let settings = line.settings.over(parse_toml(file, Path::new("c.toml")).unwrap());
        assert_eq!(settings.grpc.unwrap().port(), 0, "flags win");
        assert_eq!(settings.model, Some(vec![PathBuf::from("/m/a")]));
        assert_eq!((settings.identity, settings.max_wait_s), (Some("/i".into()), Some(1.5)));
    }
}
