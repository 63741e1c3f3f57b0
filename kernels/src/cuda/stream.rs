//! Streams of work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{self, CUresult, CUstream_flags};

use super::device::Device;
use super::error::{DeviceError, check};
use super::event::{Event, done};
use super::kernel::{Grid, Parameter};
use super::memory::{Buffer, Element, Pinned, Slice};

/// Work of a device that runs in the order in which it was queued. Streams run beside each other;
/// order between them is made by events.
pub struct Stream {
    pub(super) device: Arc<Device>,
    pub(super) handle: sys::CUstream,
    /// Whether work is recorded for a graph instead.
    pub(super) capturing: AtomicBool,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks where it must.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        Self::with_priority(device, 0)
    }

    /// A new stream, whose work goes before that of streams with greater numbers: 0 is the least
    /// priority, -1 and below are higher.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn with_priority(device: &Arc<Device>, priority: i32) -> Result<Self, DeviceError> {
        let mut handle = std::ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        device.bind()?;
        // SAFETY: writes one handle.
        let status = unsafe { sys::cuStreamCreateWithPriority(&raw mut handle, flags, priority) };
        check("cuStreamCreate", status)?;
        Ok(Self { device: device.clone(), handle, capturing: AtomicBool::new(false) })
    }

    /// The device that it belongs to.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Whether work is being recorded for a graph.
    pub(super) fn is_capturing(&self) -> bool {
        self.capturing.load(Ordering::Relaxed)
    }

    /// Waits until all that was queued is done.
    ///
    /// # Errors
    /// If some of it failed: the device is lost then.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: an open stream.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.handle) })
    }

    /// Whether all that was queued is done.
    ///
    /// # Errors
    /// If some of it failed: the device is lost then.
    pub fn is_idle(&self) -> Result<bool, DeviceError> {
        self.device.bind()?;
        // SAFETY: an open stream.
        done("cuStreamQuery", unsafe { sys::cuStreamQuery(self.handle) })
    }

    /// Lets what is queued from now on wait until the event is done.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: an open stream and an event that lives.
        let status = unsafe { sys::cuStreamWaitEvent(self.handle, event.handle, 0) };
        check("cuStreamWaitEvent", status)
    }

    /// Fills memory with zero bytes.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn zero<T: Element>(&self, to: Slice<'_, T>) -> Result<(), DeviceError> {
        if to.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: memory of a buffer that lives; freeing it waits for the stream.
        let status = unsafe { sys::cuMemsetD8Async(to.address(), 0, to.bytes(), self.handle) };
        check("cuMemsetD8Async", status)
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn copy<T: Element>(
        &self,
        from: Slice<'_, T>,
        to: Slice<'_, T>,
    ) -> Result<(), DeviceError> {
        assert_eq!(from.len(), to.len(), "copies of equal length");
        if to.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: memory of buffers that live; freeing it waits for the stream.
        let status = unsafe {
            sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), to.bytes(), self.handle)
        };
        check("cuMemcpyDtoDAsync", status)
    }

    /// Copies elements `at`.. of host memory to the device, as many as there is room for.
    ///
    /// # Errors
    /// If the driver fails, or the stream is being captured: a graph would read the memory later.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn upload<T: Element>(
        &self,
        from: &mut Pinned<T>,
        at: usize,
        to: Slice<'_, T>,
    ) -> Result<(), DeviceError> {
        let start = from.pointer(at, to.len()).cast();
        self.copy_pinned(&from.copied, to.is_empty(), "cuMemcpyHtoDAsync", || {
            // SAFETY: both are long enough; `copied` is recorded after it, and waited for before
            // the host memory is touched or freed.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to.address(), start, to.bytes(), self.handle) }
        })
    }

    /// Copies from the device to elements `at`.. of host memory.
    ///
    /// # Errors
    /// If the driver fails, or the stream is being captured: a graph would write the memory later.
    ///
    /// # Panics
    /// If there is not enough room.
    pub fn download<T: Element>(
        &self,
        from: Slice<'_, T>,
        to: &mut Pinned<T>,
        at: usize,
    ) -> Result<(), DeviceError> {
        let start = to.pointer(at, from.len()).cast();
        self.copy_pinned(&to.copied, from.is_empty(), "cuMemcpyDtoHAsync", || {
            // SAFETY: as above.
            unsafe { sys::cuMemcpyDtoHAsync_v2(start, from.address(), from.bytes(), self.handle) }
        })
    }

    /// A copy from or to pinned memory: after earlier ones of any stream, recorded as the last.
    fn copy_pinned(
        &self,
        copied: &Event,
        nothing: bool,
        call: &'static str,
        copy: impl FnOnce() -> CUresult,
    ) -> Result<(), DeviceError> {
        if self.is_capturing() {
            return Err(DeviceError::Refused { call, error: "in a graph".to_owned() });
        }
        if nothing {
            return Ok(());
        }
        self.wait(copied)?;
        check(call, copy())?;
        copied.record(self)
    }

    /// Copies to the device and waits for it. For tests and set-up.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn write<T: Element>(&self, from: &[T], to: Slice<'_, T>) -> Result<(), DeviceError> {
        assert_eq!(from.len(), to.len(), "copies of equal length");
        if !to.is_empty() {
            self.device.bind()?;
            let start = from.as_ptr().cast();
            // SAFETY: both are long enough, and it is waited for.
            let status =
                unsafe { sys::cuMemcpyHtoDAsync_v2(to.address(), start, to.bytes(), self.handle) };
            check("cuMemcpyHtoDAsync", status)?;
        }
        self.synchronize()
    }

    /// New device memory with these contents. For tests and set-up.
    ///
    /// # Errors
    /// If there is not as much memory, or the driver fails.
    pub fn buffer<T: Element>(&self, contents: &[T]) -> Result<Buffer<T>, DeviceError> {
        let buffer = Buffer::new(&self.device, contents.len())?;
        self.write(contents, buffer.all())?;
        Ok(buffer)
    }

    /// Copies from the device and waits for it. For tests.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn read<T: Element>(&self, from: Slice<'_, T>) -> Result<Vec<T>, DeviceError> {
        let mut contents = vec![T::default(); from.len()];
        if !from.is_empty() {
            self.device.bind()?;
            let start = contents.as_mut_ptr().cast();
            // SAFETY: both are long enough, and it is waited for.
            let status = unsafe {
                sys::cuMemcpyDtoHAsync_v2(start, from.address(), from.bytes(), self.handle)
            };
            check("cuMemcpyDtoHAsync", status)?;
        }
        self.synchronize()?;
        Ok(contents)
    }

    /// Queues a kernel. The caller knows what the kernel does with its parameters: that addresses
    /// are of memory long enough, and aligned as it wants.
    pub(crate) fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        parameters: &[&dyn Parameter],
    ) -> Result<(), DeviceError> {
        let kernel = self.device.kernel(kernel)?;
        self.device.bind()?;
        kernel.launch(self.handle, grid, parameters)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by `with_priority`; the driver lets queued work end.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.handle) };
        }
    }
}
