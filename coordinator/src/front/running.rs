//! Which requests run, so that a coordinator can end when they have.

use std::sync::Arc;

use tokio::sync::watch;

/// Counts requests, and lets no more begin once it drains. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Running(Arc<watch::Sender<State>>);

#[derive(Clone, Copy, Debug, Default)]
struct State {
    requests: usize,
    draining: bool,
}

/// A request that runs, until it is dropped.
#[derive(Debug)]
pub(crate) struct Run(Running);

impl Running {
    /// Begins a request; `None` once it drains.
    pub(crate) fn begin(&self) -> Option<Run> {
        let begun = self.0.send_if_modified(|state| {
            state.requests += usize::from(!state.draining);
            !state.draining
        });
        begun.then(|| Run(self.clone()))
    }

    /// Lets nothing more begin.
    pub(crate) fn drain(&self) {
        self.0.send_modify(|state| state.draining = true);
    }

    /// Whether it drains.
    pub(crate) fn draining(&self) -> bool {
        self.0.borrow().draining
    }

    /// Returns when it drains.
    pub(crate) async fn until_draining(&self) {
        let _ = self.0.subscribe().wait_for(|state| state.draining).await;
    }

    /// Returns when it drains and nothing runs any more.
    pub(crate) async fn drained(&self) {
        let mut states = self.0.subscribe();
        let _ = states.wait_for(|state| state.draining && state.requests == 0).await;
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.requests -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_runs_ends_and_nothing_more_begins() {
        let running = Running::default();
        let (first, second) = (running.begin().unwrap(), running.begin().unwrap());
        running.drain();
        assert!(running.begin().is_none() && running.draining());
        running.until_draining().await;
        let drained = running.clone();
        let drained = tokio::spawn(async move { drained.drained().await });
        drop(first);
        tokio::task::yield_now().await;
        assert!(!drained.is_finished());
        drop(second);
        drained.await.unwrap();
    }
}
