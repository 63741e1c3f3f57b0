//! Events in streams.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUevent_flags, CUresult};

use super::device::Device;
use super::error::{DeviceError, check};
use super::stream::Stream;

/// A point in a stream. One that was never recorded counts as done.
pub struct Event {
    device: Arc<Device>,
    pub(super) handle: sys::CUevent,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks where it must.
unsafe impl Sync for Event {}

impl Event {
    /// An event that only orders.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        Self::with_flags(device, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// An event that only orders, and whose waiting threads sleep: it takes some microseconds longer
    /// to wake them, and they take no processor meanwhile.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn blocking(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        Self::with_flags(device, flags | CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32)
    }

    /// An event that also knows when it was reached.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn timed(device: &Arc<Device>) -> Result<Self, DeviceError> {
        Self::with_flags(device, CUevent_flags::CU_EVENT_DEFAULT as u32)
    }

    fn with_flags(device: &Arc<Device>, flags: u32) -> Result<Self, DeviceError> {
        let mut handle = std::ptr::null_mut();
        device.bind()?;
        // SAFETY: writes one handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut handle, flags) })?;
        Ok(Self { device: device.clone(), handle })
    }

    /// Puts it behind all that was queued in a stream so far. It forgets where it was before;
    /// who waits for that goes on to.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: both live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.handle, stream.handle) })
    }

    /// Whether the stream got there.
    ///
    /// # Errors
    /// If work of the device failed: it is lost then.
    pub fn is_done(&self) -> Result<bool, DeviceError> {
        self.device.bind()?;
        // SAFETY: it lives.
        done("cuEventQuery", unsafe { sys::cuEventQuery(self.handle) })
    }

    /// Waits until the stream gets there.
    ///
    /// # Errors
    /// If work of the device failed: it is lost then.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: it lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.handle) })
    }

    /// Milliseconds from another timed event to this one. Both must be done.
    ///
    /// # Errors
    /// If they are not, or were not made by [`Event::timed`].
    pub fn ms_since(&self, start: &Self) -> Result<f32, DeviceError> {
        let mut ms = 0.0;
        self.device.bind()?;
        // SAFETY: writes one number.
        let status = unsafe { sys::cuEventElapsedTime_v2(&raw mut ms, start.handle, self.handle) };
        check("cuEventElapsedTime", status).map(|()| ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by `with_flags`; the driver keeps what still waits for it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.handle) };
        }
    }
}

/// Whether work is done, from the status of asking for it.
pub(super) fn done(call: &'static str, status: CUresult) -> Result<bool, DeviceError> {
    match status {
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        status => check(call, status).map(|()| true),
    }
}
