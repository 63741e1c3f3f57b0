// CUDA's qualifiers and types for g++.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
// Blocks run one after another, so one copy serves all. Each variable has a section of its own, as those of templates cannot
// share one with others; shared.ld puts them together.
#define EMULATOR_TEXT_OF(x) #x
#define EMULATOR_TEXT(x) EMULATOR_TEXT_OF(x)
#define __shared__ static __attribute__((section("baton_shared." EMULATOR_TEXT(__COUNTER__))))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define EMULATOR_VECTOR_2(T, name)                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };  \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define EMULATOR_VECTOR_4(T, name)                          \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };  \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR_2(float, float)
EMULATOR_VECTOR_4(float, float)
EMULATOR_VECTOR_2(int, int)
EMULATOR_VECTOR_4(int, int)
EMULATOR_VECTOR_2(unsigned, uint)
EMULATOR_VECTOR_4(unsigned, uint)
EMULATOR_VECTOR_4(unsigned char, uchar)

// The bits of a value, as another type of the same size.
template <class To, class From>
static inline To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "types of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// bfloat16: the upper half of a float, rounded to nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    uint32_t u = emulator_bits<uint32_t>(value);
    bool nan = (u & 0x7fffffff) > 0x7f800000;
    bits = nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return emulator_bits<float>((uint32_t)bits << 16); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
static inline float __bfloat162float(__nv_bfloat16 b) { return b; }
static inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
static inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
static inline float __low2float(__nv_bfloat162 b) { return b.x; }
static inline float __high2float(__nv_bfloat162 b) { return b.y; }
static inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
static inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) {
  return emulator_bits<__nv_bfloat16>((uint16_t)u);
}

// f16: sign, 5 bits of exponent (bias 15), 10 of mantissa.
static inline float emulator_f16_to_float(uint16_t v) {
  int exponent = v >> 10 & 31, mantissa = v & 1023;
  float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                    : exponent     ? ldexpf(1024 + mantissa, exponent - 25)
                                   : ldexpf(mantissa, -24);
  return v & 0x8000 ? -magnitude : magnitude;
}
// Rounded to nearest, ties to even; beyond the range it is infinite.
static inline uint16_t emulator_float_to_f16(float value) {
  uint16_t sign = emulator_bits<uint32_t>(value) >> 31 << 15;
  float magnitude = fabsf(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
  int steps = (int)nearbyintf(ldexpf(magnitude, 10 - exponent));
  return sign | (uint16_t)(steps + (exponent + 14) * 1024);
}

// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f is NaN, the greatest value is 448.
static inline float emulator_e4m3_to_float(uint8_t v) {
  int exponent = v >> 3 & 15, mantissa = v & 7;
  float magnitude = exponent == 15 && mantissa == 7 ? NAN
                    : exponent                      ? ldexpf(1 + mantissa / 8.f, exponent - 7)
                                                    : ldexpf(mantissa / 8.f, -6);
  return v & 0x80 ? -magnitude : magnitude;
}
// Rounded to nearest, ties to even; beyond the range it saturates.
static inline uint8_t emulator_float_to_e4m3(float value) {
  uint8_t sign = emulator_bits<uint32_t>(value) >> 31 << 7;
  float magnitude = fabsf(value);
  if (std::isnan(value)) return sign | 0x7f;
  if (magnitude >= 448.f) return sign | 0x7e;
  int exponent = magnitude < 0x1p-6f ? -6 : ilogbf(magnitude);
  // In steps of the last mantissa bit; 16 of them carry into the next exponent, as the encoding is monotonic.
  int steps = (int)nearbyintf(ldexpf(magnitude, 3 - exponent));
  return sign | (uint8_t)(steps + (exponent + 6) * 8);
}
