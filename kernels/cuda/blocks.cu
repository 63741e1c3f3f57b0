// Copies pieces of KV blocks between one layer's pool and a contiguous buffer, for transfers.
//
// A full piece is [k|v][kv_heads][block_tokens][head_dim]. A device that has only some of the heads (tensor parallelism) keeps pieces
// [k|v][its heads][block_tokens][head_dim], and so may the buffer, [blocks][k|v][some heads]...; what is copied is the run of heads that
// both have. Elements do not matter: everything is counted in units of 16 bytes.
#include "ptx.cuh"

// Units of 16 bytes that a thread has on the way at once.
constexpr int IN_FLIGHT = 4;

// Halves of pieces, k or v: how many units one has, and where in it those that are copied begin.
struct Halves {
  unsigned units, offset;
};

__device__ __forceinline__ void copy(uint4* to, const uint4* from, unsigned units) {
  const unsigned step = gridDim.x * blockDim.x;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < units; i += IN_FLIGHT * step) {
    uint4 held[IN_FLIGHT];
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
      if (i + j * step < units) held[j] = from[i + j * step];
    }
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
      if (i + j * step < units) to[i + j * step] = held[j];
    }
  }
}

// Where half `blockIdx.y` of the list begins.
__device__ __forceinline__ size_t in_pool(const unsigned* blocks, const Halves& halves) {
  return ((size_t)blocks[blockIdx.y / 2] * 2 + blockIdx.y % 2) * halves.units + halves.offset;
}
__device__ __forceinline__ size_t in_buffer(const Halves& halves) {
  return (size_t)blockIdx.y * halves.units + halves.offset;
}

// Grid: (any number, 2 * blocks). `pool` is one layer's; `run` units of each half are copied.
extern "C" __global__ void __launch_bounds__(256)
    gather_blocks(uint4* buffer, const uint4* pool, const unsigned* blocks, unsigned run, Halves of_buffer, Halves of_pool) {
  copy(buffer + in_buffer(of_buffer), pool + in_pool(blocks, of_pool), run);
}
REGISTER_KERNEL(gather_blocks)

extern "C" __global__ void __launch_bounds__(256)
    scatter_blocks(uint4* pool, const uint4* buffer, const unsigned* blocks, unsigned run, Halves of_buffer, Halves of_pool) {
  copy(pool + in_pool(blocks, of_pool), buffer + in_buffer(of_buffer), run);
}
REGISTER_KERNEL(scatter_blocks)
