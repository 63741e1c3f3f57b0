// One tile of a matrix product by each way that the tensor cores are fed: not used by models, but to compare the
// emulator's model of the instructions with a device. All are C[M x N] = A[M x K] B^T for B[N x K] or A B for B[K x N].
#include "hopper.cuh"

// TMA brings 64 k at a time into a ring of two stages; a warpgroup multiplies, a warp of another one loads.
constexpr int ROWS = 64, COLUMNS = 128, STAGES = 2;
constexpr int ROW_BYTES = 128;  // of an operand's tile: 64 bf16 or 128 e4m3
// What a thread that multiplies takes (setmaxnreg). All have as many at entry, so it should not have to wait; 232 if it does.
constexpr int REGISTERS = 240;
constexpr int A_BYTES = ROWS * ROW_BYTES, B_BYTES = COLUMNS * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;

// What differs: how B lies and what elements are.
template <bool B_MN_MAJOR, bool E4M3, bool A_IN_REGISTERS>
__device__ __forceinline__ void multiply_stage(float (&d)[COLUMNS / 2], const unsigned char* a, unsigned b, bool first) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 0; step < 4; step++) {
    uint64_t of_b = B_MN_MAJOR ? matrix_descriptor(b + step * 2048, 8192, 1024) : matrix_descriptor(b + step * 32, 16, 1024);
    bool accumulate = !first || step > 0;
    if constexpr (A_IN_REGISTERS) {
      // Rows of 128 bytes; ldmatrix takes 16 bytes of a row, where the swizzle put them.
      unsigned r[4];
      int row = warp * 16 + lane % 16, unit = (step * 2 + lane / 16) ^ row % 8;
      ldmatrix_x4(r, a + row * ROW_BYTES + unit * 16);
      wgmma_fence();
      if constexpr (E4M3) wgmma_e4m3<COLUMNS>(d, r, of_b, accumulate);
      else wgmma_bf16<COLUMNS, B_MN_MAJOR>(d, r, of_b, accumulate);
      wgmma_commit();
      wgmma_wait<0>();  // not seen by the emulator: before its registers are loaded anew
    } else {
      uint64_t of_a = matrix_descriptor(shared_address(a) + step * 32, 16, 1024);
      if constexpr (E4M3) wgmma_e4m3<COLUMNS>(d, of_a, of_b, accumulate);
      else wgmma_bf16<COLUMNS, B_MN_MAJOR>(d, of_a, of_b, accumulate);
    }
  }
}

template <bool B_MN_MAJOR, bool E4M3, bool A_IN_REGISTERS>
__device__ __forceinline__ void wgmma_tile(float* c, const TensorMap* a, const TensorMap* b, int depth) {
  DYNAMIC_SHARED(shared);
  constexpr int ELEMENTS = E4M3 ? 128 : 64;  // of k in a stage
  unsigned ring = shared_address(shared), full = ring + STAGES * STAGE_BYTES, empty = full + STAGES * 8;
  int stages = depth / ELEMENTS;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(full + s * 8, 1);
      mbarrier_init(empty + s * 8, 128);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    give_registers<24>();
    if (threadIdx.x == 128) {
      for (int i = 0; i < stages; i++) {
        int s = i % STAGES;
        mbarrier_wait(empty + s * 8, (i / STAGES + 1) % 2);
        mbarrier_arrive_expect(full + s * 8, STAGE_BYTES);
        unsigned to = ring + s * STAGE_BYTES;
        tma_load_2d(to, a, full + s * 8, i * ELEMENTS, 0);
        tma_load_2d(to + A_BYTES, b, full + s * 8, B_MN_MAJOR ? 0 : i * ELEMENTS, B_MN_MAJOR ? i * ELEMENTS : 0);
        if (B_MN_MAJOR) tma_load_2d(to + A_BYTES + B_BYTES / 2, b, full + s * 8, 64, i * ELEMENTS);
      }
    }
  } else {
    take_registers<REGISTERS>();
    float d[COLUMNS / 2];
    for (int i = 0; i < stages; i++) {
      int s = i % STAGES;
      mbarrier_wait(full + s * 8, i / STAGES % 2);
      const unsigned char* stage = shared + s * STAGE_BYTES;
      wgmma_fence();
      multiply_stage<B_MN_MAJOR, E4M3, A_IN_REGISTERS>(d, stage, ring + s * STAGE_BYTES + A_BYTES, i == 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep_registers(d);
      mbarrier_arrive(empty + s * 8);
    }
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) {
      int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      c[row * COLUMNS + column] = d[i];
    }
  }
}

