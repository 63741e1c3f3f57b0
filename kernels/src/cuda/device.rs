//! A device and its kernels.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, RwLock};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::error::{DeviceError, check};
use super::images::{Image, Target, images_for};
use super::kernel::Kernel;
use super::library::Libraries;

/// Shared memory that a block of attention over cached keys takes, of the kernels for every card the
/// greatest. 8.0 and 9.0 have it; 8.6, 8.9 and 12.0 have 99 KiB.
const BLOCK_SHARED_BYTES: u32 = 105 << 10;

/// A GPU, with the kernels of this crate. Everything made from it keeps it open.
pub struct Device {
    ordinal: usize,
    facts: Facts,
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
        let facts = Facts::of(ordinal)?;
        let images = facts.images()?;
        let (handle, mut context) = (handle(ordinal)?, std::ptr::null_mut());
        // SAFETY: writes one handle.
        let status = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, handle) };
        check("cuDevicePrimaryCtxRetain", status)?;
        // From here on dropping it gives back what it has.
        let (modules, kernels) = (Vec::new(), RwLock::default());
        let mut device = Self { ordinal, facts, handle, context, modules, kernels };
        device.bind()?;
        for image in images {
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
        &self.facts.name
    }

    /// Compute capability, major and minor: (9, 0) is Hopper.
    #[must_use]
    pub fn capability(&self) -> (u32, u32) {
        self.facts.capability
    }

    /// Which binaries run on it; some kernels exist for one kind only.
    #[must_use]
    pub fn target(&self) -> Target {
        Target::of(self.facts.capability)
    }

    /// What no other device has, on this machine or another. Processes that give the same one
    /// memory of their own name it by that, as ordinals may differ.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn uuid(&self) -> Result<[u8; 16], DeviceError> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes 16 bytes.
        let status = unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, self.handle) };
        check("cuDeviceGetUuid", status)?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// Streaming multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> usize {
        self.facts.multiprocessors
    }

    /// Bytes of the cache in front of its memory.
    ///
    /// # Errors
    /// If the driver fails.
    pub(super) fn cache_bytes(&self) -> Result<usize, DeviceError> {
        let bytes = attribute(self.handle, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        Ok(bytes as usize)
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
        Err(DeviceError::Unsupported(format!("there is no kernel {name} for {}", self.facts.name)))
    }

    /// Makes the device the calling thread's.
    pub(crate) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
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
        write!(f, "device {} ({})", self.ordinal, self.facts.name)
    }
}

/// What a device is, found without opening it. The driver must be initialised.
pub(super) struct Facts {
    pub name: String,
    pub capability: (u32, u32),
    pub multiprocessors: usize,
    /// Most shared memory of a block.
    pub block_shared_bytes: u32,
    pub memory_bytes: usize,
}

impl Facts {
    /// The binaries for this device; an error if kernels do not run on it.
    pub(super) fn images(
        &self,
    ) -> Result<impl Iterator<Item = &'static Image> + use<>, DeviceError> {
        let images = images_for(self.capability)?;
        if self.block_shared_bytes < BLOCK_SHARED_BYTES {
            let [has, needed] = [self.block_shared_bytes, BLOCK_SHARED_BYTES].map(|n| n >> 10);
            let text = format!("{}: {has} KiB of shared memory, {needed} needed", self.name);
            return Err(DeviceError::Unsupported(text));
        }
        Ok(images)
    }

    pub(super) fn of(ordinal: usize) -> Result<Self, DeviceError> {
        let handle = handle(ordinal)?;
        let major = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let minor = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
        let multiprocessors = Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let mut memory_bytes = 0;
        // SAFETY: writes one integer.
        let status = unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, handle) };
        check("cuDeviceTotalMem", status)?;
        Ok(Self {
            name: name(handle)?,
            capability: (attribute(handle, major)?, attribute(handle, minor)?),
            multiprocessors: attribute(handle, multiprocessors)? as usize,
            block_shared_bytes: attribute(handle, shared)?,
            memory_bytes,
        })
    }
}

fn handle(ordinal: usize) -> Result<sys::CUdevice, DeviceError> {
    let mut handle = 0;
    let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
    // SAFETY: writes one handle.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut handle, ordinal) }).map(|()| handle)
}

fn attribute(handle: sys::CUdevice, attribute: Attribute) -> Result<u32, DeviceError> {
    let mut value = 0;
    // SAFETY: writes one integer.
    let status = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, handle) };
    check("cuDeviceGetAttribute", status)?;
    Ok(u32::try_from(value).unwrap_or_default())
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
