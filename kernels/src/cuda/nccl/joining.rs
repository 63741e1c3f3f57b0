//! How ranks find each other.

use std::ffi::c_int;
use std::marker::PhantomData;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::shared::Shared;
use super::{Communicator, Config, Handle, Nccl, NcclError, RawId, UniqueId};
use crate::cuda::device::Device;

/// How long all devices of a process may take to find each other.
const JOIN_TIMEOUT: Duration = Duration::from_secs(120);

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
        let (mut handle, mut config) = (std::ptr::null_mut(), Config::not_blocking());
        let (number, count) = (rank as c_int, ranks as c_int);
        // SAFETY: writes one handle, which says later whether it worked.
        let status = unsafe {
            let join = nccl.functions.join;
            join(&raw mut handle, count, RawId(*id), number, &raw mut config)
        };
        // From here on dropping it gives back what it has.
        let own = Self::of(nccl, device, handle, (rank, ranks));
        nccl.check("ncclCommInitRankConfig", status)?;
        own.settle("ncclCommInitRankConfig", deadline)?;
        Ok(own)
    }

    /// One for each of several devices of this process, in that order. What they queue is queued
    /// when the call returns, which is quicker than with those that [`join`](Self::join). A thread
    /// for each must be able to call: the first operation of a kind waits for all ranks.
    ///
    /// # Errors
    /// If a device is named twice, it takes too long, or the library fails.
    pub fn of_devices(nccl: &Arc<Nccl>, devices: &[Arc<Device>]) -> Result<Vec<Self>, NcclError> {
        let ordinals: Vec<_> = devices.iter().map(|device| device.ordinal() as c_int).collect();
        let (sender, joined) = mpsc::channel();
        let library = nccl.clone();
        // It knows no deadline: a thread that does not come back is given up.
        std::thread::spawn(move || {
            let mut handles = vec![std::ptr::null_mut(); ordinals.len()];
            // SAFETY: writes as many handles as there are devices.
            let status = unsafe {
                let join_all = library.functions.join_all;
                join_all(handles.as_mut_ptr(), ordinals.len() as c_int, ordinals.as_ptr())
            };
            let _ = sender.send((status, handles.into_iter().map(Joined).collect::<Vec<_>>()));
        });
        let (status, handles) = joined
            .recv_timeout(JOIN_TIMEOUT)
            .map_err(|_| NcclError::TimedOut { call: "ncclCommInitAll" })?;
        nccl.check("ncclCommInitAll", status)?;
        let own = |(rank, (Joined(handle), device)): (usize, (Joined, &Arc<Device>))| {
            Self::of(nccl, device, handle, (rank, devices.len()))
        };
        Ok(handles.into_iter().zip(devices).enumerate().map(own).collect())
    }

    /// Lets the library forget an identifier that this process made and that not all ranks will join by. It
    /// keeps a thread for it until all have come, or some disagree on how many they are: who comes alone
    /// ends it either way. Takes until the deadline at most; that does not always tell whether it worked.
    pub fn release(nccl: &Arc<Nccl>, device: &Arc<Device>, id: &UniqueId, deadline: Instant) {
        drop(Self::join(nccl, device, id, (0, 1), deadline));
    }

    fn of(
        nccl: &Arc<Nccl>,
        device: &Arc<Device>,
        handle: Handle,
        (rank, ranks): (usize, usize),
    ) -> Self {
        let shared = Arc::new(Shared::new(nccl, device, handle));
        Self { shared, rank, ranks, _one_at_a_time: PhantomData }
    }
}

/// A handle on its way from the thread that made it.
struct Joined(Handle);

// SAFETY: handles may be used by any thread.
unsafe impl Send for Joined {}
