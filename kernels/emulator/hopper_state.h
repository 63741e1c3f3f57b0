// What hopper.h keeps of a block between instructions.
#pragma once
#include <cstdint>
#include "block.h"

namespace emulator {

// What the stand-in cuTensorMapEncodeTiled writes into the 128 bytes of a tensor map. Fastest dimension first.
struct TensorMapContents {
  unsigned char* base;
  uint64_t sizes[5];
  uint64_t strides[4];  // bytes, of dimensions 1 and up
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzle;
};
static_assert(sizeof(TensorMapContents) <= 128, "fits a CUtensorMap");
constexpr int SWIZZLE_128B = 3;

// A product D[64 x N] of a warpgroup: A from shared memory or from its threads' registers, B from shared memory.
struct Product {
  int n, element_bytes;
  bool a_in_registers, b_mn_major;
  uint64_t a, b;  // matrix descriptors
  unsigned registers[WARPGROUP][4];
  int issued = 0, collected = 0;  // threads
  bool done = false;
  std::vector<float> result;  // [64][n]
};

}  // namespace emulator
