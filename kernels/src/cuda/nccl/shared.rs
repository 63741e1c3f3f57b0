//! [`Shared`]: a communicator's handle, and who may still use it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::communicator::POLL;
use super::{Handle, Nccl};
use crate::cuda::device::Device;

/// How long an abort waits for calls that are not stuck to return.
const ABORT_GRACE: Duration = Duration::from_millis(500);

/// What a communicator and those who may abort it have.
pub(super) struct Shared {
    pub(super) nccl: Arc<Nccl>,
    pub(super) device: Arc<Device>,
    pub(super) handle: Handle,
    /// Whether the handle may still be used. Locked by what returns at once only, so that nobody
    /// waits long for it.
    alive: Mutex<bool>,
    /// Calls under way.
    calls: AtomicUsize,
}

// SAFETY: calls are made by the one who has the `Communicator`; asking for its state and aborting
// are allowed beside them.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Ends a communicator's work from any thread, also while a call of another one is stuck.
#[derive(Clone)]
pub struct Abort(pub(super) Arc<Shared>);

impl Abort {
    /// Ends all work wherever it is; the communicator can only be dropped then. Without effect if
    /// that has happened already.
    pub fn abort(&self) {
        self.0.abort();
    }
}

impl Shared {
    /// Of a handle, if the library has made one.
    pub(super) fn new(nccl: &Arc<Nccl>, device: &Arc<Device>, handle: Handle) -> Self {
        let alive = Mutex::new(!handle.is_null());
        let (nccl, device, calls) = (nccl.clone(), device.clone(), AtomicUsize::new(0));
        Self { nccl, device, handle, alive, calls }
    }

    pub(super) fn alive(&self) -> MutexGuard<'_, bool> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call begins; none if the communicator has ended.
    pub(super) fn enter(&self) -> Option<UnderWay<'_>> {
        let alive = self.alive();
        alive.then(|| {
            self.calls.fetch_add(1, Ordering::Relaxed);
            UnderWay(&self.calls)
        })
    }

    /// Lets no further call begin. False: that was so already.
    pub(super) fn end(&self) -> bool {
        std::mem::replace(&mut *self.alive(), false)
    }

    pub(super) fn abort(&self) {
        if !self.end() {
            return;
        }
        // The library lets those who are stuck go. Who is not shall not find the handle gone.
        let patience = Instant::now() + ABORT_GRACE;
        while self.calls.load(Ordering::Acquire) > 0 && Instant::now() < patience {
            std::thread::sleep(POLL);
        }
        if self.device.bind().is_ok() {
            // SAFETY: no call begins any more; those under way are made to return.
            let _ = unsafe { (self.nccl.functions.abort)(self.handle) };
        }
    }
}

/// A call into the library.
pub(super) struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}
