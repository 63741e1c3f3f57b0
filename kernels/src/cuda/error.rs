//! What can go wrong on a device.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

/// Why a device did not do what it was asked for. The caller can go on after all but
/// [`DeviceError::Lost`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The device does not have that much memory left.
    #[error("{call}: the device is out of memory")]
    OutOfMemory {
        /// The function of the driver.
        call: &'static str,
    },
    /// The device cannot be used by this process any more: a kernel failed, or the hardware did.
    #[error("the device is lost: {call}: {error}")]
    Lost {
        /// The function of the driver that said so; the cause may be older.
        call: &'static str,
        /// The driver's name of the error.
        error: String,
    },
    /// The driver refused a call. Nothing happened.
    #[error("{call}: {error}")]
    Refused {
        /// The function of the driver.
        call: &'static str,
        /// The driver's name of the error.
        error: String,
    },
    /// The device cannot run what was asked for.
    #[error("{0}")]
    Unsupported(String),
}

impl DeviceError {
    /// Whether this process has to end to use the device again.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

/// Turns a driver's status into a result.
pub(crate) fn check(call: &'static str, status: CUresult) -> Result<(), DeviceError> {
    match status {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(DeviceError::OutOfMemory { call }),
        status if is_sticky(status) => Err(DeviceError::Lost { call, error: name(status) }),
        status => Err(DeviceError::Refused { call, error: name(status) }),
    }
}

/// Errors after which every call fails, or nothing can be relied upon (CUDA driver API, "Data
/// types used by CUDA driver", those that "leave the process in an inconsistent state").
fn is_sticky(status: CUresult) -> bool {
    use CUresult as E;
    matches!(
        status,
        E::CUDA_ERROR_ECC_UNCORRECTABLE
            | E::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | E::CUDA_ERROR_CONTAINED
            | E::CUDA_ERROR_DEVICE_UNAVAILABLE
            | E::CUDA_ERROR_ILLEGAL_ADDRESS
            | E::CUDA_ERROR_LAUNCH_TIMEOUT
            | E::CUDA_ERROR_ASSERT
            | E::CUDA_ERROR_HARDWARE_STACK_ERROR
            | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | E::CUDA_ERROR_MISALIGNED_ADDRESS
            | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | E::CUDA_ERROR_INVALID_PC
            | E::CUDA_ERROR_LAUNCH_FAILED
            | E::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | E::CUDA_ERROR_UNKNOWN
    )
}

/// The driver's name and explanation of an error.
fn name(status: CUresult) -> String {
    let mut texts = [std::ptr::null(); 2];
    // SAFETY: the driver stores pointers to constant strings, or nothing.
    unsafe {
        let _ = sys::cuGetErrorName(status, &raw mut texts[0]);
        let _ = sys::cuGetErrorString(status, &raw mut texts[1]);
    }
    let [name, explanation] = texts.map(|text| match text.is_null() {
        true => format!("{status:?}"),
        // SAFETY: a constant string of the driver.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
    });
    format!("{name} ({explanation})")
}
