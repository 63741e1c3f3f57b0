//! What a cluster on this machine consists of.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, FromArgMatches};

/// Most nodes of a role: more is a slip of the finger on one machine, and would bring it down.
const MAX_NODES: i64 = 64;

/// What to run. The default is one coordinator, one prefill and one decode node with the bundled demo model.
#[derive(Args, Clone, Debug)]
pub struct ClusterOptions {
    /// Folder of the model [default: the bundled demo model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Coordinators side by side, each of which serves every request
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub coordinators: u32,
    /// Prefill nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=MAX_NODES))]
    pub prefill: u32,
    /// Decode nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_NODES))]
    pub decode: u32,
    /// Where the HTTP API of the first coordinator listens [default: a free loopback port]
    #[arg(long, value_name = "ADDR")]
    pub http: Option<SocketAddr>,
    /// Where the gRPC API of the first coordinator listens [default: a free loopback port]
    #[arg(long, value_name = "ADDR")]
    pub grpc: Option<SocketAddr>,
    /// Folder for certificates, logs and cluster.json [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Name that clients use for the model [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// `safetensors`, or `dummy` for made-up weights [default: safetensors]
    #[arg(long, value_name = "FORMAT")]
    pub load_format: Option<String>,
    /// What matrices are multiplied as: `auto`, or `fp8` on Hopper GPUs [default: auto]
    #[arg(long, value_name = "TYPE")]
    pub weight_dtype: Option<String>,
    /// Tokens of a KV block: 16, 32 or 64 [default: 16]
    #[arg(long, value_name = "N")]
    pub block_tokens: Option<u32>,
    /// KV blocks of each node
    #[arg(long, value_name = "N")]
    pub kv_blocks: Option<u64>,
    /// KV memory of each node, such as 4GiB, or 40% of what the model leaves of a GPU that two nodes share [default: 1GiB, on a GPU 90%]
    #[arg(long, value_name = "SIZE", conflicts_with = "kv_blocks")]
    pub kv_memory: Option<String>,
    /// Element type of the KV cache: `f32`, `bf16`, `f16`, or on a GPU `bf16` or `fp8` [default: that of the weights]
    #[arg(long, value_name = "TYPE")]
    pub kv_dtype: Option<String>,
    /// What nodes compute on: `cpu`, `cuda`, `cuda:N` or `auto` [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Folder with the libraries of CUDA
    #[arg(long, value_name = "DIR")]
    pub cuda_libraries: Option<PathBuf>,
    /// How KV may travel between nodes: `quic`, alone or with `ipc` and `nccl` [default: quic,ipc]
    #[arg(long, value_name = "NAMES")]
    pub kv_transports: Option<String>,
    /// Most tokens that a node computes in one step
    #[arg(long, value_name = "N")]
    pub max_batch_tokens: Option<u32>,
    /// Most tokens of a sequence, prompt and output
    #[arg(long, value_name = "N")]
    pub max_model_len: Option<u32>,
    /// Compute threads of each node [default: the machine's cores, divided among the nodes]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// When decode nodes compute prompts themselves: `auto`, when that is cheaper, or `never` [default: auto]
    #[arg(long, value_name = "WHEN")]
    pub local_prefill: Option<String>,
    /// Where all daemons send their traces, as OTLP over gRPC, e.g. http://127.0.0.1:4317
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Folder of the daemons [default: the folder of this program]
    #[arg(long, value_name = "DIR")]
    pub daemons: Option<PathBuf>,
    /// Show no progress on standard error
    #[arg(long)]
    pub quiet: bool,
}

impl Default for ClusterOptions {
    /// What an empty command line means.
    fn default() -> Self {
        let command = Self::augment_args(clap::Command::new("up"));
        let matches = command.try_get_matches_from(["up"]).expect("no flag is required");
        Self::from_arg_matches(&matches).expect("the matches come from the same definition")
    }
}
