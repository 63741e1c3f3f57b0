// Rows of bf16 in pieces of 16 bytes, the widest access a thread has.
#pragma once
#include "ptx.cuh"

// Elements of one 16-byte access.
constexpr int VECTOR = 8;

struct Floats {
  float at[VECTOR];
};

__device__ __forceinline__ Floats widen(uint4 packed) {
  const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
  Floats wide;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // A bf16 is the upper half of a float, so widening is a shift.
    wide.at[2 * i] = __uint_as_float(words[i] << 16);
    wide.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return wide;
}

__device__ __forceinline__ unsigned narrow(float low, float high) {
  const unsigned first = __bfloat16_as_ushort(__float2bfloat16_rn(low));
  return first | (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(high)) << 16;
}

// To the nearest bf16, ties to even.
__device__ __forceinline__ uint4 narrow(const Floats& wide) {
  return make_uint4(narrow(wide.at[0], wide.at[1]), narrow(wide.at[2], wide.at[3]),
                    narrow(wide.at[4], wide.at[5]), narrow(wide.at[6], wide.at[7]));
}

__device__ __forceinline__ uint4 load_vector(const bf16* from) { return *reinterpret_cast<const uint4*>(from); }
__device__ __forceinline__ void store_vector(bf16* to, uint4 packed) { *reinterpret_cast<uint4*>(to) = packed; }
