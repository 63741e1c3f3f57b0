//! Ranks that send to each other and add up.

use std::cell::Cell;
use std::ffi::c_int;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;

use super::shared::{Abort, Shared};
use super::{Handle, NcclError};
use crate::cuda::memory::{Element, Slice};
use crate::cuda::stream::Stream;

/// How long to leave the processor alone before asking again whether a call is complete.
pub(super) const POLL: Duration = Duration::from_micros(100);
/// How long a call may take. It waits for a peer only where it is the first to send to it or to receive
/// from it, as that connects the two.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// `ncclDataType_t`.
const TYPE_UINT8: c_int = 1;
const TYPE_FLOAT32: c_int = 7;
const TYPE_BFLOAT16: c_int = 9;
/// `ncclRedOp_t`.
const SUM: c_int = 0;

/// One rank of several, each with a device. Work is queued in streams; what a rank sends, its peer
/// must receive in the same order. Streams of one communicator must not be used at the same time.
///
/// Work whose peer is gone never ends by itself: ask [`Communicator::check`] while waiting, and
/// drop the communicator to end it, or [abort](Communicator::aborter) it from another thread.
pub struct Communicator {
    pub(super) shared: Arc<Shared>,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// The library's handle may be used by any thread, one at a time: not `Sync`.
    pub(super) _one_at_a_time: PhantomData<Cell<()>>,
}

/// What can be added up.
pub trait Reducible: Element {
    /// The library's name of it.
    #[doc(hidden)]
    const TYPE: c_int;
}

impl Reducible for f32 {
    const TYPE: c_int = TYPE_FLOAT32;
}

impl Reducible for bf16 {
    const TYPE: c_int = TYPE_BFLOAT16;
}

impl Communicator {
    /// Its number.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// What ends its work from another thread.
    #[must_use]
    pub fn aborter(&self) -> Abort {
        Abort(self.shared.clone())
    }

    /// Queues sending to a peer.
    ///
    /// # Errors
    /// If the library fails, or a peer is known to be gone.
    pub fn send<T: Element>(
        &self,
        stream: &Stream,
        from: Slice<'_, T>,
        peer: usize,
    ) -> Result<(), NcclError> {
        // SAFETY: memory of a buffer that lives; freeing it waits for the stream.
        self.call("ncclSend", |handle| unsafe {
            let (from, bytes) = (from.address() as *const _, from.bytes());
            let send = self.shared.nccl.functions.send;
            send(from, bytes, TYPE_UINT8, peer as c_int, handle, stream.handle.cast())
        })
    }

    /// Queues receiving from a peer, as many bytes as it sends.
    ///
    /// # Errors
    /// If the library fails, or a peer is known to be gone.
    pub fn receive<T: Element>(
        &self,
        stream: &Stream,
        to: Slice<'_, T>,
        peer: usize,
    ) -> Result<(), NcclError> {
        // SAFETY: as above.
        self.call("ncclRecv", |handle| unsafe {
            let (to, bytes) = (to.address() as *mut _, to.bytes());
            let receive = self.shared.nccl.functions.receive;
            receive(to, bytes, TYPE_UINT8, peer as c_int, handle, stream.handle.cast())
        })
    }

    /// Queues adding up, in place: all ranks get the sum of all.
    ///
    /// # Errors
    /// If the library fails, or a peer is known to be gone.
    pub fn all_reduce<T: Reducible>(
        &self,
        stream: &Stream,
        data: Slice<'_, T>,
    ) -> Result<(), NcclError> {
        // SAFETY: as above.
        self.call("ncclAllReduce", |handle| unsafe {
            let at = data.address() as *mut _;
            let all_reduce = self.shared.nccl.functions.all_reduce;
            all_reduce(at, at, data.len(), T::TYPE, SUM, handle, stream.handle.cast())
        })
    }

