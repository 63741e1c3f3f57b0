//! Ranks that send to each other and add up.

use std::ffi::c_int;
use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;

use super::{Config, Handle, Nccl, NcclError, RawId, UniqueId};
use crate::cuda::device::Device;
use crate::cuda::memory::{Element, Slice};
use crate::cuda::stream::Stream;

/// How long to leave the processor alone before asking again whether a call is complete.
const POLL: Duration = Duration::from_micros(100);
/// How long a call may take on this side, once all ranks are connected. It waits for no peer.
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
/// drop the communicator to end it.
pub struct Communicator {
    nccl: Arc<Nccl>,
    device: Arc<Device>,
    handle: Handle,
    rank: usize,
    ranks: usize,
}

// SAFETY: the library's handle may be used by any thread, one at a time; so it is not `Sync`.
unsafe impl Send for Communicator {}

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
    /// Joins with the others, who do the same with the same identifier.
    ///
    /// # Errors
    /// If not all are there by the deadline, or the library fails.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn join(
        nccl: &Arc<Nccl>,
        device: &Arc<Device>,
        id: &UniqueId,
        (rank, ranks): (usize, usize),
        deadline: Instant,
    ) -> Result<Self, NcclError> {
        assert!(rank < ranks, "rank {rank} of {ranks}");
        device.bind().map_err(|error| NcclError::Refused {
            call: "ncclCommInitRankConfig",
            error: error.to_string(),
        })?;
        let (nccl, device, handle) = (nccl.clone(), device.clone(), std::ptr::null_mut());
        let mut own = Self { nccl, device, handle, rank, ranks };
        let mut config = Config::not_blocking();
        let (rank, ranks) = (rank as c_int, ranks as c_int);
        // SAFETY: writes one handle, which says later whether it worked.
        let status = unsafe {
            let join = own.nccl.functions.join;
            join(&raw mut own.handle, ranks, RawId(*id), rank, &raw mut config)
        };
        own.nccl.check("ncclCommInitRankConfig", status)?;
        own.settle("ncclCommInitRankConfig", deadline)?;
        Ok(own)
    }

    /// One for each of several devices of this process, in that order. What they queue is queued
    /// when the call returns, which is quicker than with those that [`join`](Self::join). A thread
    /// for each must be able to call: the first operation of a kind waits for all ranks.
    ///
    /// # Errors
    /// If a device is named twice, or the library fails.
    pub fn of_devices(nccl: &Arc<Nccl>, devices: &[Arc<Device>]) -> Result<Vec<Self>, NcclError> {
        let ordinals: Vec<_> = devices.iter().map(|device| device.ordinal() as c_int).collect();
        let mut handles = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: writes as many handles as there are devices.
        let status = unsafe {
            let join_all = nccl.functions.join_all;
            join_all(handles.as_mut_ptr(), ordinals.len() as c_int, ordinals.as_ptr())
        };
        nccl.check("ncclCommInitAll", status)?;
        let own = |(rank, (handle, device)): (usize, (Handle, &Arc<Device>))| {
            let (nccl, device, ranks) = (nccl.clone(), device.clone(), devices.len());
            Self { nccl, device, handle, rank, ranks }
        };
        Ok(handles.into_iter().zip(devices).enumerate().map(own).collect())
    }

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
            let send = self.nccl.functions.send;
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
            let receive = self.nccl.functions.receive;
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
            let all_reduce = self.nccl.functions.all_reduce;
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
            let all_gather = self.nccl.functions.all_gather;
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
        // SAFETY: each start has its end.
        let started = unsafe { (self.nccl.functions.group_start)() };
        self.nccl.check("ncclGroupStart", started)?;
        let result = work(self);
        // SAFETY: as above.
        let ended = unsafe { (self.nccl.functions.group_end)() };
        result?;
        self.nccl.check("ncclGroupEnd", ended)?;
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
    pub fn leave(mut self) -> Result<(), NcclError> {
        // SAFETY: a communicator that lives.
        self.call("ncclCommFinalize", |handle| unsafe { (self.nccl.functions.finalize)(handle) })?;
        let handle = std::mem::replace(&mut self.handle, std::ptr::null_mut());
        // SAFETY: nobody has the handle any more.
        let status = unsafe { (self.nccl.functions.destroy)(handle) };
        self.nccl.check("ncclCommDestroy", status).map(|_| ())
    }

    /// A call that queues something, and is complete when it returns, outside of a group.
    fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(Handle) -> c_int,
    ) -> Result<(), NcclError> {
        if let Err(error) = self.device.bind() {
            return Err(NcclError::Refused { call: name, error: error.to_string() });
        }
        match self.nccl.check(name, call(self.handle))? {
            true => Ok(()),
            false => self.settle(name, Instant::now() + CALL_TIMEOUT),
        }
    }

    /// Waits until what was called is complete.
    fn settle(&self, call: &'static str, deadline: Instant) -> Result<(), NcclError> {
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
        let mut state = 0;
        // SAFETY: writes one integer.
        let status = unsafe { (self.nccl.functions.state)(self.handle, &raw mut state) };
        self.nccl.check(call, status)?;
        self.nccl.check(call, state)
    }
}

impl Drop for Communicator {
    /// Ends its work wherever it is.
    fn drop(&mut self) {
        if !self.handle.is_null() && self.device.bind().is_ok() {
            // SAFETY: nobody has the handle any more.
            let _ = unsafe { (self.nccl.functions.abort)(self.handle) };
        }
    }
}
