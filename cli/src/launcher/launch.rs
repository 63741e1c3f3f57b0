//! Starting a cluster, process by process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use baton_identity::{ClusterCa, Part};
use baton_proto::wire::v1::cluster_client::ClusterClient;
use baton_proto::wire::v1::{GetStatusRequest, GetStatusResponse};

use super::error::{StartError, state_error};
use super::folders::{StateFile, StateProcess, bundled_model, daemon_folder, remove, state_folder};
use super::options::ClusterOptions;
use super::{Coordinator, coordinator_name};
use crate::process::{Life, Process};

/// How long everything together may take to start.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(1800);
/// How often a starting cluster is asked whether it is ready.
const STATUS_PAUSE: Duration = Duration::from_millis(20);

/// A cluster on its way up.
pub(super) struct Launch {
    options: ClusterOptions,
    model: PathBuf,
    daemons: PathBuf,
    ca: ClusterCa,
    pub(super) state: PathBuf,
    pub(super) temporary: Option<tempfile::TempDir>,
    /// Where nodes show their metrics.
    pub(super) metrics: Vec<SocketAddr>,
    pub(super) processes: Vec<Process>,
    pub(super) last_reason: String,
}

impl Launch {
    pub(super) fn prepare(options: ClusterOptions) -> Result<Self, StartError> {
        let model = match &options.model {
            Some(model) if model.join("config.json").is_file() => model.clone(),
            Some(model) => return Err(StartError::NoModel(model.clone())),
            None => bundled_model()?,
        };
        // A daemon runs wherever it likes.
        let model = model.canonicalize().map_err(state_error(&model))?;
        let (state, temporary) = state_folder(options.state.as_deref())?;
        let ca_folder = state.join("ca");
        remove(&ca_folder)?;
        let ca = ClusterCa::create(&ca_folder)?;
        let daemons = options.daemons.clone().unwrap_or_else(daemon_folder);
        Ok(Self {
            options,
            model,
            daemons,
            ca,
            state,
            temporary,
            processes: Vec::new(),
            metrics: Vec::new(),
            last_reason: "the daemons are starting".to_owned(),
        })
    }

    /// Starts everything and waits until it would serve.
    pub(super) async fn start(&mut self) -> Result<Vec<Coordinator>, StartError> {
        let mut coordinators = Vec::new();
        // Each is told where those before it are, which is enough for all to hear each other.
        let mut joins = Vec::new();
        for index in 0..self.options.coordinators as usize {
            let (coordinator, join) = self.start_coordinator(index, &joins).await?;
            coordinators.push(coordinator);
            joins.push(join);
        }
        for (role, daemon, count) in [
            ("prefill", "baton-prefill", self.options.prefill),
            ("decode", "baton-decode", self.options.decode),
        ] {
            for index in 0..count {
                let name = format!("{role}-{index}");
                let arguments = self.node_arguments(&name, &joins);
                self.spawn(daemon, &name, Part::Node, arguments)?;
            }
        }
        for index in coordinators.len()..self.processes.len() {
            let line = self.ready_line(index).await?;
            self.metrics.extend(address(&line, "metrics"));
        }
        for coordinator in &coordinators {
            self.served(coordinator.grpc).await?;
        }
        Ok(coordinators)
    }

    /// Starts coordinator number `index`; where it serves clients, and where nodes join it.
    async fn start_coordinator(
        &mut self,
        index: usize,
        peers: &[SocketAddr],
    ) -> Result<(Coordinator, SocketAddr), StartError> {
        let name = coordinator_name(index);
        let arguments = self.coordinator_arguments(index, peers);
        self.spawn("baton-coordinator", &name, Part::Coordinator, arguments)?;
        let line = self.ready_line(index).await?;
        let address = |key| {
            let (name, line) = (name.clone(), line.clone());
            address(&line, key).ok_or(StartError::ReadyLine { name, line })
        };
        let (cluster, grpc, http) = (address("cluster")?, address("grpc")?, address("http")?);
        Ok((Coordinator { grpc, http }, cluster))
    }

