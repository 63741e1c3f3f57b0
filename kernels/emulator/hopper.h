// The CPU's side of hopper.cuh: what each function is for is said there.
#pragma once
#include "hopper_state.h"
#include "ptx.h"

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

namespace emulator {
void mbarrier_init(unsigned barrier, int arrivals);
void mbarrier_arrive(unsigned barrier, int expected_bytes);
void mbarrier_wait(unsigned barrier, int parity);
void tma_load(unsigned to, const TensorMap* map, unsigned barrier, std::vector<int> corner);
void issue_product(float* accumulators, const Product& product, const unsigned* registers, bool accumulate);
void commit_products();
void wait_for_products(int groups_left);
}  // namespace emulator

static inline void mbarrier_init(unsigned barrier, int arrivals) { emulator::mbarrier_init(barrier, arrivals); }
static inline void fence_mbarrier_init() {}
static inline void fence_proxy_async() {}
static inline void mbarrier_arrive(unsigned barrier) { emulator::mbarrier_arrive(barrier, 0); }
static inline void mbarrier_arrive_expect(unsigned barrier, int bytes) { emulator::mbarrier_arrive(barrier, bytes); }
static inline void mbarrier_wait(unsigned barrier, int parity) { emulator::mbarrier_wait(barrier, parity); }

static inline void tma_load_2d(unsigned to, const TensorMap* map, unsigned barrier, int x, int y) {
  emulator::tma_load(to, map, barrier, {x, y});
}
static inline void tma_load_3d(unsigned to, const TensorMap* map, unsigned barrier, int x, int y, int z) {
  emulator::tma_load(to, map, barrier, {x, y, z});
}

template <int N, bool B_MN_MAJOR>
static inline void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  emulator::issue_product(d, {N, 2, false, B_MN_MAJOR, a, b}, nullptr, accumulate);
}
template <int N, bool B_MN_MAJOR>
static inline void wgmma_bf16(float (&d)[N / 2], const unsigned (&a)[4], uint64_t b, bool accumulate = true) {
  emulator::issue_product(d, {N, 2, true, B_MN_MAJOR, 0, b}, a, accumulate);
}
template <int N>
static inline void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  emulator::issue_product(d, {N, 1, false, false, a, b}, nullptr, accumulate);
}
template <int N>
static inline void wgmma_e4m3(float (&d)[N / 2], const unsigned (&a)[4], uint64_t b, bool accumulate = true) {
  emulator::issue_product(d, {N, 1, true, false, 0, b}, a, accumulate);
}
static inline void wgmma_fence() {}
static inline void wgmma_commit() { emulator::commit_products(); }
template <int N>
static inline void wgmma_wait() { emulator::wait_for_products(N); }
template <int N>
static inline void keep_registers(float (&)[N]) {}
static inline void finish_before_wait(float) {}
template <int REGISTERS>
static inline void take_registers() {}
template <int REGISTERS>
static inline void give_registers() {}
