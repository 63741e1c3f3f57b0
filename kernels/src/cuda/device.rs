//! A device and its kernels.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, RwLock};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::error::{DeviceError, check};
use super::images::{Image, Target, images_for};
use super::kernel::Kernel;
use super::library::Libraries;

/// A GPU, with the kernels of this crate. Everything made from it keeps it open.
pub struct Device {
    ordinal: usize,
    name: String,
    capability: (u32, u32),
    multiprocessors: usize,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    kernels: RwLock<HashMap<&'static str, Arc<Kernel>>>,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks where it must.
unsafe impl Sync for Device {}

/// Free and total memory of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceMemory {
    /// Bytes that nobody has.
    pub free_bytes: usize,
    /// All bytes.
    pub total_bytes: usize,
}

impl Device {
    /// How many devices there are.
    ///
    /// # Errors
    /// If the driver does not work.
    pub fn count(_libraries: &Libraries) -> Result<usize, DeviceError> {
        let mut count = 0;
        // SAFETY: the driver is loaded, as there are libraries; writes one integer.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&raw mut count))?;
        }
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// Opens a device and loads the kernels for it.
    ///
    /// # Errors
    /// If there is no such device, the kernels do not run on it, or the driver fails.
    pub fn open(libraries: &Libraries, ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        let count = Self::count(libraries)?;
        if ordinal >= count {
            let text = format!("there is no device {ordinal}: the driver sees {count}");
            return Err(DeviceError::Unsupported(text));
        }
        let (mut handle, mut context) = (0, std::ptr::null_mut());
        // SAFETY: the ordinal exists; each call writes one value.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut handle, ordinal as i32))?;
            let retained = sys::cuDevicePrimaryCtxRetain(&raw mut context, handle);
            check("cuDevicePrimaryCtxRetain", retained)?;
        }
        // From here on dropping it gives back what it has.
        let mut device = Self {
            ordinal,
            name: name(handle)?,
            capability: (0, 0),
            multiprocessors: 0,
            handle,
            context,
            modules: Vec::new(),
            kernels: RwLock::default(),
        };
        let major = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        device.capability = (major, minor);
        device.multiprocessors =
            device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        device.bind()?;
        for image in images_for(device.capability)? {
            let module = load(image)?;
            device.modules.push(module);
        }
        Ok(Arc::new(device))
    }

    /// Its number among the devices that this process sees.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The driver's name of it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, major and minor: (9, 0) is Hopper.
    #[must_use]
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Which binaries run on it; some kernels exist for one kind only.
    #[must_use]
    pub fn target(&self) -> Target {
        Target::of(self.capability)
    }

    /// Streaming multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Free and total memory now.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let (mut free_bytes, mut total_bytes) = (0, 0);
        self.bind()?;
        // SAFETY: writes two integers.
        let status = unsafe { sys::cuMemGetInfo_v2(&raw mut free_bytes, &raw mut total_bytes) };
        check("cuMemGetInfo", status)?;
        Ok(DeviceMemory { free_bytes, total_bytes })
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// If there is none for this device.
    pub(crate) fn kernel(&self, name: &'static str) -> Result<Arc<Kernel>, DeviceError> {
        let known = self.kernels.read().expect("nothing panics with the lock").get(name).cloned();
        if let Some(kernel) = known {
            return Ok(kernel);
        }
        self.bind()?;
        let symbol = CString::new(name).expect("names of kernels have no zeros");
        for module in &self.modules {
            if let Some(kernel) = Kernel::find(*module, name, &symbol)? {
                let kernel = Arc::new(kernel);
                let mut kernels = self.kernels.write().expect("nothing panics with the lock");
                return Ok(kernels.entry(name).or_insert(kernel).clone());
            }
        }
        Err(DeviceError::Unsupported(format!("there is no kernel {name} for {}", self.name)))
    }

    /// Makes the device the calling thread's.
    pub(crate) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    fn attribute(&self, attribute: Attribute) -> Result<u32, DeviceError> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let status = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.handle) };
        check("cuDeviceGetAttribute", status)?;
        Ok(u32::try_from(value).unwrap_or_default())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Nobody can be told of an error here.
        let _ = self.bind();
        for module in &self.modules {
            // SAFETY: nothing that was made from the device is left.
            let _ = unsafe { sys::cuModuleUnload(*module) };
        }
        // SAFETY: retained once when it was opened.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "device {} ({})", self.ordinal, self.name)
    }
}

fn name(handle: sys::CUdevice) -> Result<String, DeviceError> {
    let mut text = [0_u8; 128];
    // SAFETY: writes a string of at most this length, with its end.
    let status =
        unsafe { sys::cuDeviceGetName(text.as_mut_ptr().cast(), text.len() as i32 - 1, handle) };
    check("cuDeviceGetName", status)?;
    let name = CStr::from_bytes_until_nul(&text).expect("its last byte stays zero");
    Ok(name.to_string_lossy().into_owned())
}

fn load(image: &Image) -> Result<sys::CUmodule, DeviceError> {
    let mut module = std::ptr::null_mut();
    // The driver reads PTX up to a zero byte.
    let bytes = [image.bytes, b"\0"].concat();
    // SAFETY: an image that was built with the crate; a cubin knows its length.
    let status = unsafe { sys::cuModuleLoadData(&raw mut module, bytes.as_ptr().cast()) };
    match check("cuModuleLoadData", status) {
        Err(DeviceError::Refused { error, .. }) => {
            let text = format!("the kernels of {} do not load: {error}", image.file);
            Err(DeviceError::Unsupported(text))
        }
        other => other.map(|()| module),
    }
}
