// Blocks of an e4m3 cache as bf16, for kernels that read bf16. bf16 holds every e4m3 number, so with a scale of 1 nothing is rounded.
#include "fp8.cuh"

// Elements of one 16-byte load.
constexpr int UNIT = 16;
// Units that a thread has on the way at once.
constexpr int IN_FLIGHT = 4;

__device__ __forceinline__ uint4 widened(unsigned four, unsigned next_four, float scale) {
  const unsigned short pairs[4] = {(unsigned short)four, (unsigned short)(four >> 16), (unsigned short)next_four,
                                   (unsigned short)(next_four >> 16)};
  Floats wide;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = e4m3x2_to_float2(pairs[i]);
    wide.at[2 * i] = two.x * scale;
    wide.at[2 * i + 1] = two.y * scale;
  }
  return narrow(wide);
}

// wide: [listed][k|v][half], the pieces of one layer's pool [blocks][k|v][half] that `blocks` lists, times the scale of keys or of
// values. A half is of `units` units. Grid: (2 * listed, any number).
extern "C" __global__ void __launch_bounds__(256)
    widen_blocks(bf16* wide, const uint4* pool, const unsigned* blocks, unsigned units, float k_scale, float v_scale) {
  const bool is_v = blockIdx.x % 2;
  const float scale = is_v ? v_scale : k_scale;
  const uint4* from = pool + ((size_t)blocks[blockIdx.x / 2] * 2 + is_v) * units;
  bf16* to = wide + (size_t)blockIdx.x * units * UNIT;
  const unsigned step = gridDim.y * blockDim.x;
  for (unsigned i = blockIdx.y * blockDim.x + threadIdx.x; i < units; i += IN_FLIGHT * step) {
    uint4 held[IN_FLIGHT];
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
      if (i + j * step < units) held[j] = from[i + j * step];
    }
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
      if (i + j * step >= units) continue;
      bf16* at = to + (size_t)(i + j * step) * UNIT;
      store_vector(at, widened(held[j].x, held[j].y, scale));
      store_vector(at + VECTOR, widened(held[j].z, held[j].w, scale));
    }
  }
}
REGISTER_KERNEL(widen_blocks)
