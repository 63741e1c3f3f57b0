//! A node's configuration, checked and complete.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use baton_engine::gpu::WeightDtype;
use baton_kvtransfer::Transport;
use baton_kvtransfer::limits::MAX_PENDING_OFFERS_PER_PEER;
use baton_proto::geometry::KvDtype;
use baton_proto::message::MAX_PRICE;
use baton_telemetry::LogFormat;

use crate::settings::Settings;

/// Why a node cannot start as configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] baton_proto::config::ConfigError),
    /// A required key is absent.
    #[error("{0} is not set; give --{flag}, or {0} in the configuration file", flag = .0.replace('_', "-"))]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{key} is {value:?}; it must be {expected}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
}

/// Where the weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint's `*.safetensors`.
    Safetensors,
    /// Made up, the same on every node.
    Dummy,
}

/// What computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// The GPUs of these numbers, together.
    Cuda(Vec<usize>),
    /// A GPU if there is one that serves the model, else the CPU.
    Auto,
}

/// How large the KV cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSize {
    /// So many blocks.
    Blocks(u64),
    /// As many blocks as fit into so many bytes.
    Bytes(u64),
    /// As many blocks as fit into so many hundredths of the memory that is left.
    Percent(u8),
}

impl KvSize {
    /// The number of blocks, each of `block_bytes` bytes, where `free_bytes` are left; at least 1.
    #[must_use]
    pub fn blocks(self, block_bytes: usize, free_bytes: u64) -> usize {
        let fit = |bytes: u64| bytes / block_bytes.max(1) as u64;
        let blocks = match self {
            Self::Blocks(blocks) => blocks,
            Self::Bytes(bytes) => fit(bytes),
            Self::Percent(percent) => fit(free_bytes / 100 * u64::from(percent)),
        };
        usize::try_from(blocks).unwrap_or(usize::MAX).max(1)
    }
}

/// A complete configuration. The meaning of each key is documented at [`Settings`].
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "`Settings` documents every key")]
pub struct Config {
    pub model: PathBuf,
    pub model_name: String,
    pub load_format: LoadFormat,
    pub weight_dtype: WeightDtype,
    pub block_tokens: u32,
    pub kv_size: Option<KvSize>,
    pub kv_dtype: Option<KvDtype>,
    pub max_batch_tokens: Option<usize>,
    pub max_sequences: Option<usize>,
    pub max_waiting: usize,
    pub max_model_len: Option<usize>,
    pub device: DeviceChoice,
    pub cuda_libraries: Option<PathBuf>,
    pub threads: usize,
    pub kv_listen: SocketAddr,
    pub kv_advertise: Option<String>,
    pub kv_transports: Vec<Transport>,
    pub coordinators: Vec<String>,
    pub identity: PathBuf,
    pub state: Option<PathBuf>,
    pub metrics_listen: Option<SocketAddr>,
    pub price: f64,
    pub log: String,
    pub log_format: Option<LogFormat>,
    pub otlp_endpoint: Option<String>,
    pub drain_timeout: Duration,
}

impl TryFrom<Settings> for Config {
    type Error = ConfigError;

    fn try_from(given: Settings) -> Result<Self, ConfigError> {
        let model = given.model.ok_or(ConfigError::Missing("model"))?;
        let listen = given.kv_listen.as_deref().unwrap_or("127.0.0.1:0");
        let kv_listen = socket_address("kv_listen", listen)?;
        if kv_listen.ip().is_unspecified() && given.kv_advertise.is_none() {
            let expected = "an address that other nodes reach, or kv_advertise must be set";
            return invalid("kv_listen", listen, expected);
        }
        let metrics = given.metrics_listen.as_deref();
        Ok(Self {
            model_name: model_name(given.model_name, &model)?,
            load_format: load_format(given.load_format.as_deref())?,
            weight_dtype: weight_dtype(given.weight_dtype.as_deref())?,
            block_tokens: block_tokens(given.block_tokens)?,
            kv_size: kv_size(given.kv_blocks, given.kv_memory.as_deref())?,
            kv_dtype: given.kv_dtype.as_deref().map(kv_dtype).transpose()?,
            max_batch_tokens: not_zero("max_batch_tokens", given.max_batch_tokens)?,
            max_sequences: not_zero("max_sequences", given.max_sequences)?,
            max_waiting: max_waiting(given.max_waiting)?,
            max_model_len: given.max_model_len,
            device: device(given.device.as_deref())?,
            cuda_libraries: given.cuda_libraries,
            threads: not_zero("threads", given.threads)?.unwrap_or_else(cores),
            kv_listen,
            kv_advertise: given.kv_advertise,
            kv_transports: kv_transports(given.kv_transports)?,
            coordinators: coordinators(given.coordinator)?,
            identity: given.identity.ok_or(ConfigError::Missing("identity"))?,
            state: given.state,
            metrics_listen: metrics
                .map(|text| socket_address("metrics_listen", text))
                .transpose()?,
            price: price(given.price)?,
            log: given.log.unwrap_or_else(|| "info".to_owned()),
            log_format: given.log_format.as_deref().map(log_format).transpose()?,
            otlp_endpoint: given.otlp_endpoint,
            drain_timeout: Duration::from_secs(given.drain_timeout_s.unwrap_or(60)),
            model,
        })
    }
}

