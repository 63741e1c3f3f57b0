//! A cluster on this machine: a fresh certificate authority, coordinators and nodes, each its own
//! process of the real daemons, on loopback ports that the system chooses.

mod error;
mod folders;
mod launch;
mod options;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitStatus;
use std::task::Poll;
use std::time::Duration;

pub use error::StartError;
pub use folders::bundled_model;
pub use options::ClusterOptions;

use crate::process::Process;
use launch::{Launch, START_TIMEOUT};

/// How long daemons that are told to stop may take.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a coordinator serves clients.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Coordinator {
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP.
    pub http: SocketAddr,
}

/// `coordinator`, `coordinator-1`, `coordinator-2`, …
fn coordinator_name(index: usize) -> String {
    match index {
        0 => "coordinator".to_owned(),
        more => format!("coordinator-{more}"),
    }
}

/// A daemon that ended.
#[derive(Debug)]
pub struct Ended {
    /// Its name.
    pub name: String,
    /// It was the last coordinator: nothing is served any more.
    pub ends_service: bool,
    /// How it ended.
    pub status: ExitStatus,
    /// The end of its log.
    pub log_tail: String,
}

/// A running cluster. Its processes are killed when it is dropped, and when this process ends in
/// any way, so that none outlives it.
pub struct Cluster {
    /// At least one.
    coordinators: Vec<Coordinator>,
    /// The coordinators first.
    processes: Vec<Process>,
    metrics: Vec<SocketAddr>,
    /// Names of those whose end [`Cluster::next_end`] has told.
    told: Vec<String>,
    state: PathBuf,
    /// Removed at the end, after the processes.
    _temporary: Option<tempfile::TempDir>,
}

impl Cluster {
    /// Starts a cluster and waits until it would serve a request and every node has joined.
    pub async fn start(options: ClusterOptions) -> Result<Self, StartError> {
        let mut launch = Launch::prepare(options)?;
        let starting = launch.start();
        match tokio::time::timeout(START_TIMEOUT, starting).await {
            Ok(result) => {
                let coordinators = result?;
                launch.write_state_file(&coordinators)?;
                let Launch { processes, metrics, state, temporary, .. } = launch;
                let told = Vec::new();
                let _temporary = temporary;
                Ok(Self { coordinators, processes, metrics, told, state, _temporary })
            }
            Err(_) => Err(StartError::Timeout { reason: launch.last_reason }),
        }
    }

    /// Where the first coordinator's gRPC API listens.
    #[must_use]
    pub fn grpc(&self) -> SocketAddr {
        self.coordinators[0].grpc
    }

    /// Where the first coordinator's HTTP API listens.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        self.coordinators[0].http
    }

    /// Where all coordinators listen.
    #[must_use]
    pub fn coordinators(&self) -> &[Coordinator] {
        &self.coordinators
    }

    /// Where nodes show their metrics, over HTTP.
    #[must_use]
    pub fn metrics(&self) -> &[SocketAddr] {
        &self.metrics
    }

    /// Folder of certificates, logs and `cluster.json`.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Process id of a daemon: `coordinator`, `coordinator-1`, `prefill-0`, `decode-0` and so on.
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.processes.iter().find(|process| process.name == name).map(|process| process.pid)
    }

    /// Ends one daemon with SIGKILL, as a crash would. Whether there is one of that name.
    pub fn kill(&self, name: &str) -> bool {
        let process = self.processes.iter().find(|process| process.name == name);
        process.inspect(|process| process.kill()).is_some()
    }

    /// The next daemon that ends, each once.
    pub async fn next_end(&mut self) -> Ended {
        let (told, processes) = (&self.told, &self.processes);
        let untold = processes.iter().filter(|process| !told.contains(&process.name));
        let ends = untold.map(|process| Box::pin(async move { (process, process.ended().await) }));
        let (process, status) = first(ends.collect()).await;
        let coordinators = &processes[..self.coordinators.len()];
        let ended = Ended {
            name: process.name.clone(),
            ends_service: coordinators.iter().all(Process::has_ended),
            status,
            log_tail: process.log_tail(),
        };
        self.told.push(ended.name.clone());
        ended
    }

    /// Stops every daemon in an orderly way; kills what takes too long.
    pub async fn stop(self) {
        for process in &self.processes {
            process.terminate();
        }
        let all = async {
            for process in &self.processes {
                process.ended().await;
            }
        };
        // Dropping them kills the rest.
        let _ = tokio::time::timeout(STOP_TIMEOUT, all).await;
    }
}

/// The first of `futures` to finish; never, if there are none.
async fn first<F: Future + Unpin>(mut futures: Vec<F>) -> F::Output {
    std::future::poll_fn(|context| {
        let ready = futures.iter_mut().find_map(|future| match Pin::new(future).poll(context) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        });
        ready.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_future_wins() {
        let pending =
            || Box::pin(std::future::pending::<u32>()) as Pin<Box<dyn Future<Output = u32>>>;
        assert_eq!(first(vec![pending(), Box::pin(async { 7 }), pending()]).await, 7);
    }
}
