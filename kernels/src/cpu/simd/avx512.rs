//! Sixteen lanes in one register.
#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::x86_64::*;

use super::{F32x16, Kernel, LANES};

#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

/// A mask of the first `count` lanes.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    if count >= LANES { !0 } else { (1 << count) - 1 }
}

// SAFETY, for every block below: a value of this type exists only where AVX-512 F and DQ do (see
// `F32x16`), and constructors are called only there; memory is the caller's promise.
impl F32x16 for Avx512 {
    // 24 sums, two columns, one broadcast, of 32 registers.
    const TILE_ROWS: usize = 12;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, count: usize) -> Self {
        Self(unsafe { _mm512_maskz_loadu_ps(first(count), from) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u8) -> [Self; 2] {
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            [
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))),
                Self(_mm512_castsi512_ps(_mm512_and_si512(pairs, high))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, first(count), self.0) }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        Self(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
    }

    #[inline(always)]
    fn exp2_integer(self) -> Self {
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let (low, high) = (_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::sum(_mm256_add_ps(low, high))
        }
    }

    #[inline(always)]
    fn greatest(self) -> f32 {
        unsafe {
            let (low, high) = (_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::greatest(_mm256_max_ps(low, high))
        }
    }

    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        unsafe { transpose(rows) }
    }

    #[inline(always)]
    unsafe fn call<K: Kernel>(kernel: K) {
        #[target_feature(enable = "avx512f,avx512dq,avx2,fma,f16c")]
        unsafe fn with_features<K: Kernel>(kernel: K) {
            unsafe { kernel.run::<Avx512>() }
        }
        unsafe { with_features(kernel) }
    }
}

/// Pairs, then quads of rows are interleaved inside each 128-bit quarter; then quarters move.
#[inline(always)]
unsafe fn transpose(mut r: [Avx512; LANES]) -> [Avx512; LANES] {
    // SAFETY: the caller has such values.
    unsafe {
        let pd = |v: Avx512| _mm512_castps_pd(v.0);
        let ps = |v| Avx512(_mm512_castpd_ps(v));
        let mut t = r;
        for i in (0..16).step_by(2) {
            t[i] = Avx512(_mm512_unpacklo_ps(r[i].0, r[i + 1].0));
            t[i + 1] = Avx512(_mm512_unpackhi_ps(r[i].0, r[i + 1].0));
        }
        for i in (0..16).step_by(4) {
            r[i] = ps(_mm512_unpacklo_pd(pd(t[i]), pd(t[i + 2])));
            r[i + 1] = ps(_mm512_unpackhi_pd(pd(t[i]), pd(t[i + 2])));
            r[i + 2] = ps(_mm512_unpacklo_pd(pd(t[i + 1]), pd(t[i + 3])));
            r[i + 3] = ps(_mm512_unpackhi_pd(pd(t[i + 1]), pd(t[i + 3])));
        }
        for i in 0..4 {
            for half in [0, 8] {
                let (a, b) = (r[half + i].0, r[half + i + 4].0);
                t[half + i] = Avx512(_mm512_shuffle_f32x4::<0x88>(a, b));
                t[half + i + 4] = Avx512(_mm512_shuffle_f32x4::<0xdd>(a, b));
            }
        }
        for i in 0..4 {
            r[i] = Avx512(_mm512_shuffle_f32x4::<0x88>(t[i].0, t[i + 8].0));
            r[i + 8] = Avx512(_mm512_shuffle_f32x4::<0xdd>(t[i].0, t[i + 8].0));
            r[i + 4] = Avx512(_mm512_shuffle_f32x4::<0x88>(t[i + 4].0, t[i + 12].0));
            r[i + 12] = Avx512(_mm512_shuffle_f32x4::<0xdd>(t[i + 4].0, t[i + 12].0));
        }
        r
    }
}