impl Config {
    /// What other nodes dial, given where the KV endpoint is bound.
    #[must_use]
    pub fn kv_address(&self, bound: SocketAddr) -> String {
        match &self.kv_advertise {
            None => bound.to_string(),
            Some(address) if has_port(address) => address.clone(),
            Some(host) => format!("{host}:{}", bound.port()),
        }
    }
}

fn invalid<T>(
    key: &'static str,
    value: impl ToString,
    expected: &'static str,
) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid { key, value: value.to_string(), expected })
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn not_zero(key: &'static str, value: Option<usize>) -> Result<Option<usize>, ConfigError> {
    if value == Some(0) { invalid(key, 0, "at least 1") } else { Ok(value) }
}

/// Every waiting request of a decode node may have an offer waiting at its KV endpoint.
fn max_waiting(value: Option<usize>) -> Result<usize, ConfigError> {
    match not_zero("max_waiting", value)?.unwrap_or(1024) {
        value if value > MAX_PENDING_OFFERS_PER_PEER => {
            invalid("max_waiting", value, "at most 2048")
        }
        value => Ok(value),
    }
}

fn kv_transports(given: Option<Vec<String>>) -> Result<Vec<Transport>, ConfigError> {
    // NCCL's bytes are not encrypted: it has to be asked for.
    let Some(names) = given else { return Ok(vec![Transport::Ipc, Transport::Quic]) };
    let named = |name: &String| Transport::ALL.into_iter().find(|one| one.name() == name);
    match names.iter().map(named).collect::<Option<Vec<_>>>() {
        Some(transports) if transports.contains(&Transport::Quic) => Ok(transports),
        _ => invalid("kv_transports", names.join(","), "quic, alone or with ipc and nccl"),
    }
}

fn price(value: Option<f64>) -> Result<f64, ConfigError> {
    match value.unwrap_or(1.0) {
        price if price > 0.0 && price <= MAX_PRICE => Ok(price),
        other => invalid("price", other, "above 0, at most 1000000"),
    }
}

fn model_name(given: Option<String>, model: &std::path::Path) -> Result<String, ConfigError> {
    // `.` and `dir/..` have no last name of their own.
    let folder = || Some(model.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned());
    let name = given.or_else(folder).unwrap_or_else(|| "model".to_owned());
    if name.is_empty() || name.len() > 256 {
        return invalid("model_name", name, "1 to 256 bytes long");
    }
    Ok(name)
}

fn load_format(value: Option<&str>) -> Result<LoadFormat, ConfigError> {
    match value {
        None | Some("safetensors") => Ok(LoadFormat::Safetensors),
        Some("dummy") => Ok(LoadFormat::Dummy),
        Some(other) => invalid("load_format", other, "safetensors or dummy"),
    }
}

fn log_format(name: &str) -> Result<LogFormat, ConfigError> {
    name.parse().or_else(|_| invalid("log_format", name, "text, json or journal"))
}

fn weight_dtype(value: Option<&str>) -> Result<WeightDtype, ConfigError> {
    match value {
        None | Some("auto") => Ok(WeightDtype::Bf16),
        Some("fp8") => Ok(WeightDtype::Fp8),
        Some(other) => invalid("weight_dtype", other, "auto or fp8"),
    }
}

