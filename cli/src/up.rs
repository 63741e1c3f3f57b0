//! `baton up`: runs a cluster on this machine until it is told to stop.

use std::io::Write;
use std::net::SocketAddr;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::launcher::{Cluster, ClusterOptions, Coordinator, Ended, StartError};

/// Command line of `baton up`.
#[derive(clap::Args, Debug)]
pub struct UpArgs {
    #[command(flatten)]
    cluster: ClusterOptions,
}

/// Why `baton up` failed.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    /// The cluster did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The last coordinator ended, and with it the cluster.
    #[error("the coordinator ended ({status}); its last words:\n{log}")]
    CoordinatorEnded {
        /// Its exit status.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// Signals cannot be watched, or standard output is closed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Runs `baton up`: prints `ready grpc=HOST:PORT http=HOST:PORT` when a request would be served, with
/// one address per coordinator separated by commas, and returns on SIGINT or SIGTERM with every
/// process stopped. A node that ends is reported, and the rest goes on.
pub async fn run(args: UpArgs) -> Result<(), UpError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut cluster = tokio::select! {
        cluster = Cluster::start(args.cluster) => cluster?,
        () = either(&mut terminate, &mut interrupt) => return Ok(()),
    };
    let mut out = std::io::stdout();
    let list = |address: fn(&Coordinator) -> SocketAddr| {
        let all = cluster.coordinators().iter().map(|one| address(one).to_string());
        all.collect::<Vec<_>>().join(",")
    };
    writeln!(out, "ready grpc={} http={}", list(|one| one.grpc), list(|one| one.http))?;
    out.flush()?;
    let result = tokio::select! {
        error = coordinator_end(&mut cluster) => Err(error),
        () = either(&mut terminate, &mut interrupt) => Ok(()),
    };
    cluster.stop().await;
    result
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Reports daemons that end; returns when the last coordinator does.
async fn coordinator_end(cluster: &mut Cluster) -> UpError {
    loop {
        let ended = cluster.next_end().await;
        if ended.ends_service {
            let log = ended.log_tail;
            return UpError::CoordinatorEnded { status: ended.status.to_string(), log };
        }
        let Ended { name, status, .. } = ended;
        // Nobody may be reading.
        let _ =
            writeln!(std::io::stderr(), "{name} ended ({status}); the cluster goes on without it");
    }
}
