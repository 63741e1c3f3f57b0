// Reductions over the threads of a block, in one order whatever the schedule.
#pragma once
#include "ptx.cuh"

constexpr int MAX_WARPS = 32;

struct Sum {
  template <class T>
  __device__ static T of(T a, T b) { return a + b; }
};
struct Greatest {
  template <class T>
  __device__ static T of(T a, T b) { return a > b ? a : b; }
};
struct Least {
  template <class T>
  __device__ static T of(T a, T b) { return a < b ? a : b; }
};

// Over `lanes` neighbouring lanes, a power of 2; each gets the result.
template <class Combine, class T>
__device__ __forceinline__ T warp_reduce(T value, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = Combine::of(value, __shfl_xor_sync(~0u, value, distance));
  }
  return value;
}

// Over the block, of whole warps; every thread gets the result. `partial` has room for a value of each warp; it may
// be used again at once.
template <class Combine, class T>
__device__ __forceinline__ T block_reduce(T value, T* partial) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  value = warp_reduce<Combine>(value);
  // Whoever is still reading the results of the reduction before this one.
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[warp] = value;
  __syncthreads();
  T result = partial[0];
  for (int i = 1; i < warps; i++) result = Combine::of(result, partial[i]);
  return result;
}
