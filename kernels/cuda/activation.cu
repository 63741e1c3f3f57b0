// The gated activation of the MLP.
#include "vector.cuh"

// The approximations err by a few parts in 10^7, and an exact division would cost more time than the memory.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// out: [rows, width] = silu(gate) * up, where a row of gate_up: [rows, 2 width] is gate, then up; silu(g) = g / (1 + e^-g).
// Grid: (rows, 2048 elements of a row each).
extern "C" __global__ void __launch_bounds__(256) silu_mul(bf16* out, const bf16* gate_up, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
  if (column >= width) return;
  const size_t start = (size_t)blockIdx.x * width;
  const bf16* from = gate_up + 2 * start + column;
  const Floats gate = widen(load_vector(from)), up = widen(load_vector(from + width));
  Floats product;
#pragma unroll
  for (int i = 0; i < VECTOR; i++) product.at[i] = silu(gate.at[i]) * up.at[i];
  store_vector(out + start + column, narrow(product));
}
REGISTER_KERNEL(silu_mul)
