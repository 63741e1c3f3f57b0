//! Threads that share the tasks of one operation at a time.
//!
//! A model runs hundreds of short operations per step, so hand-over must take a microsecond; an idle
//! daemon must take no processor time, and several daemons may share the processors. So a thread
//! that runs out of work spins for a moment, then parks; and an operation is complete when its
//! *tasks* are done: no one waits for a thread that the system has not scheduled.
#![expect(unsafe_code, reason = "lends a closure on the caller's stack to other threads")]

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::simd::Isa;

/// How long a thread without work keeps looking before it parks: longer than the pauses between
/// the operations of a step, and no burden on whoever shares the processor.
const SPIN: Duration = Duration::from_micros(20);

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// A fixed set of threads, of which the caller is one.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Held while an operation runs.
    running: Mutex<()>,
    isa: Isa,
}

struct Worker {
    parked: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

struct Shared {
    /// Which operation (upper half) and how many of its tasks nobody has begun (lower half).
    unclaimed: AtomicU64,
    /// Written only while no task is unclaimed or running.
    operation: UnsafeCell<Option<Operation>>,
    finished: AtomicUsize,
    caller_parked: AtomicBool,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

struct Operation {
    task: Task<'static>,
    tasks: usize,
    caller: Thread,
}

// SAFETY: `operation` is read only by who has claimed a task of it. It is written only when all
// claimed tasks are finished, and published by `unclaimed`.
unsafe impl Sync for Shared {}
// SAFETY: as above; all else is `Send`.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// Starts `threads - 1` threads; zero counts as one.
    ///
    /// # Panics
    /// If the system refuses a thread.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::best())
    }

    /// A pool whose operations use the instructions of `isa`, which the processor must have.
    pub(crate) fn with_isa(threads: usize, isa: Isa) -> Self {
        let shared = Arc::new(Shared {
            unclaimed: AtomicU64::new(0),
            operation: UnsafeCell::new(None),
            finished: AtomicUsize::new(0),
            caller_parked: AtomicBool::new(false),
            panicked: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads).map(|index| Worker::start(index, &shared)).collect();
        Self { shared, workers, running: Mutex::new(()), isa }
    }

    /// Threads, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `task(i)` once for every `i < tasks`, in any order, on any threads.
    ///
    /// # Panics
    /// If a task panicked; the others have run then.
    pub fn for_each(&self, tasks: usize, task: Task<'_>) {
        // Busy: a task that is itself parallel, or another caller. It does its work alone.
        let running = self.running.try_lock();
        if tasks <= 1 || self.workers.is_empty() || running.is_err() {
            (0..tasks).rev().for_each(task);
            return;
        }
        self.publish(tasks, task);
        while self.shared.run_one() {}
        self.shared.wait_for_all(tasks);
        drop(running);
        let mut panicked = self.shared.panicked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(payload) = panicked.take() {
            drop(panicked);
            resume_unwind(payload);
        }
    }

    /// Calls `task(i, chunk)` for every chunk of `size` elements of `data`; the last may be
    /// shorter.
    ///
    /// # Panics
    /// If `size` is 0 or a task panicked.
    pub fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        task: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let start = SendPtr(data.as_mut_ptr());
        let len = data.len();
        self.for_each(len.div_ceil(size), &|i| {
            let from = i * size;
            // SAFETY: chunks do not overlap and lie in `data`, which is borrowed meanwhile.
            let chunk = unsafe {
                std::slice::from_raw_parts_mut(start.get().add(from), size.min(len - from))
            };
            task(i, chunk);
        });
    }

