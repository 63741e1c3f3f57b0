// CUDA's arithmetic intrinsics and atomics.
#pragma once
#include "types.h"

#define __expf expf
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __powf powf
#define __exp10f exp10f
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.f / a; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float rsqrtf(float a) { return 1.f / sqrtf(a); }
static inline float __saturatef(float a) { return a < 0 ? 0 : a > 1 ? 1 : a; }

// Whole turns are removed first, which is exact.
static inline void sincospi(double half_turns, double* sine, double* cosine) {
  double rest = (half_turns - 2 * nearbyint(half_turns / 2)) * M_PI;
  *sine = sin(rest);
  *cosine = cos(rest);
}

static inline int __popc(unsigned a) { return __builtin_popcount(a); }
static inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
static inline int __ffs(int a) { return __builtin_ffs(a); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }

static inline int __float_as_int(float a) { return emulator_bits<int>(a); }
static inline float __int_as_float(int a) { return emulator_bits<float>(a); }
static inline unsigned __float_as_uint(float a) { return emulator_bits<unsigned>(a); }
static inline float __uint_as_float(unsigned a) { return emulator_bits<float>(a); }

// CUDA takes mixed integer types; so does this.
template <class A, class B>
static inline auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
template <class A, class B>
static inline auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }

template <class T>
static inline T __ldg(const T* p) { return *p; }
template <class T>
static inline T __ldcg(const T* p) { return *p; }
template <class T>
static inline void __stcg(T* p, T value) { *p = value; }

// Threads switch only where they wait, so plain operations are atomic.
template <class T, class Change>
static inline T emulator_atomic(T* p, Change change) {
  T old = *p;
  *p = change(old);
  return old;
}
template <class T>
static inline T atomicAdd(T* p, T value) { return emulator_atomic(p, [&](T old) -> T { return old + value; }); }
template <class T>
static inline T atomicMax(T* p, T value) { return emulator_atomic(p, [&](T old) { return old > value ? old : value; }); }
template <class T>
static inline T atomicMin(T* p, T value) { return emulator_atomic(p, [&](T old) { return old < value ? old : value; }); }
template <class T>
static inline T atomicOr(T* p, T value) { return emulator_atomic(p, [&](T old) { return old | value; }); }
template <class T>
static inline T atomicExch(T* p, T value) { return emulator_atomic(p, [&](T) { return value; }); }
template <class T>
static inline T atomicCAS(T* p, T expected, T value) {
  return emulator_atomic(p, [&](T old) { return old == expected ? value : old; });
}
