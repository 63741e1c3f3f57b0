//! Zeroed memory straight from the operating system, on huge pages where it grants them.
#![expect(unsafe_code, reason = "maps and unmaps memory")]

use std::ptr::NonNull;

const HUGE_PAGE: usize = 2 << 20;

/// Bytes that are zero until written. Aligned to a huge page if they fill one, else to a page.
pub(crate) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    map: *mut libc::c_void,
    map_bytes: usize,
}

// SAFETY: it owns its memory, which any thread may access; `Memory` itself never does.
unsafe impl Send for Memory {}
// SAFETY: as above: all access is through raw pointers, under the callers' own rules.
unsafe impl Sync for Memory {}

impl Memory {
    /// Reserves memory. Pages are committed as they are first touched.
    ///
    /// # Panics
    /// If the address space is exhausted, like any allocation.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        let huge = bytes >= HUGE_PAGE;
        let map_bytes = bytes.max(1) + if huge { HUGE_PAGE } else { 0 };
        // SAFETY: a new private mapping at an address that the system chooses.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert!(map != libc::MAP_FAILED, "cannot map {map_bytes} bytes");
        let skipped = if huge { map.align_offset(HUGE_PAGE) } else { 0 };
        // SAFETY: `skipped < HUGE_PAGE`, which the mapping is longer than `bytes`.
        let start = unsafe { map.add(skipped) };
        if huge {
            // A refusal costs speed only.
            // SAFETY: the range is inside the mapping.
            #[cfg(target_os = "linux")]
            unsafe {
                libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
            }
        }
        let start = NonNull::new(start.cast()).expect("a mapping is never at address 0");
        Self { start, bytes, map, map_bytes }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it any more.
        unsafe { libc::munmap(self.map, self.map_bytes) };
    }
}
