//! Device memory shared with other processes of the same machine.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUipcMem_flags, CUipcMemHandle};

use super::device::Device;
use super::error::{DeviceError, check};
use super::memory::{Buffer, Element, Slice};

/// Names a buffer to other processes, as long as it is not freed.
pub type IpcHandle = [u8; 64];

impl<T: Element> Buffer<T> {
    /// Lets other processes of this user on this machine open it. To be large (2 MiB and more):
    /// what lies in the same page of the device would be shared too.
    ///
    /// # Errors
    /// If the driver fails, or the buffer is empty.
    pub fn share(&self) -> Result<IpcHandle, DeviceError> {
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        self.device().bind()?;
        // SAFETY: writes one handle, of memory that lives.
        let status = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, self.all().address()) };
        check("cuIpcGetMemHandle", status)?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

/// A buffer of another process, which must not free it before this is dropped. Order between the
/// processes is theirs to make: streams and events know nothing of it.
pub struct SharedBuffer {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl SharedBuffer {
    /// Opens a buffer of another process, once at a time.
    ///
    /// # Errors
    /// If the driver fails: the handle is of this process, of another device, or of none.
    pub fn open(device: &Arc<Device>, handle: &IpcHandle) -> Result<Self, DeviceError> {
        let handle = CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        device.bind()?;
        // SAFETY: writes one address. The driver judges the handle.
        let status = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, flags) };
        check("cuIpcOpenMemHandle", status)?;
        let mut shared = Self { device: device.clone(), address, bytes: 0 };
        let mut start = 0;
        // How long it is said by the driver, not by the other process.
        // SAFETY: writes two integers.
        let status =
            unsafe { sys::cuMemGetAddressRange_v2(&raw mut start, &raw mut shared.bytes, address) };
        check("cuMemGetAddressRange", status)?;
        shared.bytes = rest_of((start, shared.bytes), address).ok_or_else(|| {
            let error =
                format!("{address:#x} is not in the {} bytes from {start:#x}", shared.bytes);
            DeviceError::Refused { call: "cuMemGetAddressRange", error }
        })?;
        Ok(shared)
    }

    /// All of it; at least as long as the buffer.
    #[must_use]
    pub fn all(&self) -> Slice<'_, u8> {
        Slice { address: self.address, len: self.bytes, buffer: PhantomData }
    }
}

/// Bytes of an allocation from an address in it on.
fn rest_of((start, bytes): (u64, usize), address: u64) -> Option<usize> {
    let before = usize::try_from(address.checked_sub(start)?).ok()?;
    bytes.checked_sub(before)
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: opened by `open`, and no slice of it is left.
            let _ = unsafe { sys::cuIpcCloseMemHandle(self.address) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::rest_of;

    #[test]
    fn what_the_driver_says_of_an_allocation_may_not_hold_the_address() {
        assert_eq!(rest_of((4096, 100), 4096), Some(100));
        assert_eq!(rest_of((4096, 100), 4106), Some(90));
        assert_eq!(rest_of((4096, 100), 4000), None);
        assert_eq!(rest_of((4096, 100), 4197), None);
    }
}