fn block_tokens(value: Option<u32>) -> Result<u32, ConfigError> {
    match value.unwrap_or(16) {
        tokens @ (16 | 32 | 64) => Ok(tokens),
        other => invalid("block_tokens", other, "16, 32 or 64"),
    }
}

fn device(value: Option<&str>) -> Result<DeviceChoice, ConfigError> {
    let choice = match value.unwrap_or("auto") {
        "auto" => Some(DeviceChoice::Auto),
        "cpu" => Some(DeviceChoice::Cpu),
        "cuda" => Some(DeviceChoice::Cuda(vec![0])),
        other => other.strip_prefix("cuda:").and_then(ordinals).map(DeviceChoice::Cuda),
    };
    let given = value.unwrap_or_default();
    choice.map_or_else(|| invalid("device", given, "cpu, cuda, cuda:N, cuda:N,M,... or auto"), Ok)
}

/// Numbers of different GPUs.
fn ordinals(text: &str) -> Option<Vec<usize>> {
    let all: Vec<usize> = text.split(',').map(|n| n.trim().parse().ok()).collect::<Option<_>>()?;
    let distinct = all.iter().collect::<std::collections::BTreeSet<_>>().len() == all.len();
    distinct.then_some(all)
}

fn kv_size(blocks: Option<u64>, memory: Option<&str>) -> Result<Option<KvSize>, ConfigError> {
    match (blocks, memory) {
        (Some(_), Some(memory)) => invalid("kv_memory", memory, "absent when kv_blocks is set"),
        (Some(0), None) => invalid("kv_blocks", 0, "at least 1"),
        (Some(blocks), None) => Ok(Some(KvSize::Blocks(blocks))),
        (None, None) => Ok(None),
        (None, Some(text)) => match kv_memory(text) {
            Some(size) => Ok(Some(size)),
            None => invalid("kv_memory", text, "a size such as 512MiB or 4GiB, or 1% to 100%"),
        },
    }
}

fn kv_memory(text: &str) -> Option<KvSize> {
    if let Some(percent) = text.strip_suffix('%') {
        let percent = percent.trim().parse().ok();
        return percent.filter(|percent| (1..=100).contains(percent)).map(KvSize::Percent);
    }
    parse_size(text).filter(|bytes| *bytes > 0).map(KvSize::Bytes)
}

fn kv_dtype(text: &str) -> Result<KvDtype, ConfigError> {
    KvDtype::parse(text).map_or_else(|| invalid("kv_dtype", text, "f32, bf16, f16 or fp8"), Ok)
}

fn parse_size(text: &str) -> Option<u64> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let unit = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    number.trim().parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn socket_address(key: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().or_else(|_| invalid(key, text, "an IP address and a port, such as 127.0.0.1:0"))
}

fn has_port(address: &str) -> bool {
    // A bare IPv6 address has colons, but no port.
    let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>().is_ok());
    port.unwrap_or(false) && address.parse::<IpAddr>().is_err()
}

