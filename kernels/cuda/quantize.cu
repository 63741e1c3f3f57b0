// bf16 rows to e4m3 with one scale each: rows of activations, or rows of a weight matrix (its output channels).
#include "fp8.cuh"
#include "reduce.cuh"

// 16-byte pieces of a row that a thread keeps: rows of up to 4 * 8 * 1024 elements.
constexpr int PIECES = 4;

__device__ __forceinline__ int place(int i) { return (i * blockDim.x + threadIdx.x) * VECTOR; }

__device__ __forceinline__ float greatest_magnitude(const Floats& values) {
  float greatest = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; i++) greatest = fmaxf(greatest, fabsf(values.at[i]));
  return greatest;
}

// values: [rows, width] = x / scale, scales: [rows], where a row's scale takes its greatest magnitude to the end of the
// range. x ~ values * scale. One block per row.
extern "C" __global__ void __launch_bounds__(1024)
    quantize_rows(unsigned char* values, float* scales, const bf16* x, int width) {
  __shared__ float partial[MAX_WARPS];
  const size_t start = (size_t)blockIdx.x * width;
  uint4 row[PIECES];
  float greatest = 0;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    row[i] = place(i) < width ? load_vector(x + start + place(i)) : make_uint4(0, 0, 0, 0);
    greatest = fmaxf(greatest, greatest_magnitude(widen(row[i])));
  }
  greatest = block_reduce<Greatest>(greatest, partial);
  // A row of zeros has any scale; a row whose scale would be too small to divide by becomes zeros.
  const float scale = fmaxf(greatest / E4M3_MAX, 1e-30f);
  const float inverse = 1.0f / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    if (place(i) >= width) continue;
    Floats scaled = widen(row[i]);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) scaled.at[j] *= inverse;
    *reinterpret_cast<uint2*>(values + start + place(i)) = narrow_e4m3(scaled);
  }
}
REGISTER_KERNEL(quantize_rows)

// x: [rows, width] = values * scales, to look at what quantisation does. Grid: (rows, 256 elements of a row each).
extern "C" __global__ void __launch_bounds__(256)
    dequantize_rows(bf16* x, const unsigned char* values, const float* scales, int width) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= width) return;
  const size_t at = (size_t)blockIdx.x * width + column;
  x[at] = __float2bfloat16_rn(e4m3_to_float(values[at]) * scales[blockIdx.x]);
}
REGISTER_KERNEL(dequantize_rows)
