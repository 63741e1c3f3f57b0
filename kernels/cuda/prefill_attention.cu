// Attention of prompt chunks over the paged KV cache, for Hopper: FlashAttention-3 (https://arxiv.org/abs/2407.08608) with pages.
//
// A *tile* is TILE_ROWS query rows of one KV head: the heads of a group lie side by side in it (row m is head m % group
// of token m / group), so a chunk of 16 tokens with 8 heads per KV head fills it. Keys and values pass in tiles of
// TILE_KEYS tokens, last to first, so that tiles that need the causal mask come first and the others run without one.
//
// A block has three warpgroups. A *producer* warp copies tiles to shared memory by TMA, through rings of
// STAGES; two *consumers* multiply, 64 rows each. Two overlaps keep the tensor cores busy while exponentials are computed:
//   - between warpgroups (section 3.1): named barriers let one issue its products while the other is in its softmax;
//   - within a warpgroup (section 3.2): S = Q K^T of the next key tile and O += P V of this one are in flight together.
// Per key tile and block: 2 * 2 * 128 * 128 * D flop, 2048 cycles of wgmma for D = 128, against 16384 exponentials
// (1024 cycles at 16 a cycle) and about 4 other instructions per score (512 cycles): hidden if the overlaps work.
//
// The grid is persistent: one block per multiprocessor takes tile after tile, so that loads of the next tile overlap the
// end of the last. The host sorts tiles longest first, and blocks go through them in a snake (0 1 2 2 1 0 0 1 2), which
// spreads a sorted list evenly without a counter in memory; so a launch is the same every time, and can be captured.
#include "prefill_consumer.cuh"
#include "prefill_producer.cuh"

namespace prefill {

// Of a thread. Three warpgroups have 168 at entry, and no more together from then on: taking waits for what is not given.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= 3 * 168, "or the consumers wait forever");

template <int D, int PAGE>
__device__ __forceinline__ void prefill_attention(const TensorMap* query_map, const TensorMap* kv_map, const Arguments& a) {
  DYNAMIC_SHARED(memory);
  const Shared<D> shared = {shared_address(memory)};
  // By a shuffle, so that the compiler knows that it is the same for a warp, and keeps what follows from it in uniform registers.
  const int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) shared.initialise();
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (warp == 0) Producer<D, PAGE>{a, query_map, kv_map, memory, shared, lane}.run();
  } else {
    take_registers<CONSUMER_REGISTERS>();
    Consumer<D>{a, shared, warpgroup - 1, warp, lane, 0}.run();
  }
}

// Block: 3 warpgroups; dynamic shared memory: Shared<D>::BARRIERS + 128 bytes.
#define PREFILL_ATTENTION(name, D, PAGE)                                                                                       \
  extern "C" __global__ void __launch_bounds__((1 + CONSUMERS) * WARPGROUP, 1)                                                 \
      name(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap kv_map, bf16* out,                   \
           const Tile* tiles, unsigned tile_count, const unsigned* tables, unsigned table_width, unsigned group,        \
           unsigned kv_heads, unsigned pool_rows, unsigned window, float scale_log2) {                                         \
    const Arguments a = {tiles, tile_count, tables, table_width, group, kv_heads, pool_rows, window, scale_log2, out};         \
    prefill_attention<D, PAGE>(&query_map, &kv_map, a);                                                                        \
  }                                                                                                                            \
  REGISTER_KERNEL(name)

PREFILL_ATTENTION(prefill_attention_d64_p16, 64, 16)
PREFILL_ATTENTION(prefill_attention_d64_p32, 64, 32)
PREFILL_ATTENTION(prefill_attention_d64_p64, 64, 64)
PREFILL_ATTENTION(prefill_attention_d128_p16, 128, 16)
PREFILL_ATTENTION(prefill_attention_d128_p32, 128, 32)
PREFILL_ATTENTION(prefill_attention_d128_p64, 128, 64)

}  // namespace prefill
