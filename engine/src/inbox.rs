//! What waits for the engine's thread. Senders never block and nothing that frees blocks is ever
//! refused; all of it is bounded by the jobs that the engine has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_proto::ids::TransferId;

use crate::events::{FirstToken, Submission, SubmitError};
use crate::scheduler::MaskFound;

/// The mailbox of an engine's thread.
#[derive(Debug)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    filled: Condvar,
    max_waiting: usize,
    /// How often the thread has looked.
    turns: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Every job that is somewhere between its submission and the return of its last block.
    live: BTreeSet<TransferId>,
    /// Jobs not yet admitted, those in `inputs` included.
    waiting: usize,
    inputs: Inputs,
    /// The thread takes nothing any more.
    closed: bool,
}

/// What arrived since the thread last looked. To be handled in the order of the fields.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    /// New jobs with their times of arrival.
    pub(crate) submitted: Vec<(Submission, Instant)>,
    /// Held jobs that may be admitted.
    pub(crate) released: BTreeSet<TransferId>,
    /// Imports whose KV is complete.
    pub(crate) imported: BTreeMap<TransferId, FirstToken>,
    /// Fetches whose KV is complete.
    pub(crate) fetched: BTreeSet<TransferId>,
    /// Masks that were computed.
    pub(crate) masks: Vec<MaskFound>,
    /// Jobs to stop.
    pub(crate) cancelled: BTreeSet<TransferId>,
    /// Jobs whose lease was dropped.
    pub(crate) returned: Vec<TransferId>,
    /// Somebody wants to know the whole prefix cache.
    pub(crate) snapshot: bool,
    /// Somebody wants to know whether the thread still looks.
    nudge: bool,
    /// Nobody holds the engine any more.
    pub(crate) stop: bool,
}

impl Inputs {
    fn is_empty(&self) -> bool {
        let Self { submitted, released, imported, fetched, cancelled, returned, .. } = self;
        let new = submitted.is_empty() && released.is_empty();
        let arrived = imported.is_empty() && fetched.is_empty() && self.masks.is_empty();
        let over = cancelled.is_empty() && returned.is_empty();
        new && arrived && over && !self.snapshot && !self.nudge && !self.stop
    }
}

/// How long the thread waits for input.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wait {
    /// Not at all.
    No,
    /// Until then.
    Until(Instant),
    /// For ever.
    Forever,
}

impl Inbox {
    pub(crate) fn new(max_waiting: usize) -> Self {
        let turns = AtomicU64::new(0);
        Self { state: Mutex::default(), filled: Condvar::new(), max_waiting, turns }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn submit(&self, submission: Submission, now: Instant) -> Result<(), SubmitError> {
        let mut state = self.state();
        let id = submission.job.id;
        if state.closed {
            return Err(SubmitError::Draining);
        }
        if state.waiting >= self.max_waiting {
            return Err(SubmitError::Full(state.waiting));
        }
        if !state.live.insert(id) {
            return Err(SubmitError::Duplicate(id));
        }
        state.waiting += 1;
        state.inputs.submitted.push((submission, now));
        self.filled.notify_one();
        Ok(())
    }

    pub(crate) fn imported(&self, id: TransferId, first: FirstToken) {
        let mut state = self.state();
        if state.live.contains(&id) {
            state.inputs.imported.entry(id).or_insert(first);
            self.filled.notify_one();
        }
    }

    pub(crate) fn release(&self, id: TransferId) {
        let mut state = self.state();
        if state.live.contains(&id) {
            state.inputs.released.insert(id);
            self.filled.notify_one();
        }
    }

    pub(crate) fn fetched(&self, id: TransferId) {
        let mut state = self.state();
        if state.live.contains(&id) {
            state.inputs.fetched.insert(id);
            self.filled.notify_one();
        }
    }

    pub(crate) fn masked(&self, mask: MaskFound) {
        self.state().inputs.masks.push(mask);
        self.filled.notify_one();
    }

    /// Waits until so many masks are here, but for `most` at most.
    pub(crate) fn await_masks(&self, masks: usize, most: Duration) {
        let lacks = |state: &mut State| state.inputs.masks.len() < masks;
        // Whether they came or not is seen when they are taken.
        drop(self.filled.wait_timeout_while(self.state(), most, lacks));
    }

    pub(crate) fn cancel(&self, id: TransferId) {
        let mut state = self.state();
        if state.live.contains(&id) {
            state.inputs.cancelled.insert(id);
            self.filled.notify_one();
        }
    }

    /// Whether all of these jobs are to be stopped.
    pub(crate) fn cancels(&self, mut jobs: impl Iterator<Item = TransferId>) -> bool {
        let state = self.state();
        !state.inputs.cancelled.is_empty() && jobs.all(|id| state.inputs.cancelled.contains(&id))
    }

    pub(crate) fn lease_returned(&self, id: TransferId) {
        self.state().inputs.returned.push(id);
        self.filled.notify_one();
    }

    pub(crate) fn request_snapshot(&self) {
        self.state().inputs.snapshot = true;
        self.filled.notify_one();
    }

    pub(crate) fn nudge(&self) {
        self.state().inputs.nudge = true;
        self.filled.notify_one();
    }

    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    pub(crate) fn stop(&self) {
        self.state().inputs.stop = true;
        self.filled.notify_one();
    }

    /// All input so far, after waiting for some as `wait` says.
    pub(crate) fn take(&self, wait: Wait) -> Inputs {
        self.turns.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state();
        while state.inputs.is_empty() {
            state = match wait {
                Wait::No => break,
                Wait::Forever => self.filled.wait(state).unwrap_or_else(PoisonError::into_inner),
                Wait::Until(then) => {
                    let left = then.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let waited = self.filled.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        std::mem::take(&mut state.inputs)
    }

    /// The thread has `waiting` jobs that are not admitted, and nothing is left of those in
    /// `gone`.
    pub(crate) fn settle(&self, waiting: usize, gone: &[TransferId]) {
        let mut state = self.state();
        for id in gone {
            state.live.remove(id);
        }
        state.waiting = waiting + state.inputs.submitted.len();
    }

    /// Refuses everything from now on; says which jobs were left.
    pub(crate) fn close(&self) -> BTreeSet<TransferId> {
        let mut state = self.state();
        state.closed = true;
        state.inputs = Inputs::default();
        std::mem::take(&mut state.live)
    }
}
