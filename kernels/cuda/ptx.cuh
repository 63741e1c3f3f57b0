// Every instruction that C++ has no words for, up to Ampere (Ada for fp8). Kernels contain no asm of their own, so that they run
// on a CPU too: there these functions are emulator/ptx.h.
//
// Rules for kernels: dynamic shared memory by DYNAMIC_SHARED only, and only there do cp.async, ldmatrix, TMA and wgmma work in
// the emulator; no block waits for another; a kernel is `extern "C" __global__` and followed by REGISTER_KERNEL(name).
#pragma once
#ifdef BATON_EMULATOR
#include "../emulator/ptx.h"
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::block.shared
#else
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <stdint.h>
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define REGISTER_KERNEL(name)

// Address in the shared window, as instructions take it.
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// --- cp.async: global to shared memory. Zeros if not `valid`; the address must be aligned all the same.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the N newest groups of this thread are under way. A barrier must follow before other threads' bytes are read.
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// --- ldmatrix: 8x8 matrices of 16 bit elements; lane 8 i + j gives the address of row j of matrix i. Register i of a lane
// gets elements (lane / 4, lane % 4 * 2 + {0, 1}) of matrix i, or of its transpose.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// --- mma.sync: D[16x8] += A[16xK] B[Kx8] in f32, by a warp.
// bf16, K = 16. Lane l, g = l / 4, c = l % 4 * 2: a = {A[g][c..], A[g+8][c..], A[g][c+8..], A[g+8][c+8..]}, b = {B[c..][g], B[c+8..][g]},
// d = {D[g][c], D[g][c+1], D[g+8][c], D[g+8][c+1]}.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// f16, K = 16, laid out as bf16.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four e4m3 in a register to f16, which holds them exactly.
struct F16x4 {
  unsigned low, high;  // the first two, the last two
};
__device__ __forceinline__ F16x4 e4m3x4_to_f16x4(unsigned four) {
  F16x4 wide;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(wide.low), "=r"(wide.high) : "r"(four));
#else
  // As the upper bytes of f16, one place to the right under the sign, they are 2^-8 of their value: exponents' biases are 7 and 15.
  const unsigned low = __byte_perm(four, 0, 0x1404), high = __byte_perm(four, 0, 0x3424);
  asm("mul.rn.f16x2 %0, %1, 0x5c005c00;" : "=r"(wide.low) : "r"((low & 0x80008000) | (low >> 1 & 0x3f803f80)));
  asm("mul.rn.f16x2 %0, %1, 0x5c005c00;" : "=r"(wide.high) : "r"((high & 0x80008000) | (high >> 1 & 0x3f803f80)));
#endif
  return wide;
}
// Two f16 in a register, the first in the lower half.
__device__ __forceinline__ unsigned pack_f16(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#if __CUDA_ARCH__ >= 890
// e4m3, K = 32: as above with c = l % 4 * 4 and 16 for 8 in k.
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// 2^x, with a relative error of about 2^-22; subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Barriers 1 to 15 of a block, for some of its threads (whole warps). __syncthreads is number 0.
__device__ __forceinline__ void barrier_sync(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
__device__ __forceinline__ void barrier_arrive(int number, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

// --- e4m3, as bytes: rounded to nearest even, saturating at 448.
__device__ __forceinline__ uint8_t float_to_e4m3(float f) { return __nv_cvt_float_to_fp8(f, __NV_SATFINITE, __NV_E4M3); }
__device__ __forceinline__ float2 e4m3x2_to_float2(unsigned short v) { return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(v, __NV_E4M3))); }
__device__ __forceinline__ float e4m3_to_float(uint8_t v) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(v, __NV_E4M3))); }
#endif

typedef __nv_bfloat16 bf16;
