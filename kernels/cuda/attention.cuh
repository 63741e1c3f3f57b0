// What both attention kernels use.
//
// Softmax is computed in powers of two: e^(s * scale) = 2^(s * scale * log2(e)), so that the scale, the conversion of the base and the
// subtraction of the maximum are one fused multiply-add.
#pragma once
#include "ptx.cuh"

constexpr unsigned ALL_LANES = 0xffffffff;

// Accumulators of mma and wgmma give a thread two rows, lane / 4 and 8 below it, so the four lanes of a quad share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// What to subtract from scaled scores. A row that has seen nothing yet has -inf, and -inf - -inf would be NaN.
__device__ __forceinline__ float softmax_base(float reference) { return reference == -INFINITY ? 0.0f : reference; }

// Two bf16 in a register, the first in the lower half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
