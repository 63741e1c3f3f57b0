//! Sixteen lanes one by one: any processor, and the meaning of the others.
#![expect(unsafe_code, reason = "implements an unsafe interface")]

use std::array::from_fn;

use half::{bf16, f16};

use super::{F32x16, Kernel, LANES};

#[derive(Clone, Copy)]
pub(super) struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl F32x16 for Scalar {
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's range.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> Self {
        // SAFETY: the caller's range.
        Self(from_fn(|i| if i < count { unsafe { from.add(i).read_unaligned() } } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        // SAFETY: the caller's range.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(|b| bf16::from_bits(u16::from_le(b)).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        // SAFETY: the caller's range.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(|b| f16::from_bits(u16::from_le(b)).to_f32_const()))
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2] {
        // SAFETY: the caller's range.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() }.map(u32::from_le);
        [
            Self(pairs.map(|p| f32::from_bits(p << 16))),
            Self(pairs.map(|p| f32::from_bits(p & 0xffff_0000))),
        ]
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's range.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's range; no more than the lanes.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), to, count.min(LANES)) }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |x, y| x + y)
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |x, y| x - y)
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |x, y| x * y)
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |x, y| x / y)
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| if x > y { x } else { y })
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        self.zip(b, |x, y| if x < y { x } else { y })
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }

    #[inline(always)]
    fn exp2_integer(self) -> Self {
        Self(self.0.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23)))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let v = self.0;
        let v: [f32; 8] = from_fn(|i| v[i] + v[i + 8]);
        let v: [f32; 4] = from_fn(|i| v[i] + v[i + 4]);
        let v: [f32; 2] = from_fn(|i| v[i] + v[i + 2]);
        v[0] + v[1]
    }

    #[inline(always)]
    fn greatest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |x, y| if y > x { y } else { x })
    }

    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        from_fn(|i| Self(from_fn(|j| rows[j].0[i])))
    }

    #[inline(always)]
    unsafe fn call<K: Kernel>(kernel: K) {
        #[inline(never)]
        unsafe fn plain<K: Kernel>(kernel: K) {
            // SAFETY: needs no particular instructions; the kernel's rules are the caller's.
            unsafe { kernel.run::<Scalar>() }
        }
        // SAFETY: as the caller promises.
        unsafe { plain(kernel) }
    }
}
