//! Device memory, and host memory that devices copy from and to.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys;
use half::bf16;

use super::device::Device;
use super::error::{DeviceError, check};
use super::event::Event;
use super::kernel::Parameter;

/// What device memory can hold.
///
/// # Safety
/// Plain data: any bits are a value.
pub unsafe trait Element: Copy + Default + Send + Sync + 'static {}

macro_rules! elements {
    ($($type:ty),*) => {$(
        // SAFETY: any bits are a value.
        unsafe impl Element for $type {}
    )*};
}
elements!(u8, i8, u16, i16, u32, i32, u64, i64, f32, bf16);

/// Memory of a device. Freed when dropped, after everything that was queued is done.
pub struct Buffer<T: Element> {
    device: Arc<Device>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// Reserves memory; its contents are undefined. May be exported to other processes.
    ///
    /// # Errors
    /// If the device has not as much left.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<Self, DeviceError> {
        let mut address = 0;
        let bytes = len * size_of::<T>();
        device.bind()?;
        if bytes > 0 {
            // SAFETY: writes one address.
            check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) })?;
        }
        Ok(Self { device: device.clone(), address, len, element: PhantomData })
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device that has it.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// All of it.
    #[must_use]
    pub fn all(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, buffer: PhantomData }
    }

    /// A part of it.
    ///
    /// # Panics
    /// If it is not inside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        self.all().slice(range)
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.address != 0 && self.device.bind().is_ok() {
            // SAFETY: allocated by `new`, and no slice of it is left.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// A part of device memory.
///
/// It may be read and written through every copy of a slice: what happens in which order is said
/// by streams and events, not by borrows. It does keep the memory from being freed.
#[repr(C)]
pub struct Slice<'a, T: Element> {
    /// First, as kernels are passed its address.
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) buffer: PhantomData<&'a Buffer<T>>,
}

impl<T: Element> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element> Copy for Slice<'_, T> {}

// SAFETY: its first eight bytes are the address that a kernel's pointer is.
unsafe impl<T: Element> Parameter for Slice<'_, T> {
    fn pointer(&self) -> *const c_void {
        (&raw const self.address).cast()
    }

    fn bytes(&self) -> usize {
        size_of::<u64>()
    }
}

impl<'a, T: Element> Slice<'a, T> {
    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Where it is on the device.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// A part of it.
    ///
    /// # Panics
    /// If it is not inside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let Range { start, end } = range;
        assert!(start <= end && end <= self.len, "{start}..{end} of {} elements", self.len);
        Self { address: self.address + (start * size_of::<T>()) as u64, len: end - start, ..*self }
    }

    /// The same memory as elements of another type.
    ///
    /// # Panics
    /// If it is not a whole number of them, or not aligned to them.
    #[must_use]
    pub fn cast<U: Element>(self) -> Slice<'a, U> {
        let size = size_of::<U>();
        let aligned = self.address.is_multiple_of(align_of::<U>() as u64);
        assert!(aligned && self.bytes().is_multiple_of(size), "whole elements of {size} bytes");
        Slice { address: self.address, len: self.bytes() / size, buffer: PhantomData }
    }
}

impl<'a, T: Element> From<&'a Buffer<T>> for Slice<'a, T> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        buffer.all()
    }
}

/// Page-locked memory of the host, which devices copy from and to while the host goes on.
///
/// The host gets at it only when the last copy is done.
pub struct Pinned<T: Element> {
    start: NonNull<T>,
    len: usize,
    /// When the last copy from or to it is done.
    pub(super) copied: Event,
}

// SAFETY: it owns its memory; copies by the device are waited for before the host sees it.
unsafe impl<T: Element> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for Pinned<T> {}

impl<T: Element> Pinned<T> {
    /// Reserves memory of default values.
    ///
    /// # Errors
    /// If the driver cannot lock as much memory.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<Self, DeviceError> {
        let copied = Event::blocking(device)?;
        let mut start = std::ptr::null_mut();
        let bytes = (len * size_of::<T>()).max(1);
        // Not write-combined: the host would read that very slowly.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: writes one address.
        let status = unsafe { sys::cuMemHostAlloc(&raw mut start, bytes, flags) };
        check("cuMemHostAlloc", status)?;
        let start = NonNull::new(start.cast::<T>()).expect("memory is never at address 0");
        for i in 0..len {
            // SAFETY: inside the new memory, which is aligned to pages.
            unsafe { start.add(i).write(T::default()) };
        }
        Ok(Self { start, len, copied })
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the last copy is done, so that the host need not wait.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn is_ready(&self) -> Result<bool, DeviceError> {
        self.copied.is_done()
    }

    /// Its contents, once the last copy is done.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn as_slice(&self) -> Result<&[T], DeviceError> {
        self.copied.synchronize()?;
        // SAFETY: initialised by `new`; copies need `&mut self`, and the last one is done.
        Ok(unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) })
    }

    /// Its contents, to write to, once the last copy is done.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn as_mut_slice(&mut self) -> Result<&mut [T], DeviceError> {
        self.copied.synchronize()?;
        // SAFETY: as above, and the only reference.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) })
    }

    /// As kernels of any device reach it, over the bus. Neither they nor the host wait for each
    /// other: events say who is next.
    #[must_use]
    pub fn on_devices(&self) -> Slice<'_, T> {
        Slice { address: self.start.as_ptr().addr() as u64, len: self.len, buffer: PhantomData }
    }

    /// Where a part of it begins.
    ///
    /// # Panics
    /// If it is not inside.
    pub(super) fn pointer(&self, at: usize, len: usize) -> *mut T {
        assert!(at <= self.len && len <= self.len - at, "{len} from {at} of {}", self.len);
        // SAFETY: inside the memory.
        unsafe { self.start.as_ptr().add(at) }
    }
}

impl<T: Element> Drop for Pinned<T> {
    fn drop(&mut self) {
        // If the device is lost nothing is copied any more.
        let _ = self.copied.synchronize();
        // SAFETY: allocated by `new`, and nothing copies from or to it.
        let _ = unsafe { sys::cuMemFreeHost(self.start.as_ptr().cast()) };
    }
}
