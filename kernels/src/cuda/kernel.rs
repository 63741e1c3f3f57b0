//! Kernels and what is passed to them.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{self, CUfunction_attribute, CUresult};

use super::error::{DeviceError, check};

/// Most parameters of a kernel.
const MAX_PARAMETERS: usize = 32;
/// Dynamic shared memory that every kernel may have without being asked for.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A function on a device.
pub(crate) struct Kernel {
    name: &'static str,
    function: sys::CUfunction,
    /// Sizes of its parameters.
    parameter_bytes: Vec<usize>,
    /// Dynamic shared memory that it was allowed so far.
    shared_bytes: AtomicU32,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// How many threads run a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Grid {
    /// Blocks in x, y and z.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Grid {
    /// Blocks in one dimension, without dynamic shared memory.
    pub(crate) fn new(blocks: usize, threads: u32) -> Self {
        Self::of([blocks, 1, 1], threads)
    }

    /// Blocks in three dimensions, without dynamic shared memory.
    ///
    /// # Panics
    /// If a dimension is beyond 2³²; the driver refuses less than that.
    pub(crate) fn of(blocks: [usize; 3], threads: u32) -> Self {
        let blocks = blocks.map(|count| u32::try_from(count).expect("a grid that a device has"));
        Self { blocks, threads, shared_bytes: 0 }
    }

    /// With dynamic shared memory.
    pub(crate) fn shared(self, shared_bytes: usize) -> Self {
        let shared_bytes = u32::try_from(shared_bytes).unwrap_or(u32::MAX);
        Self { shared_bytes, ..self }
    }
}

/// What a kernel takes by value.
///
/// # Safety
/// `pointer` must give `bytes` readable bytes, which the kernel's parameter may be copied from.
pub(crate) unsafe trait Parameter {
    fn pointer(&self) -> *const c_void {
        std::ptr::from_ref(self).cast()
    }

    fn bytes(&self) -> usize {
        size_of_val(self)
    }
}

/// Lets plain `repr(C)` values be parameters.
macro_rules! parameters {
    ($($type:ty),*) => {$(
        // SAFETY: a plain value, passed as it lies in memory.
        unsafe impl $crate::cuda::kernel::Parameter for $type {}
    )*};
}
pub(crate) use parameters;

parameters!(i32, u32, f32, i64, u64);

impl Kernel {
    /// The function of a module, if it has one of this name.
    pub(super) fn find(
        module: sys::CUmodule,
        name: &'static str,
        symbol: &CStr,
    ) -> Result<Option<Self>, DeviceError> {
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded; writes one handle.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut function, module, symbol.as_ptr()) };
        if found == CUresult::CUDA_ERROR_NOT_FOUND {
            return Ok(None);
        }
        check("cuModuleGetFunction", found)?;
        let parameter_bytes = (0..MAX_PARAMETERS).map_while(|i| parameter_bytes(function, i));
        Ok(Some(Self {
            name,
            function,
            parameter_bytes: parameter_bytes.collect(),
            shared_bytes: AtomicU32::new(DEFAULT_SHARED_BYTES),
        }))
    }

    /// Queues it in a stream of the current context.
    ///
    /// # Panics
    /// If the parameters are not as many and as long as the kernel's: a mistake of its wrapper.
    pub(super) fn launch(
        &self,
        stream: sys::CUstream,
        grid: Grid,
        parameters: &[&dyn Parameter],
    ) -> Result<(), DeviceError> {
        let sizes = parameters.iter().map(|parameter| parameter.bytes());
        assert!(sizes.eq(self.parameter_bytes.iter().copied()), "parameters of {}", self.name);
        self.allow(grid.shared_bytes)?;
        let mut pointers = [std::ptr::null_mut(); MAX_PARAMETERS];
        for (pointer, parameter) in pointers.iter_mut().zip(parameters) {
            *pointer = parameter.pointer().cast_mut();
        }
        let [x, y, z] = grid.blocks;
        // SAFETY: the driver copies as many bytes of each parameter as the kernel takes, which
        // were compared. What the kernel does with addresses is its wrapper's to know.
        let status = unsafe {
            sys::cuLaunchKernel(
                self.function,
                x,
                y,
                z,
                grid.threads,
                1,
                1,
                grid.shared_bytes,
                stream,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(self.name, status)
    }

    /// Dynamic shared memory beyond the default has to be allowed once.
    fn allow(&self, shared_bytes: u32) -> Result<(), DeviceError> {
        if shared_bytes <= self.shared_bytes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
        // SAFETY: sets a number of the function.
        check(self.name, unsafe { sys::cuFuncSetAttribute(self.function, attribute, bytes) })?;
        self.shared_bytes.fetch_max(shared_bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// The size of a parameter, if there are as many.
fn parameter_bytes(function: sys::CUfunction, index: usize) -> Option<usize> {
    let (mut offset, mut bytes) = (0, 0);
    // SAFETY: writes two integers.
    let status =
        unsafe { sys::cuFuncGetParamInfo(function, index, &raw mut offset, &raw mut bytes) };
    (status == CUresult::CUDA_SUCCESS).then_some(bytes)
}
