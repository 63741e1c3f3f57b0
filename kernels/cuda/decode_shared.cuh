// What the parts of decode_attention.cu share: work, and the layout of shared memory.
#pragma once
#include "attention.cuh"

namespace decode {

constexpr int WARPS = 4;
constexpr int QUERY_ROWS = 16;
constexpr int STEP_KEYS = 16;

// Keys [first_key, end_key) of a unit: `rows` query rows of one sequence, the first at `position` and row `row` of the batch. The unit's
// items are `parts` consecutive ones, from number `first_part` on.
struct Item {
  unsigned row, rows, position;
  unsigned table;     // row of the block tables
  unsigned first_key; // a multiple of STEP_KEYS
  unsigned end_key;
  unsigned first_part, parts;
};

struct Arguments {
  const Item* items;
  const unsigned* shares;  // worker w has items shares[w] to shares[w + 1]
  const unsigned* tables;  // [sequences, table_width]
  unsigned table_width, block_shift;  // log2 of tokens per block
  const unsigned char* pool;
  const bf16* queries;    // rows of query_stride elements, which begin with [heads, D]
  unsigned query_stride;
  unsigned group, kv_heads, window;
  float score_scale;  // scale of scores * log2(e) * scale of keys
  float value_scale;  // of values
  bf16* out;               // [rows, heads, D]
  // Of items whose unit has several: sums [items, kv_heads, QUERY_ROWS, D] of values times their weights, and
  // [items, kv_heads, QUERY_ROWS] pairs of reference and sum of weights. `arrived`: [items, kv_heads], zero before and after.
  float* part_sums;
  float2* part_weights;
  unsigned* arrived;
};

template <int D, bool E4M3>
struct Shape {
  static constexpr int ROW_BYTES = E4M3 ? D : 2 * D;
  static constexpr int PIECES = ROW_BYTES / 16;  // of 16 bytes, in a row
  static constexpr int HALF_BYTES = STEP_KEYS * ROW_BYTES;  // keys or values of a step
  static constexpr int STEP_BYTES = 2 * HALF_BYTES;
  static constexpr int STAGES = 24576 / STEP_BYTES < 8 ? 24576 / STEP_BYTES : 8;
  static constexpr int RING_BYTES = STAGES * STEP_BYTES;
  // Shared memory: rings | sums of the block [QUERY_ROWS, D] | greatest and sum of each warp's rows | a flag.
  static constexpr int SUMS = WARPS * RING_BYTES;
  static constexpr int WEIGHTS = SUMS + QUERY_ROWS * D * 4;
  // Factors of so many parts fit where the sums are.
  static constexpr int PART_FACTORS = D;
  static constexpr int FLAG = WEIGHTS + WARPS * QUERY_ROWS * 8;

  // Where a piece of a row lies in its half: rows of ldmatrix, 8 at a time, in different banks.
  __device__ static int place(int row, int piece) {
    const int swizzle = PIECES >= 8 ? row % 8 : row / 2 % 4;
    return row * ROW_BYTES + (piece ^ swizzle) * 16;
  }
};

// Steps of an item: warp w takes numbers w, w + WARPS, ...
__device__ __forceinline__ int steps_of(unsigned first_key, unsigned end_key) {
  return (end_key - first_key + STEP_KEYS - 1) / STEP_KEYS;
}

}  // namespace decode
