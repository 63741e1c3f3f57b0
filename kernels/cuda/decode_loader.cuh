// How a warp of decode_attention.cu copies keys and values.
#pragma once
#include "decode_shared.cuh"

namespace decode {

// Copies the keys and values of one warp's steps, item after item.
template <int D, bool E4M3>
struct Loader {
  using S = Shape<D, E4M3>;

  const Arguments& a;
  unsigned char* ring;
  int head, warp, lane;
  unsigned item, end;  // of the items that the block has, the one it is at
  unsigned table = 0, first_key = 0, end_key = 0;
  int step = 0, steps = 0;
  unsigned block = 0;  // of the next step; read one step ahead
  unsigned loaded = 0;

  __device__ void start() {
    item--;
    advance();
  }

  // Copies the next step, if there is one. Always a group, so that groups count steps.
  __device__ void load() {
    if (item < end) {
      const unsigned key = first_key + step * STEP_KEYS;
      if (key + STEP_KEYS <= end_key) copy<true>(key);
      else copy<false>(key);
      advance();
    }
    cp_async_commit();
    loaded++;
  }

  // Slots after the last key hold anything, and 0 * NaN is NaN: they become zeros.
  template <bool WHOLE>
  __device__ void copy(unsigned key) const {
    unsigned char* to = ring + loaded % S::STAGES * S::STEP_BYTES;
    const unsigned slot = key & ((1u << a.block_shift) - 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const size_t row = ((((size_t)block * 2 + half) * a.kv_heads + head) << a.block_shift) + slot;
      const unsigned char* from = a.pool + row * S::ROW_BYTES + lane * 16;
#pragma unroll
      for (int i = 0; i < S::PIECES / 2; i++) {
        const int piece = i * 32 + lane, in_row = piece / S::PIECES;
        cp_async_16(to + half * S::HALF_BYTES + S::place(in_row, piece % S::PIECES), from + i * 512, WHOLE || key + in_row < end_key);
      }
    }
  }

  __device__ void advance() {
    step += WARPS;
    while (step >= steps) {
      if (++item >= end) return;
      const Item& next = a.items[item];
      table = next.table;
      first_key = next.first_key;
      end_key = next.end_key;
      steps = steps_of(first_key, end_key);
      step = warp;
    }
    block = a.tables[(size_t)table * a.table_width + ((first_key + step * STEP_KEYS) >> a.block_shift)];
  }
};

}  // namespace decode