    fn coordinator_arguments(&self, index: usize, peers: &[SocketAddr]) -> Vec<String> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        // A given address is for the first.
        let given = |address: Option<SocketAddr>| address.filter(|_| index == 0).unwrap_or(any);
        let mut arguments = vec![
            "--cluster-listen".to_owned(),
            any.to_string(),
            "--grpc".to_owned(),
            given(self.options.grpc).to_string(),
            "--http".to_owned(),
            given(self.options.http).to_string(),
            "--model".to_owned(),
            self.model.display().to_string(),
        ];
        if !peers.is_empty() {
            arguments.extend(["--peers".to_owned(), list(peers)]);
        }
        push(&mut arguments, "--model-name", &self.model_name());
        push(&mut arguments, "--local-prefill", &self.options.local_prefill);
        push(&mut arguments, "--otlp-endpoint", &self.options.otlp_endpoint);
        arguments
    }

    fn model_name(&self) -> Option<String> {
        let folder = || Some(self.model.file_name()?.to_string_lossy().into_owned());
        self.options.model_name.clone().or_else(folder)
    }

    fn node_arguments(&self, name: &str, coordinators: &[SocketAddr]) -> Vec<String> {
        let options = &self.options;
        let nodes = (options.prefill + options.decode) as usize;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or((cores / nodes).max(1));
        let mut arguments = vec![
            "--model".to_owned(),
            self.model.display().to_string(),
            "--coordinator".to_owned(),
            list(coordinators),
            "--state".to_owned(),
            self.state.join(name).display().to_string(),
            "--threads".to_owned(),
            threads.to_string(),
            "--metrics-listen".to_owned(),
            "127.0.0.1:0".to_owned(),
        ];
        push(&mut arguments, "--model-name", &self.model_name());
        push(&mut arguments, "--load-format", &options.load_format);
        push(&mut arguments, "--weight-dtype", &options.weight_dtype);
        push(&mut arguments, "--block-tokens", &options.block_tokens);
        push(&mut arguments, "--kv-blocks", &options.kv_blocks);
        push(&mut arguments, "--kv-memory", &options.kv_memory);
        push(&mut arguments, "--kv-dtype", &options.kv_dtype);
        push(&mut arguments, "--device", &options.device);
        let libraries = options.cuda_libraries.as_ref().map(|folder| folder.display());
        push(&mut arguments, "--cuda-libraries", &libraries);
        push(&mut arguments, "--kv-transports", &options.kv_transports);
        push(&mut arguments, "--otlp-endpoint", &options.otlp_endpoint);
        push(&mut arguments, "--max-batch-tokens", &options.max_batch_tokens);
        push(&mut arguments, "--max-model-len", &options.max_model_len);
        arguments
    }

    /// Issues an identity and starts a daemon with it.
    fn spawn(
        &mut self,
        daemon: &str,
        name: &str,
        part: Part,
        arguments: Vec<String>,
    ) -> Result<(), StartError> {
        let folder = self.state.join(name);
        let identity = folder.join("identity");
        std::fs::create_dir_all(&folder).map_err(state_error(&folder))?;
        remove(&identity)?;
        let node = name.parse().expect("role and number make a node name");
        self.ca.issue(part, &node, &[], &identity)?;

        let program = self.daemons.join(daemon);
        let mut command = Command::new(&program);
        // What is set for this program is not meant for the daemons.
        for (key, _) in std::env::vars_os() {
            if key.to_str().is_some_and(|key| key.starts_with("BATON_") && key != "BATON_LOG") {
                command.env_remove(key);
            }
        }
        command.arg("--identity").arg(&identity).args(arguments);
        // Ctrl-C at a terminal goes to all processes of its group; here it is for this one.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let log = folder.join("log");
        let started = Process::start(name, command, &log, !self.options.quiet);
        self.processes.push(started.map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => StartError::NoDaemon(program),
            _ => StartError::State { path: program, source },
        })?);
        Ok(())
    }

    async fn ready_line(&mut self, index: usize) -> Result<String, StartError> {
        let process = &mut self.processes[index];
        match process.started().await {
            Life::Ready(line) => Ok(line),
            Life::Ended(status) => Err(failed(process, status)),
            Life::Starting => unreachable!("waited for"),
        }
    }

    /// Waits until a coordinator says that a request would be served, all nodes have joined and it
    /// hears the other coordinators.
    async fn served(&mut self, grpc: SocketAddr) -> Result<(), StartError> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{grpc}"))
            .expect("an address makes a URI");
        let mut client = ClusterClient::new(endpoint.connect_lazy());
        loop {
            match client.get_status(GetStatusRequest {}).await.map(tonic::Response::into_inner) {
                Ok(status) if self.all_joined(&status) => return Ok(()),
                Ok(status) => self.last_reason = reason(&status),
                Err(error) => self.last_reason = error.message().to_owned(),
            }
            let ended = self.processes.iter().find(|process| process.has_ended());
            if let Some(process) = ended {
                return Err(failed(process, process.ended().await));
            }
            tokio::time::sleep(STATUS_PAUSE).await;
        }
    }

    fn all_joined(&self, status: &GetStatusResponse) -> bool {
        status.ready
            && status.prefill_nodes >= self.options.prefill
            && status.decode_nodes >= self.options.decode
            && status.peers.len() + 1 >= self.options.coordinators as usize
    }

    /// Leaves `cluster.json` in the state folder.
    pub(super) fn write_state_file(&self, coordinators: &[Coordinator]) -> Result<(), StartError> {
        let processes = self.processes.iter();
        let processes = processes
            .map(|process| StateProcess { id: &process.name, pid: process.pid, log: &process.log })
            .collect();
        let Coordinator { grpc, http } = coordinators[0];
        StateFile { grpc, http, coordinators, processes }.write(&self.state)
    }
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn push(arguments: &mut Vec<String>, flag: &str, value: &Option<impl ToString>) {
    if let Some(value) = value {
        arguments.extend([flag.to_owned(), value.to_string()]);
    }
}