    /// Queues exchanging: all ranks get the parts of all, in order of rank.
    ///
    /// # Errors
    /// If the library fails, or a peer is known to be gone.
    ///
    /// # Panics
    /// If there is not room for exactly all parts.
    pub fn all_gather<T: Element>(
        &self,
        stream: &Stream,
        part: Slice<'_, T>,
        all: Slice<'_, T>,
    ) -> Result<(), NcclError> {
        assert_eq!(part.len() * self.ranks, all.len(), "room for all parts");
        // SAFETY: as above.
        self.call("ncclAllGather", |handle| unsafe {
            let (from, to) = (part.address() as *const _, all.address() as *mut _);
            let all_gather = self.shared.nccl.functions.all_gather;
            all_gather(from, to, part.bytes(), TYPE_UINT8, handle, stream.handle.cast())
        })
    }

    /// Queues what `work` does as one: sends and receipts that need each other.
    ///
    /// # Errors
    /// What `work` returned, or if the library fails.
    pub fn group(
        &self,
        work: impl FnOnce(&Self) -> Result<(), NcclError>,
    ) -> Result<(), NcclError> {
        // All of it: what is queued is held by the group until its end, and must not be aborted then.
        let under_way = self.shared.enter().ok_or_else(|| aborted("ncclGroupStart"))?;
        // SAFETY: each start has its end.
        let started = unsafe { (self.shared.nccl.functions.group_start)() };
        self.shared.nccl.check("ncclGroupStart", started)?;
        let result = work(self);
        // SAFETY: as above.
        let ended = unsafe { (self.shared.nccl.functions.group_end)() };
        drop(under_way);
        result?;
        self.shared.nccl.check("ncclGroupEnd", ended)?;
        self.settle("ncclGroupEnd", Instant::now() + CALL_TIMEOUT)
    }

    /// Whether all ranks are there, as far as is known.
    ///
    /// # Errors
    /// If one is gone. Work that waits for it ends when the communicator is dropped.
    pub fn check(&self) -> Result<(), NcclError> {
        self.state("ncclCommGetAsyncError").map(|_| ())
    }

    /// Leaves. The streams must be done with its work.
    ///
    /// # Errors
    /// If the library fails.
    pub fn leave(self) -> Result<(), NcclError> {
        let Shared { nccl, handle, .. } = &*self.shared;
        // SAFETY: a communicator that lives.
        self.call("ncclCommFinalize", |handle| unsafe { (nccl.functions.finalize)(handle) })?;
        if !self.shared.end() {
            return Err(aborted("ncclCommDestroy"));
        }
        // SAFETY: nobody uses the handle any more.
        let status = unsafe { (nccl.functions.destroy)(*handle) };
        nccl.check("ncclCommDestroy", status).map(|_| ())
    }

    /// A call that queues something, and is complete when it returns, outside of a group.
    fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(Handle) -> c_int,
    ) -> Result<(), NcclError> {
        let shared = &self.shared;
        if let Err(error) = shared.device.bind() {
            return Err(NcclError::Refused { call: name, error: error.to_string() });
        }
        let status = {
            let _under_way = shared.enter().ok_or_else(|| aborted(name))?;
            call(shared.handle)
        };
        match shared.nccl.check(name, status)? {
            true => Ok(()),
            false => self.settle(name, Instant::now() + CALL_TIMEOUT),
        }
    }

    /// Waits until what was called is complete.
    pub(super) fn settle(&self, call: &'static str, deadline: Instant) -> Result<(), NcclError> {
        while !self.state(call)? {
            if Instant::now() >= deadline {
                return Err(NcclError::TimedOut { call });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Whether what was called is complete.
    fn state(&self, call: &'static str) -> Result<bool, NcclError> {
        let Shared { nccl, handle, .. } = &*self.shared;
        let mut state = 0;
        let alive = self.shared.alive();
        if !*alive {
            return Err(aborted(call));
        }
        // SAFETY: writes one integer; nobody ends the communicator meanwhile.
        let status = unsafe { (nccl.functions.state)(*handle, &raw mut state) };
        drop(alive);
        nccl.check(call, status)?;
        nccl.check(call, state)
    }
}

impl Drop for Communicator {
    /// Ends its work wherever it is.
    fn drop(&mut self) {
        self.shared.abort();
    }
}

fn aborted(call: &'static str) -> NcclError {
    NcclError::PeerLost { call, error: "it was aborted".to_owned() }
}