fn coordinators(given: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let given = given.unwrap_or_default();
    if let Some(address) = given.iter().find(|address| !has_port(address)) {
        return invalid("coordinator", address, "HOST:PORT");
    }
    if given.is_empty() {
        return Err(ConfigError::Missing("coordinator"));
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use baton_proto::config::parse_toml;
    use clap::Args;

    use super::*;

    fn settings(toml: &str) -> Settings {
        parse_toml(toml, Path::new("node.toml")).expect("legal")
    }

    fn given(toml: &str) -> Result<Config, String> {
        let rest = "model='m'\nidentity='i'\ncoordinator=['a:1']";
        Config::try_from(settings(&format!("{rest}\n{toml}"))).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = settings("threads = 4\nkv_blocks = 9");
        let flags = Settings { threads: Some(2), ..Settings::default() };
        let both = flags.over(file);
        assert_eq!((both.threads, both.kv_blocks), (Some(2), Some(9)));
    }

    #[test]
    fn every_key_is_merged() {
        // A key that `over` forgot would be lost here.
        let text = "model='m'\nmodel_name='n'\nload_format='dummy'\nweight_dtype='fp8'\nblock_tokens=32\nkv_blocks=1
            kv_memory='1'\nkv_dtype='f16'\ndevice='cpu'\ncuda_libraries='c'\nmax_batch_tokens=1\nmax_sequences=1\nmax_waiting=1\nmax_model_len=1
            threads=1\nkv_listen='l'\nkv_advertise='a'\nkv_transports=['quic']\ncoordinator=['c']\nidentity='i'\nstate='s'
            metrics_listen='m'\nprice=2.5\nlog='debug'\nlog_format='json'\notlp_endpoint='o'\ndrain_timeout_s=1";
        let keys = Settings::augment_args(clap::Command::new("")).get_arguments().count();
        assert_eq!(text.matches('=').count(), keys, "the text names every key");
        let all = settings(text);
        assert_eq!(Settings::default().over(all.clone()), all);
        assert_eq!(all.clone().over(Settings::default()), all);
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        let result = parse_toml::<Settings>("kv_block = 3", Path::new("node.toml"));
        let message = result.expect_err("unknown").to_string();
        assert!(message.ends_with("did you mean `kv_blocks`?"), "{message}");
    }

    #[test]
    fn bad_values_are_named() {
        let cases = [
            ("block_tokens = 17", "block_tokens is \"17\"; it must be 16, 32 or 64"),
            ("kv_memory = '4GB'", "kv_memory is \"4GB\"; it must be a size such as 512MiB or 4GiB"),
            ("kv_memory = '101%'", "kv_memory is \"101%\"; it must be a size"),
            ("device = 'cuda:x'", "device is \"cuda:x\"; it must be cpu, cuda, cuda:N, cuda:N,M"),
            ("device = 'cuda:1,0,1'", "device is \"cuda:1,0,1\"; it must be cpu"),
            ("kv_memory = '1GiB'\nkv_blocks = 2", "it must be absent when kv_blocks is set"),
            ("kv_listen = '0.0.0.0:7000'", "or kv_advertise must be set"),
            ("load_format = 'pickle'", "it must be safetensors or dummy"),
            ("weight_dtype = 'int8'", "weight_dtype is \"int8\"; it must be auto or fp8"),
            ("kv_dtype = 'f8'", "it must be f32, bf16, f16 or fp8"),
            (
                "kv_transports = ['ipc']",
                "kv_transports is \"ipc\"; it must be quic, alone or with ipc and nccl",
            ),
            (
                "kv_transports = ['quic', 'tcp']",
                "kv_transports is \"quic,tcp\"; it must be quic, alone or with ipc and nccl",
            ),
            ("price = 0.0", "price is \"0\"; it must be above 0, at most 1000000"),
            ("price = 1000001", "price is \"1000001\"; it must be above 0, at most 1000000"),
            ("price = nan", "price is \"NaN\"; it must be above 0, at most 1000000"),
            ("threads = 0", "threads is \"0\"; it must be at least 1"),
        ];
        for (toml, message) in cases {
            let error = given(toml).expect_err(toml);
            assert!(error.contains(message), "{error}");
        }
        let missing = Config::try_from(Settings::default()).expect_err("empty").to_string();
        assert!(missing.contains("--model"), "{missing}");
    }

    #[test]
    fn what_is_not_encrypted_has_to_be_asked_for() {
        let by_default = given("").expect("legal").kv_transports;
        assert!(!by_default.contains(&Transport::Nccl));
        let asked = given("kv_transports = ['quic', 'nccl']").expect("legal").kv_transports;
        assert_eq!(asked, [Transport::Quic, Transport::Nccl]);
    }

    #[test]
    fn sizes_and_addresses() {
        assert_eq!(parse_size("3KiB"), Some(3072));
        assert_eq!(parse_size("99999999TiB"), None);
        assert_eq!(KvSize::Bytes(100).blocks(30, 0), 3);
        assert_eq!(KvSize::Percent(50).blocks(30, 1000), 16);
        let config = given("kv_listen = '0.0.0.0:0'\nkv_advertise = 'node-7'").expect("legal");
        let bound = "0.0.0.0:7100".parse().expect("legal");
        assert_eq!(config.kv_address(bound), "node-7:7100");
        assert!(coordinators(Some(vec!["no-port".to_owned()])).is_err());
    }
}