fn reason(status: &GetStatusResponse) -> String {
    let joined = format!("{} prefill, {} decode", status.prefill_nodes, status.decode_nodes);
    match status.reason.as_str() {
        "" => format!("joined nodes: {joined}"),
        reason => format!("{reason} (joined nodes: {joined})"),
    }
}

fn failed(process: &Process, status: ExitStatus) -> StartError {
    StartError::Ended { name: process.name.clone(), status, log_tail: process.log_tail() }
}

/// The value of `key=ADDR` in a ready line.
fn address(line: &str, key: &str) -> Option<SocketAddr> {
    let value = line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    value?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    #[test]
    fn ready_lines_name_addresses() {
        let line = "ready cluster=127.0.0.1:1 grpc=127.0.0.1:2 http=[::1]:3";
        assert_eq!(address(line, "cluster"), "127.0.0.1:1".parse().ok());
        assert_eq!(address(line, "http"), "[::1]:3".parse().ok());
        assert_eq!(address(line, "metrics"), None);
        assert_eq!(address("ready grpc=x", "grpc"), None);
    }

    /// Options for a model folder in `folder`, with daemons that are shell scripts.
    fn options(folder: &Path, coordinator: Option<&str>) -> ClusterOptions {
        std::fs::write(folder.join("config.json"), "{}").expect("writable");
        if let Some(script) = coordinator {
            let program = folder.join("baton-coordinator");
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("writable");
            let mode = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(&program, mode).expect("its owner may");
        }
        ClusterOptions {
            model: Some(folder.to_owned()),
            daemons: Some(folder.to_owned()),
            state: Some(folder.join("state")),
            quiet: true,
            ..ClusterOptions::default()
        }
    }

    async fn error(coordinator: Option<&str>) -> String {
        let folder = tempfile::tempdir().expect("a folder");
        let mut launch =
            Launch::prepare(options(folder.path(), coordinator)).expect("all is there");
        launch.start().await.expect_err("no coordinator").to_string()
    }

    #[tokio::test]
    async fn failures_name_their_remedy() {
        let missing = error(None).await;
        assert!(missing.contains("baton-coordinator is not found; build or"), "{missing}");
        let failing = error(Some("echo no such model >&2; exit 2")).await;
        assert_eq!(failing, "coordinator did not start (exit status: 2): no such model");
        let strange = error(Some("echo ready at last; exec sleep 1000")).await;
        assert!(strange.contains("\"ready at last\""), "{strange}");
    }

    #[tokio::test]
    async fn daemons_get_an_identity_and_no_settings_of_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let script = "echo \"$@\"; env | grep BATON_; echo end; exit 1";
        // A second start in the same folder makes everything anew.
        for _ in 0..2 {
            let options = options(folder.path(), Some(script));
            let mut launch = Launch::prepare(options).expect("all is there");
            let error = format!("{:?}", launch.start().await.expect_err("it exits"));
            let identity = folder.path().join("state/coordinator/identity");
            assert!(error.contains(&format!("--identity {}", identity.display())), "{error}");
            baton_identity::Identity::load(&identity).expect("a whole identity");
        }
    }
}
