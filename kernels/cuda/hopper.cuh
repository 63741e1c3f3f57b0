// Hopper's own instructions (sm_90a): mbarrier, TMA, wgmma. On a CPU they are emulator/hopper.h.
// Addresses in shared memory are those of shared_address.
#pragma once
#include "ptx.cuh"
#ifdef BATON_EMULATOR
#include "../emulator/hopper.h"
#else

// What cuTensorMapEncodeTiled makes. A kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// --- mbarrier: a phase ends when `arrivals` threads have arrived and all expected bytes have. Phases alternate in parity, from 0.
__device__ __forceinline__ void mbarrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After initialising, before a barrier of the block: so that TMA sees it.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Between ordinary stores to shared memory and TMA or wgmma reading them (by the writing thread, before the barrier).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for `bytes` that TMA brings.
__device__ __forceinline__ void mbarrier_arrive_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended. A fresh barrier passes with parity 1.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

// --- TMA: one thread brings a box of a tensor; coordinates are those of the box's first element, fastest dimension first.
// Outside of the tensor there are zeros (which count as bytes all the same).
__device__ __forceinline__ void tma_load_2d(unsigned to, const TensorMap* map, unsigned barrier, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void tma_load_3d(unsigned to, const TensorMap* map, unsigned barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];"
               ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}

// --- wgmma: D[64xN] (+)= A[64xK] B[KxN] in f32, by the 128 threads of a warpgroup. Thread t, l = t % 32: d[i] is
// D[t / 32 * 16 + l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2]. Without `accumulate` D begins at 0.
// Operands in shared memory are given by matrix_descriptor; A may be in registers, as for mma_m16n8k16 with 16 rows a warp.
// bf16 has K = 16; e4m3 has K = 32. B is stored [N][K] (K-major), or with B_MN_MAJOR [K][N] (bf16 only).
#define BATON_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BATON_D16(i) BATON_D4(i), BATON_D4(i + 4), BATON_D4(i + 8), BATON_D4(i + 12)
#define BATON_D32 BATON_D16(0), BATON_D16(16)
#define BATON_D64 BATON_D32, BATON_D16(32), BATON_D16(48)
#define BATON_REGISTERS_32 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define BATON_REGISTERS_64 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
// One instruction: SHAPE, its registers and operands, then the numbers of the operands that follow the accumulators.
#define BATON_WGMMA(SHAPE, REGISTERS, D, A, TAIL, P, ...)                                              \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" P ", 0;\n"                       \
               "wgmma.mma_async.sync.aligned." SHAPE " " REGISTERS ", " A ", accumulate, 1, 1" TAIL ";\n}" \
               : D : __VA_ARGS__)
#define BATON_A_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
template <int N, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(N == 128, "add this width here");
  BATON_WGMMA("m64n128k16.f32.bf16.bf16", BATON_REGISTERS_64, BATON_D64, "%64, %65", ", 0, %67", "66", "l"(a), "l"(b), "r"((int)accumulate), "n"(B_MN_MAJOR));
}
template <int N, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const unsigned (&a)[4], uint64_t b, bool accumulate = true) {
  if constexpr (N == 64)
    BATON_WGMMA("m64n64k16.f32.bf16.bf16", BATON_REGISTERS_32, BATON_D32, "{%32,%33,%34,%35}, %36", ", %38", "37", BATON_A_REGISTERS, "l"(b), "r"((int)accumulate), "n"(B_MN_MAJOR));
  else if constexpr (N == 128)
    BATON_WGMMA("m64n128k16.f32.bf16.bf16", BATON_REGISTERS_64, BATON_D64, "{%64,%65,%66,%67}, %68", ", %70", "69", BATON_A_REGISTERS, "l"(b), "r"((int)accumulate), "n"(B_MN_MAJOR));
  else
    static_assert(N == 0, "add this width here");
}
template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(N == 128, "add this width here");
  BATON_WGMMA("m64n128k32.f32.e4m3.e4m3", BATON_REGISTERS_64, BATON_D64, "%64, %65", "", "66", "l"(a), "l"(b), "r"((int)accumulate));
}
template <int N>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[N / 2], const unsigned (&a)[4], uint64_t b, bool accumulate = true) {
  static_assert(N == 128, "add this width here");
  BATON_WGMMA("m64n128k32.f32.e4m3.e4m3", BATON_REGISTERS_64, BATON_D64, "{%64,%65,%66,%67}, %68", "", "69", BATON_A_REGISTERS, "l"(b), "r"((int)accumulate));
}

// Before the first wgmma after ordinary code wrote its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the N newest groups are under way. Only then may their registers be read and their operands overwritten.
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving accesses to accumulators across a wgmma_wait.
template <int N>
__device__ __forceinline__ void keep_registers(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// Makes the assembler compute `x`, which is not negative, before a wait that follows. It would move the wait up otherwise, and what
// was to run beside products would run after them. (It moves waits over arithmetic, but not over a predicated instruction.)
__device__ __forceinline__ void finish_before_wait(float x) {
  asm volatile("{\n.reg .pred negative;\nsetp.lt.f32 negative, %0, 0f00000000;\n@negative nanosleep.u32 1;\n}" ::"f"(x) : "memory");
}

// Moves registers between warpgroups: consumers take what a producer gives. The whole warpgroup calls it, in one branch.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
#endif

// An operand of wgmma in shared memory with 128 byte swizzle, at an address aligned to 1024 plus the offset of its first k.
// K-major (rows of 128 bytes): `stride` is from 8 rows to the next 8, 1024 for a whole tile; `leading` is not used.
// MN-major (64 elements of m or n side by side): `leading` is from 64 elements to the next 64, `stride` from 8 k to the next 8.
__device__ __forceinline__ uint64_t matrix_descriptor(unsigned address, unsigned leading, unsigned stride) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}
