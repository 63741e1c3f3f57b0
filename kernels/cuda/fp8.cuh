// e4m3, an 8-bit float of range 448 (https://arxiv.org/abs/2209.05433), in pieces of eight.
#pragma once
#include "vector.cuh"

constexpr float E4M3_MAX = 448.0f;

__device__ __forceinline__ unsigned narrow_e4m3(float a, float b, float c, float d) {
  return float_to_e4m3(a) | (unsigned)float_to_e4m3(b) << 8 | (unsigned)float_to_e4m3(c) << 16 |
         (unsigned)float_to_e4m3(d) << 24;
}

// To the nearest, ties to even; what is beyond the range becomes its end.
__device__ __forceinline__ uint2 narrow_e4m3(const Floats& wide) {
  return make_uint2(narrow_e4m3(wide.at[0], wide.at[1], wide.at[2], wide.at[3]),
                    narrow_e4m3(wide.at[4], wide.at[5], wide.at[6], wide.at[7]));
}
