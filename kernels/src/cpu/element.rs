//! Element types as kernels read them: vectors and lines of the types in memory, widened.
#![expect(unsafe_code, reason = "reads raw memory")]

use super::simd::F32x16;

/// Columns of a line: what one step of a tile's sum reads.
pub(crate) const LINE: usize = 32;

/// A way to lay 32 elements out in a line of memory.
pub(crate) trait Element {
    /// Bytes of one element.
    const BYTES: usize;

    /// Reads 16 consecutive elements.
    ///
    /// # Safety
    /// They must exist, and so must the instructions of `V`; likewise below.
    unsafe fn load<V: F32x16>(from: *const u8) -> V;

    /// Reads a line.
    #[inline(always)]
    unsafe fn load_line<V: F32x16>(from: *const u8) -> [V; 2] {
        // SAFETY: as the caller promises.
        unsafe { [Self::load(from), Self::load(from.add(16 * Self::BYTES))] }
    }
}

/// Single precision.
pub(crate) struct F32;
/// bfloat16.
pub(crate) struct Bf16;
/// IEEE half precision.
pub(crate) struct F16;
/// bfloat16 in packed weights: columns `i` and `i + 16` lie side by side, so that a shift and a
/// mask widen a line.
pub(crate) struct Bf16Pairs;

impl Element for F32 {
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const u8) -> V {
        // SAFETY: as the caller promises.
        unsafe { V::load(from.cast()) }
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const u8) -> V {
        // SAFETY: as the caller promises.
        unsafe { V::load_bf16(from) }
    }
}

impl Element for Bf16Pairs {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: F32x16>(_: *const u8) -> V {
        unreachable!("paired elements are read by lines")
    }

    #[inline(always)]
    unsafe fn load_line<V: F32x16>(from: *const u8) -> [V; 2] {
        // SAFETY: as the caller promises.
        unsafe { V::load_bf16_pairs(from) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<V: F32x16>(from: *const u8) -> V {
        // SAFETY: as the caller promises.
        unsafe { V::load_f16(from) }
    }
}
