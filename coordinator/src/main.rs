//! `baton-coordinator`: the daemon that clients and nodes connect to.

use std::io::Write;
use std::process::ExitCode;

use baton_coordinator::config::Config;
use baton_coordinator::core::Core;
use baton_coordinator::server::{Coordinator, install_metrics};
use baton_coordinator::settings::Settings;
use baton_telemetry::{start_logging, systemd};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};

fn main() -> ExitCode {
    let config = match Settings::from_process().and_then(Config::try_from) {
        Ok(config) => config,
        Err(error) => return fail(2, &error),
    };
    if let Err(error) = start_logging(&config.log, config.log_format) {
        return fail(2, &error);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.expect("a runtime needs only threads");
    match runtime.block_on(run(&config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &error),
    }
}

fn fail(status: u8, error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("baton-coordinator: {error}");
    ExitCode::from(status)
}

async fn run(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let mut stop = Stop::new()?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut coordinator = Coordinator::start(config, install_metrics()?).await?;
    let reload = coordinator.reload();
    let reloading = async {
        while hang_up.recv().await.is_some() {
            systemd::reloading(|| reload.reload());
        }
    };
    let Coordinator { grpc, http, cluster, .. } = &coordinator;
    // Whoever started this process with free ports reads them here.
    writeln!(std::io::stdout(), "ready grpc={grpc} http={http} cluster={cluster}")?;
    let serving = format!("gRPC at {grpc}, HTTP at {http}, nodes at {cluster}");
    systemd::tell(&[NotifyState::Ready, NotifyState::Status(&serving)]);
    let core = coordinator.core().clone();
    tokio::select! {
        why = coordinator.broken() => return Err(why.into()),
        () = watch(&core) => unreachable!("it goes on for ever"),
        () = reloading => unreachable!("signals never end"),
        () = stop.requested() => {}
    }
    tracing::info!("draining: taking nothing new, finishing what runs");
    systemd::tell(&[NotifyState::Stopping, NotifyState::Status("draining")]);
    tokio::select! {
        () = coordinator.drain() => {}
        () = tokio::time::sleep(config.drain_timeout) => tracing::warn!("not drained in time"),
        () = stop.requested() => tracing::warn!("told again to stop"),
    }
    coordinator.stop().await;
    Ok(())
}

/// Vouches for the process as often as the unit's `WatchdogSec` asks, while decisions are made.
async fn watch(core: &Core) {
    let Some(patience) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut interval = tokio::time::interval(patience / 4);
    loop {
        interval.tick().await;
        core.status().await;
        systemd::tell(&[NotifyState::Watchdog]);
    }
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        let (terminate, interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt })
    }

    async fn requested(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