#define WGMMA_TILE(name, ...)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256, 1)                                                             \
      name(float* c, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int depth) { \
    wgmma_tile<__VA_ARGS__>(c, &a, &b, depth);                                                                     \
  }                                                                                                                \
  REGISTER_KERNEL(name)
WGMMA_TILE(wgmma_tile_nt, false, false, false)
WGMMA_TILE(wgmma_tile_nn, true, false, false)
WGMMA_TILE(wgmma_tile_registers_nt, false, false, true)
WGMMA_TILE(wgmma_tile_registers_nn, true, false, true)
WGMMA_TILE(wgmma_tile_e4m3, false, true, false)
WGMMA_TILE(wgmma_tile_registers_e4m3, false, true, true)

// C[16 x 8] by one warp: cp.async into shared memory, ldmatrix, mma. Rows are `depth` elements, of one or two bytes.
template <bool E4M3, bool B_TRANSPOSED>
__device__ __forceinline__ void mma_tile(float* c, const unsigned char* a, const unsigned char* b, int depth) {
  DYNAMIC_SHARED(shared);
  constexpr int STEP_BYTES = 32, LEADING = STEP_BYTES + 16;  // a row of a step, padded against bank conflicts
  unsigned char *of_a = shared, *of_b = shared + 16 * LEADING;
  int lane = threadIdx.x, row_bytes = depth * (E4M3 ? 1 : 2);
  float d[4] = {0, 0, 0, 0};
  for (int at = 0; at < row_bytes; at += STEP_BYTES) {
    cp_async_16(of_a + lane / 2 * LEADING + lane % 2 * 16, a + lane / 2 * row_bytes + at + lane % 2 * 16);
    if (B_TRANSPOSED) {  // [k][8] bf16: 16 rows of 16 bytes
      if (lane < 16) cp_async_16(of_b + lane * LEADING, b + (at / 2 + lane) * 16);
    } else {
      if (lane < 16) cp_async_16(of_b + lane / 2 * LEADING + lane % 2 * 16, b + lane / 2 * row_bytes + at + lane % 2 * 16);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    unsigned ra[4], rb[2];
    ldmatrix_x4(ra, of_a + lane % 16 * LEADING + lane / 16 * 16);
    if (B_TRANSPOSED) ldmatrix_x2_trans(rb, of_b + lane % 16 * LEADING);
    else ldmatrix_x2(rb, of_b + lane % 8 * LEADING + lane / 8 % 2 * 16);
    if constexpr (E4M3) mma_m16n8k32_e4m3(d, ra, rb);
    else mma_m16n8k16(d, ra, rb);
    __syncwarp();  // not seen by the emulator, where mma itself orders lanes
  }
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

#define MMA_TILE(name, ...)                                                                                              \
  extern "C" __global__ void __launch_bounds__(32) name(float* c, const unsigned char* a, const unsigned char* b, int depth) { \
    mma_tile<__VA_ARGS__>(c, a, b, depth);                                                                               \
  }                                                                                                                      \
  REGISTER_KERNEL(name)
MMA_TILE(mma_tile_nt, false, false)
MMA_TILE(mma_tile_nn, false, true)
MMA_TILE(mma_tile_e4m3, true, false)