    fn publish(&self, tasks: usize, task: Task<'_>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The closure is used only by who has claimed one of
        // its tasks, and `for_each` returns after all tasks are finished.
        let task = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        // SAFETY: `running` is held, and every task of the last operation is finished.
        unsafe {
            *shared.operation.get() = Some(Operation { task, tasks, caller: thread::current() })
        };
        shared.finished.store(0, Ordering::Relaxed);
        let operation = (shared.unclaimed.load(Ordering::Relaxed) >> 32).wrapping_add(1) << 32;
        let count = u32::try_from(tasks).expect("fewer than 2^32 tasks");
        shared.unclaimed.store(operation | u64::from(count), Ordering::SeqCst);
        for worker in self.workers.iter().take(tasks - 1) {
            worker.wake();
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in &mut self.workers {
            worker.wake();
            if let Some(handle) = worker.handle.take() {
                // It cannot have panicked: tasks are caught.
                let _ = handle.join();
            }
        }
    }
}

impl Worker {
    fn start(index: usize, shared: &Arc<Shared>) -> Self {
        let parked = Arc::new(AtomicBool::new(false));
        let (shared, flag) = (Arc::clone(shared), Arc::clone(&parked));
        let handle = thread::Builder::new()
            .name(format!("kernel-{index}"))
            .spawn(move || shared.work(&flag))
            .expect("the system grants a thread");
        Self { parked, handle: Some(handle) }
    }

    fn wake(&self) {
        if self.parked.swap(false, Ordering::SeqCst) {
            let handle = self.handle.as_ref().expect("joined in drop only");
            handle.thread().unpark();
        }
    }
}

impl Shared {
    fn work(&self, parked: &AtomicBool) {
        loop {
            while self.run_one() {}
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            wait(parked, || self.has_unclaimed() || self.stop.load(Ordering::SeqCst));
        }
    }

    fn has_unclaimed(&self) -> bool {
        self.unclaimed.load(Ordering::SeqCst) as u32 != 0
    }

    /// Claims a task and runs it; false if there is none.
    fn run_one(&self) -> bool {
        let claim = |word: u64| (word as u32 != 0).then(|| word - 1);
        let Ok(word) = self.unclaimed.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim)
        else {
            return false;
        };
        // SAFETY: a task was claimed, so the operation stays until that is counted as finished.
        let operation = unsafe { (*self.operation.get()).as_ref() };
        let Operation { task, tasks, caller } = operation.expect("published before its tasks");
        let (tasks, caller) = (*tasks, caller.clone());
        let result = catch_unwind(AssertUnwindSafe(|| task(word as u32 as usize - 1)));
        if let Err(payload) = result {
            *self.panicked.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
        // From here the operation may be gone.
        let finished = self.finished.fetch_add(1, Ordering::SeqCst) + 1;
        if finished == tasks && self.caller_parked.swap(false, Ordering::SeqCst) {
            caller.unpark();
        }
        true
    }

    fn wait_for_all(&self, tasks: usize) {
        let done = || self.finished.load(Ordering::SeqCst) == tasks;
        while !done() {
            wait(&self.caller_parked, done);
        }
    }
}

/// Returns when `ready`, or earlier: spins, then parks with `parked` set, so that whoever makes it
/// ready clears `parked` and unparks this thread.
fn wait(parked: &AtomicBool, ready: impl Fn() -> bool) {
    let start = Instant::now();
    while start.elapsed() < SPIN {
        for _ in 0..16 {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
    }
    // Both sides write first and then read, in one order for all threads: either this sees that it
    // is ready, or the other side sees the flag.
    parked.store(true, Ordering::SeqCst);
    if !ready() {
        thread::park();
    }
    parked.store(false, Ordering::SeqCst);
}

/// Rows of `width` elements that are worth a task of their own, in element-wise operations.
pub(crate) fn grain(width: usize) -> usize {
    const ELEMENTS: usize = 1 << 14;
    (ELEMENTS / width.max(1)).max(1)
}

/// A pointer that tasks on other threads may use, each for its own part.
pub(crate) struct SendPtr<T>(pub(crate) *mut T);

// SAFETY: a pointer does nothing by itself; who dereferences it answers for that.
unsafe impl<T: Send> Sync for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SendPtr<T> {}

impl<T> SendPtr<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}
