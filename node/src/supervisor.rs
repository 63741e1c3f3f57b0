//! What systemd is told: see sd_notify(3). Without systemd nothing happens.

use std::time::Duration;

use baton_engine::Engine;
use baton_telemetry::systemd::tell;
use sd_notify::NotifyState;

/// Loading is given up if nothing was heard of it for so long.
const LOAD_PATIENCE: Duration = Duration::from_secs(120);

/// The node serves, as far as it can know.
pub(crate) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The model is loading, and takes as long as it takes.
pub(crate) fn loading(percent: usize) {
    let patience = NotifyState::ExtendTimeoutUsec(LOAD_PATIENCE.as_micros() as u32);
    tell(&[NotifyState::Status(&format!("loading the model: {percent}%")), patience]);
}

/// The node takes nothing new and finishes what runs, for at most `timeout`.
pub(crate) fn draining(timeout: Duration) {
    tell(&[NotifyState::Stopping, NotifyState::Status(&format!("draining, at most {timeout:?}"))]);
}

/// Vouches for the engine as often as the unit's `WatchdogSec` asks, while its thread goes on: one
/// that hangs in a step ends the process, and other nodes take over its requests.
pub(crate) async fn watch(engine: Engine) {
    let Some(patience) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut interval = tokio::time::interval(patience / 4);
    let mut seen = engine.turns();
    engine.nudge();
    loop {
        interval.tick().await;
        let turns = engine.turns();
        if turns != seen {
            seen = turns;
            tell(&[NotifyState::Watchdog]);
            engine.nudge();
        }
    }
}
