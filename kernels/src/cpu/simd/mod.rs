//! Sixteen lanes of `f32`, the same on every instruction set: kernels are written once over
//! [`F32x16`], and each lane does the same IEEE operations whether a register holds 16, 8 or 1.
#![expect(unsafe_code, reason = "vector instructions")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
mod scalar;

use std::sync::OnceLock;

pub(crate) use self::exp::exp;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen `f32`. The constructors are unsafe because they need the type's instructions; as a
/// value exists only where they do, what takes one is safe.
///
/// # Safety
/// Constructors may be called only where [`Isa`] says so: below [`run`].
pub(crate) trait F32x16: Copy {
    /// Rows of a tile of 32 columns whose sums fit the registers.
    const TILE_ROWS: usize;

    /// # Safety
    /// The type's instructions must exist, here and in all other constructors. They read memory
    /// without alignment.
    unsafe fn splat(x: f32) -> Self;
    /// Reads 16 `f32`.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads `count <= 16` `f32`; the other lanes are 0.
    unsafe fn load_partial(from: *const f32, count: usize) -> Self;
    /// Reads the first 16 of `count` `f32`; where there are fewer, the other lanes are 0.
    #[inline(always)]
    unsafe fn load_up_to(from: *const f32, count: usize) -> Self {
        // SAFETY: as the caller promises.
        unsafe { if count >= LANES { Self::load(from) } else { Self::load_partial(from, count) } }
    }
    /// Reads 16 bfloat16.
    unsafe fn load_bf16(from: *const u8) -> Self;
    /// Reads 16 halves.
    unsafe fn load_f16(from: *const u8) -> Self;
    /// Reads 32 bfloat16 of which pair `i` is lane `i` of both vectors.
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2];
    /// Writes 16 `f32`.
    unsafe fn store(self, to: *mut f32);
    /// Writes the first `count <= 16` lanes.
    unsafe fn store_partial(self, to: *mut f32, count: usize);
    /// Writes 16 lanes, or as many as there is room for.
    #[inline(always)]
    unsafe fn store_up_to(self, to: *mut f32, count: usize) {
        // SAFETY: as the caller promises.
        unsafe { if count >= LANES { self.store(to) } else { self.store_partial(to, count) } }
    }

    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    fn add(self, b: Self) -> Self;
    fn sub(self, b: Self) -> Self;
    fn mul(self, b: Self) -> Self;
    fn div(self, b: Self) -> Self;
    /// `if self > b { self } else { b }`
    fn max(self, b: Self) -> Self;
    /// `if self < b { self } else { b }`
    fn min(self, b: Self) -> Self;
    /// To the nearest integer, ties to even.
    fn round(self) -> Self;
    /// `2^self` for integers in -126..=127, and 0 for -127.
    fn exp2_integer(self) -> Self;
    /// Sum of all lanes: lane `i` with lane `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    fn sum(self) -> f32;
    /// The greatest lane.
    fn greatest(self) -> f32;
    /// Lane `j` of vector `i` becomes lane `i` of vector `j`.
    fn transpose(rows: [Self; LANES]) -> [Self; LANES];

    /// Runs `kernel` compiled for this type's instructions, as a function of its own.
    unsafe fn call<K: Kernel>(kernel: K);
}

/// A computation written for any vector type. All that it calls must be `#[inline(always)]`, or
/// it is compiled without the vector instructions.
pub(crate) trait Kernel {
    /// # Safety
    /// The instructions of `V` must exist; and each kernel has rules on its pointers.
    unsafe fn run<V: F32x16>(self);
}

/// A set of vector instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Isa {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// All that this processor has, the best one last.
    pub(crate) fn available() -> Vec<Self> {
        let mut all = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                all.push(Self::Avx2);
            }
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
                all.push(Self::Avx512);
            }
        }
        all
    }

    /// The best that this processor has.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| *Self::available().last().expect("scalar is always there"))
    }
}

/// Runs `kernel` with the instructions of `isa`.
///
/// # Safety
/// The processor must have them, and the kernel's own rules must hold.
pub(crate) unsafe fn run<K: Kernel>(isa: Isa, kernel: K) {
    // SAFETY: as the caller promises.
    unsafe {
        match isa {
            Isa::Scalar => scalar::Scalar::call(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::call(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::call(kernel),
        }
    }
}

/// Asks for the cache line at `address`, which need not exist.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of every x86-64; a prefetch never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
