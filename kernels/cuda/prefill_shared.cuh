// What the warpgroups of prefill_attention.cu share: the shape of tiles, work, and shared memory with its barriers.
#pragma once
#include "attention.cuh"
#include "hopper.cuh"

namespace prefill {

constexpr int TILE_ROWS = 128;
constexpr int TILE_KEYS = 128;
constexpr int STAGES = 2;
constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2;
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
constexpr int CONSUMER_ROWS = TILE_ROWS / CONSUMERS;
// Operands lie in shared memory as columns of 64 elements: rows of 128 bytes, swizzled by the TMA in groups of 8.
constexpr int COLUMN = 64;
constexpr int ROW_BYTES = 128;
constexpr int COLUMN_BYTES = TILE_KEYS * ROW_BYTES;
constexpr int GROUP_BYTES = 8 * ROW_BYTES;
static_assert(TILE_ROWS == TILE_KEYS, "Q, K and V tiles have one layout");

// Rows of one sequence that are computed together. Made by the host, longest first.
struct Tile {
  unsigned row;       // of the batch, the first
  unsigned rows;      // tokens, at most TILE_ROWS / group
  unsigned position;  // of the first row in its sequence
  unsigned keys;      // keys of the sequence that have been written, at least position + rows
  unsigned table;     // row of the block tables
};

struct Arguments {
  const Tile* tiles;
  unsigned tile_count;
  const unsigned* tables;  // [sequences, table_width]
  unsigned table_width;
  unsigned group, kv_heads;  // query heads per KV head, KV heads
  unsigned pool_rows;        // rows of the KV tensor map; the row after the last reads as zeros
  unsigned window;           // keys that a row sees, its own included; 0: all
  float scale_log2;          // scale of scores * log2(e)
  bf16* out;                 // [rows, heads, D]
};

// A tile of one KV head, and the key tiles [first, end) that its rows see.
struct Work {
  Tile tile;
  int kv_head, first, end;
  int first_key, end_key;
};

__device__ __forceinline__ bool take_work(const Arguments& a, unsigned round, Work& work) {
  const unsigned column = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned index = round * gridDim.x + column;
  if (index >= a.tile_count * a.kv_heads) return false;
  const Tile tile = a.tiles[index / a.kv_heads];
  work.tile = tile;
  work.kv_head = index % a.kv_heads;
  work.first_key = a.window ? max((int)(tile.position + 1 - a.window), 0) : 0;
  work.end_key = tile.position + tile.rows;
  work.first = work.first_key / TILE_KEYS;
  work.end = (work.end_key + TILE_KEYS - 1) / TILE_KEYS;
  return true;
}

// Where things lie in shared memory, as shared addresses: Q | K ring | V ring | barriers.
template <int D>
struct Shared {
  static constexpr unsigned TILE_BYTES = TILE_KEYS * D * sizeof(bf16);
  static constexpr unsigned BARRIERS = (1 + 2 * STAGES) * TILE_BYTES;

  unsigned base;

  __device__ unsigned queries() const { return base; }
  __device__ unsigned keys(unsigned tile) const { return base + (1 + tile % STAGES) * TILE_BYTES; }
  __device__ unsigned values(unsigned tile) const { return base + (1 + STAGES + tile % STAGES) * TILE_BYTES; }

  __device__ unsigned barrier(unsigned number) const { return base + BARRIERS + 8 * number; }
  __device__ unsigned queries_full() const { return barrier(0); }
  __device__ unsigned queries_empty() const { return barrier(1); }
  __device__ unsigned tail_loaded() const { return barrier(2); }
  __device__ unsigned keys_full(unsigned tile) const { return barrier(3 + tile % STAGES); }
  __device__ unsigned keys_empty(unsigned tile) const { return barrier(3 + STAGES + tile % STAGES); }
  __device__ unsigned values_full(unsigned tile) const { return barrier(3 + 2 * STAGES + tile % STAGES); }
  __device__ unsigned values_empty(unsigned tile) const { return barrier(3 + 3 * STAGES + tile % STAGES); }

  __device__ void initialise() const {
    mbarrier_init(queries_full(), 1);
    mbarrier_init(queries_empty(), CONSUMER_WARPS);
    mbarrier_init(tail_loaded(), 1);
    for (unsigned stage = 0; stage < STAGES; stage++) {
      mbarrier_init(keys_full(stage), 1);
      mbarrier_init(keys_empty(stage), CONSUMER_WARPS);
      mbarrier_init(values_full(stage), 1);
      mbarrier_init(values_empty(stage), CONSUMER_WARPS);
    }
    fence_mbarrier_init();
  }
};

// Parity of the phase in which a ring's stage holds key tile number `tile` of all that the block ever takes.
__device__ __forceinline__ int full_phase(unsigned tile) { return tile / STAGES & 1; }
// Parity of the phase before: a stage is free when its last use has ended. It passes at once on a fresh barrier.
__device__ __forceinline__ int empty_phase(unsigned tile) { return full_phase(tile) ^ 1; }

}  // namespace prefill
