// What lanes of a warp do together, and barriers of a block.
#pragma once
#include "block.h"

static inline void __syncthreads() { emulator::barrier(0, 0); }
static inline void __syncwarp(unsigned mask = ~0u) { emulator::meet(mask, nullptr, 0); }
// The emulator's memory is strongly ordered, so fences do nothing; a missing fence is not found.
static inline void __threadfence() {}
static inline void __threadfence_block() {}

// The value of lane `source`.
template <class T>
static inline T emulator_shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= emulator::SLOT_BYTES, "a value that fits its slot");
  auto slots = emulator::meet(mask, &value, sizeof(T));
  if (!(mask >> (source & 31) & 1)) emulator::fail("shuffles from lane %d, which is not in its mask %#x", source, mask);
  T result;
  memcpy(&result, slots[source & 31], sizeof(T));
  return result;
}
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  int lane = emulator::block.current->lane;
  return emulator_shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int lane = emulator::block.current->lane, source = lane ^ bits;
  return emulator_shuffle(mask, value, source / width <= lane / width ? source : lane);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int lane = emulator::block.current->lane, source = lane + (int)delta;
  return emulator_shuffle(mask, value, source / width == lane / width ? source : lane);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int lane = emulator::block.current->lane, source = lane - (int)delta;
  return emulator_shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto slots = emulator::meet(mask, &predicate, sizeof predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < emulator::WARP; lane++) {
    int vote = 0;
    if (mask >> lane & 1) memcpy(&vote, slots[lane], sizeof vote);
    votes |= (unsigned)(vote != 0) << lane;
  }
  return votes;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
static inline unsigned __activemask() { return ~0u; }

template <class T, class Combine>
static inline T emulator_reduce(unsigned mask, T value, Combine combine) {
  auto slots = emulator::meet(mask, &value, sizeof value);
  bool first = true;
  T result = value;
  for (int lane = 0; lane < emulator::WARP; lane++) {
    if (!(mask >> lane & 1)) continue;
    T other;
    memcpy(&other, slots[lane], sizeof other);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}
template <class T>
static inline T __reduce_add_sync(unsigned mask, T value) {
  return emulator_reduce(mask, value, [](T a, T b) { return a + b; });
}
template <class T>
static inline T __reduce_max_sync(unsigned mask, T value) {
  return emulator_reduce(mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
static inline T __reduce_min_sync(unsigned mask, T value) {
  return emulator_reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}
