//! What systemd is told: see sd_notify(3). Without systemd nothing happens.

use sd_notify::NotifyState;

/// Says how the process is.
pub fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd is not told");
    }
}

/// The process reads again, by `work`, what can change while it runs.
pub fn reloading(work: impl FnOnce()) {
    // In one message with the time, as Type=notify-reload wants it.
    let now = NotifyState::monotonic_usec_now().expect("Linux has a monotonic clock");
    tell(&[NotifyState::Reloading, now]);
    work();
    tell(&[NotifyState::Ready]);
}
