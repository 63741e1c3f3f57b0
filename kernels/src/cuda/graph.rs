//! Work that is recorded once and replayed with one call.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::{self, CUstreamCaptureMode};

use super::device::Device;
use super::error::{DeviceError, check};
use super::stream::Stream;

/// Recorded work: the same kernels, on the same addresses, with the same parameters.
///
/// The memory that it uses must live as long as it is replayed; only the device would notice.
/// What changes between replays is written to device memory before each.
pub struct Graph {
    device: Arc<Device>,
    executable: sys::CUgraphExec,
}

// SAFETY: the driver's handle may be used by any thread, one at a time; so it is not `Sync`.
unsafe impl Send for Graph {}

impl Stream {
    /// Records what `work` queues in this stream, and in streams that wait for its events, instead
    /// of running it. It must not wait, allocate, or copy from or to the host.
    ///
    /// # Errors
    /// What `work` returned, or the driver's.
    pub fn capture<E: From<DeviceError>>(
        &self,
        work: impl FnOnce(&Self) -> Result<(), E>,
    ) -> Result<Graph, E> {
        self.device.bind()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: an open stream.
        let status = unsafe { sys::cuStreamBeginCapture_v2(self.handle, mode) };
        check("cuStreamBeginCapture", status)?;
        self.capturing.store(true, Ordering::Relaxed);
        let result = work(self);
        self.capturing.store(false, Ordering::Relaxed);
        let graph = self.end_capture();
        result?;
        Ok(graph?)
    }

    fn end_capture(&self) -> Result<Graph, DeviceError> {
        let mut graph = std::ptr::null_mut();
        let mut executable = std::ptr::null_mut();
        self.device.bind()?;
        // SAFETY: the stream was being captured; writes handles. The graph is used for the
        // executable only, which copies it.
        unsafe {
            let ended = sys::cuStreamEndCapture(self.handle, &raw mut graph);
            check("cuStreamEndCapture", ended)?;
            let made = sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0);
            let _ = sys::cuGraphDestroy(graph);
            check("cuGraphInstantiate", made)?;
            let graph = Graph { device: self.device.clone(), executable };
            check("cuGraphUpload", sys::cuGraphUpload(executable, self.handle))?;
            Ok(graph)
        }
    }

    /// Queues recorded work.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn replay(&self, graph: &Graph) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: both live.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.executable, self.handle) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `end_capture`; the driver lets launches end.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}
