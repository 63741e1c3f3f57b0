//! [`Group`]: the devices that compute a model together, and how they add up.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use baton_kernels::cuda::{
    Abort, Communicator, Device, DeviceError, Nccl, NcclError, Slice, Stream,
};
use half::bf16;

use super::shard::Shard;

/// How long a step may take before the devices are given up.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// The devices of a model. Sums of which one device does not take part never end; so whoever fails
/// [aborts](Self::abort) those of all.
pub(super) struct Group {
    communicators: Vec<Mutex<Communicator>>,
    /// Without a lock: the call of another device may be stuck with its own.
    aborts: Vec<Abort>,
}

impl Group {
    pub(super) fn of(nccl: &Arc<Nccl>, devices: &[Arc<Device>]) -> Result<Arc<Self>, DeviceError> {
        let communicators = Communicator::of_devices(nccl, devices).map_err(lost)?;
        let aborts = communicators.iter().map(Communicator::aborter).collect();
        let communicators = communicators.into_iter().map(Mutex::new).collect();
        Ok(Arc::new(Self { communicators, aborts }))
    }

    /// # Errors
    /// If a device is known to be gone.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        (0..self.communicators.len()).try_for_each(|rank| self.with(rank, Communicator::check))
    }

    /// Ends all sums, those on the way included: results are worth nothing from now on.
    pub(super) fn abort(&self) {
        self.aborts.iter().for_each(Abort::abort);
    }

    /// Waits until what `reached` asks for is so on all devices. If one fails, or it takes too long,
    /// all are given up.
    pub(super) fn wait(
        &self,
        reached: impl Fn() -> Result<bool, DeviceError>,
    ) -> Result<(), DeviceError> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        let error = loop {
            match reached().and_then(|reached| self.check().map(|()| reached)) {
                Ok(true) => return Ok(()),
                Ok(false) if Instant::now() < deadline => std::thread::yield_now(),
                Ok(false) => {
                    let error = "a step takes too long".to_owned();
                    break DeviceError::Lost { call: "NCCL", error };
                }
                Err(error) => break error,
            }
        };
        self.abort();
        Err(error)
    }

    fn with(
        &self,
        rank: usize,
        call: impl FnOnce(&Communicator) -> Result<(), NcclError>,
    ) -> Result<(), DeviceError> {
        call(&self.communicators[rank].lock().unwrap_or_else(PoisonError::into_inner)).map_err(lost)
    }
}

fn lost(error: NcclError) -> DeviceError {
    DeviceError::Lost { call: "NCCL", error: error.to_string() }
}

/// One device's place in a group.
pub(super) struct Member {
    pub(super) group: Arc<Group>,
    pub(super) shard: Shard,
}

impl Member {
    /// Queues adding up, in place, what all devices have.
    pub(super) fn add_up(&self, stream: &Stream, data: Slice<'_, bf16>) -> Result<(), DeviceError> {
        self.group.with(self.shard.rank, |own| own.all_reduce(stream, data))
    }
}
