//! Sixteen lanes in two registers.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::x86_64::*;
use std::array::from_fn;

use super::{F32x16, Kernel, LANES};

const HALF: usize = LANES / 2;

#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

/// Lane `i` with `i + 4`, then `i + 2`, then `i + 1`.
#[inline(always)]
pub(super) unsafe fn sum(v: __m256) -> f32 {
    // SAFETY: the caller has AVX.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

#[inline(always)]
pub(super) unsafe fn greatest(v: __m256) -> f32 {
    // SAFETY: the caller has AVX.
    unsafe {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

// SAFETY, for every block below: a value of this type exists only where AVX2, FMA and F16C do (see
// `F32x16`), and constructors are called only there; memory is the caller's promise.
impl F32x16 for Avx2 {
    // 12 sums of 16 registers.
    const TILE_ROWS: usize = 3;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([unsafe { _mm256_set1_ps(x) }; 2])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(HALF))] })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> Self {
        let mut lanes = [0.0; LANES];
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count.min(LANES));
            Self::load(lanes.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        unsafe {
            let wide = |at: *const u8| {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            };
            Self([wide(from), wide(from.add(2 * HALF))])
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        unsafe {
            let wide = |at: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
            Self([wide(from), wide(from.add(2 * HALF))])
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2] {
        unsafe {
            let pairs = [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())];
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let low = |p| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(p));
            let high = |p| _mm256_castsi256_ps(_mm256_and_si256(p, mask));
            [Self([low(pairs[0]), low(pairs[1])]), Self([high(pairs[0]), high(pairs[1])])]
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0[0]);
            _mm256_storeu_ps(to.add(HALF), self.0[1]);
        }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, count: usize) {
        let mut lanes = [0.0; LANES];
        unsafe {
            self.store(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count.min(LANES));
        }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(from_fn(|i| unsafe { _mm256_fmadd_ps(self.0[i], b.0[i], c.0[i]) }))
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Self(from_fn(|i| unsafe { _mm256_add_ps(self.0[i], b.0[i]) }))
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        Self(from_fn(|i| unsafe { _mm256_sub_ps(self.0[i], b.0[i]) }))
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Self(from_fn(|i| unsafe { _mm256_mul_ps(self.0[i], b.0[i]) }))
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Self(from_fn(|i| unsafe { _mm256_div_ps(self.0[i], b.0[i]) }))
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        Self(from_fn(|i| unsafe { _mm256_max_ps(self.0[i], b.0[i]) }))
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Self(from_fn(|i| unsafe { _mm256_min_ps(self.0[i], b.0[i]) }))
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        Self(self.0.map(|v| unsafe { _mm256_round_ps::<NEAREST>(v) }))
    }

    #[inline(always)]
    fn exp2_integer(self) -> Self {
        Self(self.0.map(|v| unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe { sum(_mm256_add_ps(self.0[0], self.0[1])) }
    }

    #[inline(always)]
    fn greatest(self) -> f32 {
        unsafe { greatest(_mm256_max_ps(self.0[0], self.0[1])) }
    }

    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let quarter = |from: usize, half: usize| {
            // SAFETY: such values exist.
            unsafe { transpose8(from_fn(|i| rows[from + i].0[half])) }
        };
        let (a, b, c, d) = (quarter(0, 0), quarter(HALF, 0), quarter(0, 1), quarter(HALF, 1));
        from_fn(|i| Self(if i < HALF { [a[i], b[i]] } else { [c[i - HALF], d[i - HALF]] }))
    }

    #[inline(always)]
    unsafe fn call<K: Kernel>(kernel: K) {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn with_features<K: Kernel>(kernel: K) {
            unsafe { kernel.run::<Avx2>() }
        }
        unsafe { with_features(kernel) }
    }
}

#[inline(always)]
unsafe fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller has such values.
    unsafe {
        let pair = |i: usize| {
            let (a, b) = (r[2 * i], r[2 * i + 1]);
            (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b))
        };
        let quad = |i: usize| {
            let ((a, b), (c, d)) = (pair(2 * i), pair(2 * i + 1));
            [
                _mm256_shuffle_ps::<0x44>(a, c),
                _mm256_shuffle_ps::<0xee>(a, c),
                _mm256_shuffle_ps::<0x44>(b, d),
                _mm256_shuffle_ps::<0xee>(b, d),
            ]
        };
        let (top, bottom) = (quad(0), quad(1));
        from_fn(|i| {
            let (t, b) = (top[i % 4], bottom[i % 4]);
            if i < 4 {
                _mm256_permute2f128_ps::<0x20>(t, b)
            } else {
                _mm256_permute2f128_ps::<0x31>(t, b)
            }
        })
    }
}
