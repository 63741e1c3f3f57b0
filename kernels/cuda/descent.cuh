// Finds where a running sum over ordered elements reaches a goal, without sorting them.
#pragma once
#include "reduce.cuh"

typedef unsigned long long u64;

constexpr int DIGIT_BITS = 10;
constexpr int BINS = 1 << DIGIT_BITS;

// Shared memory of a descent.
struct Descent {
  u64 bins[BINS];
  u64 partial[MAX_WARPS];
  unsigned digit;
  u64 before;
};

// The bin in which the running sum over `bins` reaches `goal`, and the sum before it.
__device__ __forceinline__ void find_bin(Descent& shared, u64 goal) {
  const int per_thread = BINS / blockDim.x, first = threadIdx.x * per_thread, lane = threadIdx.x % 32;
  u64 own = 0;
  for (int i = 0; i < per_thread; i++) own += shared.bins[first + i];
  u64 sum = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const u64 lower = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += lower;
  }
  if (lane == 31) shared.partial[threadIdx.x / 32] = sum;
  __syncthreads();
  for (unsigned warp = 0; warp < threadIdx.x / 32; warp++) sum += shared.partial[warp];
  u64 before = sum - own;
  if (before < goal && sum >= goal) {
    int bin = first;
    while (before + shared.bins[bin] < goal) before += shared.bins[bin++];
    shared.digit = bin;
    shared.before = before;
  }
  __syncthreads();
}

// The least rank such that the elements up to it add up to `goal`, which is from 1 to the sum of all. Ranks have
// `digits` digits of DIGIT_BITS bits. `each(visit)` calls visit(rank, amount) for every element of the calling thread.
// Each digit takes a pass over the elements.
template <class Each>
__device__ u64 first_reaching(Descent& shared, int digits, u64 goal, Each each) {
  u64 prefix = 0;
  for (int shift = (digits - 1) * DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) shared.bins[bin] = 0;
    __syncthreads();
    each([&](u64 rank, u64 amount) {
      if (rank >> shift >> DIGIT_BITS == prefix) atomicAdd(&shared.bins[rank >> shift & (BINS - 1)], amount);
    });
    __syncthreads();
    find_bin(shared, goal);
    prefix = prefix << DIGIT_BITS | shared.digit;
    goal -= shared.before;
    // The next pass clears the bins, which nobody reads any more; digit and sum are read before its next barrier.
  }
  return prefix;
}
