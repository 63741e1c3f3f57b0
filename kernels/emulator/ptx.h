// The CPU's side of ptx.cuh: what each function is for is said there.
#pragma once
#include "block.h"
#include "types.h"

static inline unsigned shared_address(const void* p) { return emulator::shared_address(p); }

// --- cp.async: bytes arrive at the first barrier after they were waited for, or at once.
static inline void emulator_cp_async(void* to, const void* from, int bytes, bool valid) {
  emulator::shared_address(to);
  if (((uintptr_t)to | (valid ? (uintptr_t)from : 0)) % bytes) emulator::fail("copies %d bytes that are not aligned", bytes);
  emulator::Thread& t = *emulator::block.current;
  t.issued_copies.push_back({to, from, bytes, valid ? bytes : 0});
  if (!emulator::block.schedule.early) return;
  std::swap(t.issued_copies, t.arrived_copies);
  emulator::land_copies(t);
  t.issued_copies.clear();
}
static inline void cp_async_16(void* to, const void* from, bool valid = true) { emulator_cp_async(to, from, 16, valid); }
static inline void cp_async_commit() {
  emulator::Thread& t = *emulator::block.current;
  t.copy_groups.push_back(std::move(t.issued_copies));
  t.issued_copies.clear();
}
template <int N>
static inline void cp_async_wait() {
  emulator::Thread& t = *emulator::block.current;
  while ((int)t.copy_groups.size() > N) {
    auto& group = t.copy_groups.front();
    t.arrived_copies.insert(t.arrived_copies.end(), group.begin(), group.end());
    t.copy_groups.pop_front();
  }
}

// --- ldmatrix: lane 8 i + j holds the address of row j of matrix i.
static inline const void* emulator_matrix_row(const void* p) {
  emulator::shared_address(p);
  if ((uintptr_t)p % 16) emulator::fail("uses a matrix row at an address that is not aligned to 16 bytes");
  return p;
}
template <int MATRICES>
static inline void emulator_ldmatrix(unsigned (&r)[MATRICES], const void* row, bool transposed) {
  int lane = emulator::block.current->lane;
  if (lane < 8 * MATRICES) emulator_matrix_row(row);
  auto rows = emulator::meet(~0u, &row, sizeof row);
  for (int i = 0; i < MATRICES; i++) {
    uint16_t pair[2];
    for (int half = 0; half < 2; half++) {
      int fast = lane % 4 * 2 + half, slow = lane / 4;
      const uint16_t* from;
      memcpy(&from, rows[8 * i + (transposed ? fast : slow)], sizeof from);
      pair[half] = from[transposed ? slow : fast];
    }
    r[i] = pair[0] | (unsigned)pair[1] << 16;
  }
}
static inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { emulator_ldmatrix(r, row, false); }
static inline void ldmatrix_x2(unsigned (&r)[2], const void* row) { emulator_ldmatrix(r, row, false); }
static inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { emulator_ldmatrix(r, row, true); }
static inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) { emulator_ldmatrix(r, row, true); }

// --- mma.sync: K elements of BYTES bytes, four bytes a register. A[row][k] is in register (k >= K/2) * 2 + (row >= 8) of
// lane (row % 8) * 4 + (k % (K/2)) / (4/BYTES); B[k][column] in register k >= K/2 of lane column * 4 + the same.
static inline float emulator_element(unsigned word, int i, int bytes) {
  return bytes == 2 ? emulator_bits<float>((word >> 16 * i & 0xffff) << 16) : emulator_e4m3_to_float(word >> 8 * i & 0xff);
}
static inline float emulator_f16(unsigned word, int i, int) { return emulator_f16_to_float(word >> 16 * i & 0xffff); }
template <int BYTES, float (*ELEMENT)(unsigned, int, int) = emulator_element>
static inline void emulator_mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Fragment { unsigned a[4], b[2]; };
  constexpr int K = 32 / BYTES, HALF = K / 2, PER_WORD = 4 / BYTES;
  Fragment own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  auto slots = emulator::meet(~0u, &own, sizeof own);
  int lane = emulator::block.current->lane;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < K; k++) {
      int word = k % HALF / PER_WORD, element = k % PER_WORD;
      auto of_a = (const Fragment*)slots[row % 8 * 4 + word], of_b = (const Fragment*)slots[column * 4 + word];
      sum += ELEMENT(of_a->a[k / HALF * 2 + row / 8], element, BYTES) * ELEMENT(of_b->b[k / HALF], element, BYTES);
    }
    d[i] += sum;
  }
}
static inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emulator_mma<2>(d, a, b); }
static inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emulator_mma<2, emulator_f16>(d, a, b); }
static inline unsigned pack_f16(float low, float high) { return emulator_float_to_f16(low) | (unsigned)emulator_float_to_f16(high) << 16; }
struct F16x4 { unsigned low, high; };
static inline F16x4 e4m3x4_to_f16x4(unsigned four) {
  auto pair = [=](int i) { return pack_f16(emulator_e4m3_to_float(four >> 8 * i & 0xff), emulator_e4m3_to_float(four >> (8 * i + 8) & 0xff)); };
  return {pair(0), pair(2)};
}
static inline void mma_m16n8k32_e4m3(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emulator_mma<1>(d, a, b); }

// --- the rest
static inline float exp2_approx(float x) { return exp2f(x); }
static inline void barrier_sync(int number, int threads) { emulator::barrier(number, threads); }
static inline void barrier_arrive(int number, int threads) { emulator::barrier_arrive(number, threads); }
static inline float e4m3_to_float(uint8_t v) { return emulator_e4m3_to_float(v); }
static inline uint8_t float_to_e4m3(float f) { return emulator_float_to_e4m3(f); }
static inline float2 e4m3x2_to_float2(unsigned short v) { return {e4m3_to_float(v & 0xff), e4m3_to_float(v >> 8)}; }
