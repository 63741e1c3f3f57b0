//! What a node's operator can set: flags win over `BATON_*` variables, which win over the file.

use std::path::{Path, PathBuf};

use baton_proto::config::load_toml;
use baton_proto::ids::Role;
use clap::{Args, CommandFactory, FromArgMatches, Parser};
use serde::Deserialize;

use crate::config::ConfigError;

/// Every key as it was given. In the file a key has `_` where its flag has `-`.
#[derive(Args, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Folder of the model: config.json, *.safetensors. Required.
    #[arg(long, env = "BATON_MODEL", value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Name that clients use for the model. Default: the folder's name.
    #[arg(long, env = "BATON_MODEL_NAME", value_name = "NAME")]
    pub model_name: Option<String>,
    /// `safetensors`, or `dummy` for made-up weights (only config.json is read). Default: safetensors.
    #[arg(long, env = "BATON_LOAD_FORMAT", value_name = "FORMAT")]
    pub load_format: Option<String>,
    /// What the matrices of layers are multiplied as: `auto` for the checkpoint's type (bf16 on a GPU), or
    /// `fp8` for e4m3 with a scale for each output channel, rounded as they are loaded, on Hopper GPUs; the
    /// same on all nodes of a model. Default: auto.
    #[arg(long, env = "BATON_WEIGHT_DTYPE", value_name = "TYPE")]
    pub weight_dtype: Option<String>,
    /// Tokens of a KV block: 16, 32 or 64; the same on all nodes of a model. Default: 16.
    #[arg(long, env = "BATON_BLOCK_TOKENS", value_name = "N")]
    pub block_tokens: Option<u32>,
    /// Size of the KV cache in blocks. Default: what fits into kv-memory.
    #[arg(long, env = "BATON_KV_BLOCKS", value_name = "N")]
    pub kv_blocks: Option<u64>,
    /// Size of the KV cache in bytes, e.g. 512MiB or 4GiB, or as a share of a GPU's memory that the
    /// model leaves, e.g. 80%; not together with kv-blocks. Default: 1GiB, on a GPU 90%.
    #[arg(long, env = "BATON_KV_MEMORY", value_name = "SIZE")]
    pub kv_memory: Option<String>,
    /// Element type of the KV cache: f32, bf16 or f16, on a GPU bf16 or fp8 (e4m3 without a scale: half
    /// of the memory, and values beyond 448 are cut off); the same on all nodes of a model. Default:
    /// the type of the weights, on a GPU bf16.
    #[arg(long, env = "BATON_KV_DTYPE", value_name = "TYPE")]
    pub kv_dtype: Option<String>,
    /// Most tokens computed in one step. Default: 512, on a GPU 8192.
    #[arg(long, env = "BATON_MAX_BATCH_TOKENS", value_name = "N")]
    pub max_batch_tokens: Option<usize>,
    /// Most sequences computed at a time. Default: 64, on a GPU 256.
    #[arg(long, env = "BATON_MAX_SEQUENCES", value_name = "N")]
    pub max_sequences: Option<usize>,
    /// Most sequences that wait; further ones are refused. Default: 1024.
    #[arg(long, env = "BATON_MAX_WAITING", value_name = "N")]
    pub max_waiting: Option<usize>,
    /// Most tokens of a sequence, prompt and output. Default: the model's own limit.
    #[arg(long, env = "BATON_MAX_MODEL_LEN", value_name = "N")]
    pub max_model_len: Option<usize>,
    /// What computes: `cpu`, `cuda` or `cuda:N` for a GPU, `cuda:N,M` and so on for several that
    /// share the model's heads equally (which takes NCCL), or `auto` for the first GPU if there is
    /// one that serves the model, else the CPU. Default: auto.
    #[arg(long, env = "BATON_DEVICE", value_name = "DEVICE")]
    pub device: Option<String>,
    /// Folder with the libraries of CUDA, libcublasLt.so.13 above all. Default: those that the
    /// system's loader finds, then those of the active Python environment.
    #[arg(long, env = "BATON_CUDA_LIBRARIES", value_name = "DIR")]
    pub cuda_libraries: Option<PathBuf>,
    /// Threads that compute, or read the weights for a GPU. Default: one per CPU core.
    #[arg(long, env = "BATON_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Where KV transfers are received, over UDP; port 0 takes a free one. Default: 127.0.0.1:0.
    #[arg(long, env = "BATON_KV_LISTEN", value_name = "ADDR")]
    pub kv_listen: Option<String>,
    /// Host, or host:port, under which other nodes reach kv-listen. Default: kv-listen itself.
    #[arg(long, env = "BATON_KV_ADVERTISE", value_name = "HOST[:PORT]")]
    pub kv_advertise: Option<String>,
    /// How KV may travel, the best that both ends have: `ipc`, by which GPU nodes of one machine read
    /// each other's memory, else `nccl`, from GPU to GPU over NVLink or the network, else `quic`, which
    /// is always needed. What `nccl` carries is neither encrypted nor authenticated: only for networks
    /// that nobody else reaches. Default: quic,ipc.
    #[arg(long, env = "BATON_KV_TRANSPORTS", value_name = "NAMES", value_delimiter = ',')]
    pub kv_transports: Option<Vec<String>>,
    /// A coordinator's cluster address; give all of them. At least one is required.
    #[arg(long, env = "BATON_COORDINATOR", value_name = "HOST:PORT", value_delimiter = ',')]
    pub coordinator: Option<Vec<String>>,
    /// Folder of this node's certificate and key, from `baton certs issue`. Required.
    #[arg(long, env = "BATON_IDENTITY", value_name = "DIR")]
    pub identity: Option<PathBuf>,
    /// Folder in which the node remembers its epoch. Default: none, epochs follow the clock.
    #[arg(long, env = "BATON_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Where Prometheus metrics are served as plain HTTP, e.g. 127.0.0.1:9100. Default: nowhere.
    #[arg(long, env = "BATON_METRICS_LISTEN", value_name = "ADDR")]
    pub metrics_listen: Option<String>,
    /// What an hour of this node costs relative to the other nodes; above 0, at most 1000000. Default: 1.
    #[arg(long, env = "BATON_PRICE", value_name = "N")]
    pub price: Option<f64>,
    /// What is logged to standard error, e.g. `info` or `info,baton_node=debug`. Default: info.
    #[arg(long, env = "BATON_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// `text`, `json`, or `journal` for systemd's journal with its fields. Default: journal under
    /// systemd, else text.
    #[arg(long, env = "BATON_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Where traces are sent, as OTLP over gRPC, e.g. http://127.0.0.1:4317. Of a request that its
    /// coordinator traces, the node's part is. Default: nowhere.
    #[arg(long, env = "BATON_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Seconds that running requests get to finish after SIGTERM. Default: 60.
    #[arg(long, env = "BATON_DRAIN_TIMEOUT_S", value_name = "SECONDS")]
    pub drain_timeout_s: Option<u64>,
}

