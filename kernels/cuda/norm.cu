// Root mean square norms.
#include "ptx.cuh"

// The sum of a value over the threads of a block of whole warps, at most 1024, in a fixed order.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float of_warps[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  value = lane < warps ? of_warps[lane] : 0.f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// y = x / sqrt(mean(x^2) + epsilon) * weight, for each row of `width` elements. A block a row; width is a multiple of 8.
extern "C" __global__ void __launch_bounds__(1024) rms_norm(bf16* y, const bf16* x, const bf16* weight, int width, float epsilon) {
  const bf16* row = x + (size_t)blockIdx.x * width;
  float squares = 0;
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    uint4 eight = *(const uint4*)(row + i);
    for (int j = 0; j < 8; j++) {
      float v = __bfloat162float(((const bf16*)&eight)[j]);
      squares += v * v;
    }
  }
  float scale = rsqrtf(block_sum(squares) / width + epsilon);
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    uint4 eight = *(const uint4*)(row + i), of_weight = *(const uint4*)(weight + i), result;
    for (int j = 0; j < 8; j++)
      ((bf16*)&result)[j] = __float2bfloat16(__bfloat162float(((const bf16*)&eight)[j]) * scale * __bfloat162float(((const bf16*)&of_weight)[j]));
    *(uint4*)(y + (size_t)blockIdx.x * width + i) = result;
  }
}
REGISTER_KERNEL(rms_norm)
