//! Slots of a GPU's ring.
#![expect(unsafe_code, reason = "lets the host at memory that a device copies to and from")]

use std::sync::Arc;

use baton_kernels::cuda::{Device, DeviceError, Pinned};

/// Page-locked memory of one unit.
pub struct DeviceSlot {
    pub(super) memory: Pinned<u8>,
    start: *mut u8,
}

// SAFETY: `start` is where `memory` is, which may be used by any thread.
unsafe impl Send for DeviceSlot {}
// SAFETY: as above.
unsafe impl Sync for DeviceSlot {}

impl DeviceSlot {
    /// A slot of so many bytes.
    ///
    /// # Errors
    /// If the driver cannot lock as much memory.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, DeviceError> {
        let mut memory = Pinned::new(device, bytes)?;
        let start = memory.as_mut_slice()?.as_mut_ptr();
        Ok(Self { memory, start })
    }
}

impl AsRef<[u8]> for DeviceSlot {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: all of the memory. The device does not write to it: copies are waited for before
        // a slot is given to anybody. (Asking the driver here would bind whoever reads to it.)
        unsafe { std::slice::from_raw_parts(self.start, self.memory.len()) }
    }
}

impl AsMut<[u8]> for DeviceSlot {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.memory.len()) }
    }
}