#[derive(Parser)]
#[command(version, disable_help_subcommand = true)]
struct CommandLine {
    /// TOML file with any of the keys below.
    #[arg(long, env = "BATON_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// The command line of the daemon that begins in `role`, as its manual page shows it.
#[must_use]
pub fn command(role: Role) -> clap::Command {
    let (name, about) = match role {
        Role::Prefill => {
            ("baton-prefill", "Computes prompts and streams their KV cache to decode nodes")
        }
        Role::Decode => ("baton-decode", "Takes KV caches from prefill nodes and generates tokens"),
    };
    CommandLine::command().name(name).about(about)
}

impl Settings {
    /// Reads the process's flags and environment and the file that they name. Bad flags end the
    /// process with status 2, as clap does.
    pub fn from_process(role: Role) -> Result<Self, ConfigError> {
        let mut matches = command(role).get_matches();
        let line = CommandLine::from_arg_matches_mut(&mut matches)
            .expect("the matches come from the same definition");
        match line.config {
            Some(file) => Ok(line.settings.over(Self::from_file(&file)?)),
            None => Ok(line.settings),
        }
    }

    /// Reads a configuration file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        Ok(load_toml(path)?)
    }

    /// These settings, completed by `other` where they say nothing.
    #[must_use]
    pub fn over(self, other: Self) -> Self {
        Self {
            model: self.model.or(other.model),
            model_name: self.model_name.or(other.model_name),
            load_format: self.load_format.or(other.load_format),
            weight_dtype: self.weight_dtype.or(other.weight_dtype),
            block_tokens: self.block_tokens.or(other.block_tokens),
            kv_blocks: self.kv_blocks.or(other.kv_blocks),
            kv_memory: self.kv_memory.or(other.kv_memory),
            kv_dtype: self.kv_dtype.or(other.kv_dtype),
            max_batch_tokens: self.max_batch_tokens.or(other.max_batch_tokens),
            max_sequences: self.max_sequences.or(other.max_sequences),
            max_waiting: self.max_waiting.or(other.max_waiting),
            max_model_len: self.max_model_len.or(other.max_model_len),
            device: self.device.or(other.device),
            cuda_libraries: self.cuda_libraries.or(other.cuda_libraries),
            threads: self.threads.or(other.threads),
            kv_listen: self.kv_listen.or(other.kv_listen),
            kv_advertise: self.kv_advertise.or(other.kv_advertise),
            kv_transports: self.kv_transports.or(other.kv_transports),
            coordinator: self.coordinator.or(other.coordinator),
            identity: self.identity.or(other.identity),
            state: self.state.or(other.state),
            metrics_listen: self.metrics_listen.or(other.metrics_listen),
            price: self.price.or(other.price),
            log: self.log.or(other.log),
            log_format: self.log_format.or(other.log_format),
            otlp_endpoint: self.otlp_endpoint.or(other.otlp_endpoint),
            drain_timeout_s: self.drain_timeout_s.or(other.drain_timeout_s),
        }
    }
}
