// Attention of single rows over the paged KV cache: decode, and chunks of a few tokens. Its limit is the bandwidth of memory, from
// which keys and values are read once.
//
// The query heads of a KV head, padded to 16, are the rows of tensor-core products (mma.sync); a unit of work may hold several
// tokens of one sequence as long as tokens * heads <= 16. The host cuts the keys of all units into equal shares, one for each
// worker (a column of blocks, one for each KV head), so long and short sequences keep all multiprocessors busy to the end
// and the grid never changes, as CUDA graphs need. A share is a list of items: ranges of keys of one unit. The last block
// to finish an item of a unit that has several adds them up, in their order, so equal plans give equal bits.
//
// Each warp copies 16 keys and values at a time with cp.async into a ring of its own and multiplies them, four warps side by
// side. The ring runs ahead over the ends of items, so memory never waits for a softmax. A step is about 320
// instructions for 8 KiB (bf16, D = 128; 360 for 4 KiB of e4m3): 100 (45) bytes a cycle, where an H200's memory brings 20.
#include "decode_loader.cuh"
#include "decode_merge.cuh"

namespace decode {

// Grid: (workers, KV heads).
template <int D, bool E4M3>
__device__ __forceinline__ void decode_attention(const Arguments& a) {
  using S = Shape<D, E4M3>;
  DYNAMIC_SHARED(memory);
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned begin = a.shares[blockIdx.x], end = a.shares[blockIdx.x + 1];
  unsigned char* ring = memory + warp * S::RING_BYTES;
  Loader<D, E4M3> loader = {a, ring, head, warp, lane, begin, end};
  const Warp<D, E4M3> products = {a, head, lane};
  const Merge<D, E4M3> merge = {a, memory, head, warp, lane};

  loader.start();
  for (int stage = 0; stage < S::STAGES - 1; stage++) loader.load();
  unsigned consumed = 0;
  for (unsigned number = begin; number < end; number++) {
    const Item item = a.items[number];
    unsigned queries[D / 16][4];
    products.load_queries(queries, item);
    Sums<D> sums = {{-INFINITY, -INFINITY}};
    const int steps = steps_of(item.first_key, item.end_key);
    for (int step = warp; step < steps; step += WARPS, consumed++) {
      cp_async_wait<S::STAGES - 2>();
      __syncwarp();  // every lane's bytes have arrived, and every lane has read the step before, which is overwritten now
      loader.load();
      products.step(sums, queries, item, item.first_key + step * STEP_KEYS, ring + consumed % S::STAGES * S::STEP_BYTES);
    }
    merge.add_warps(sums, products);
    merge.finish(item, number);
  }
  cp_async_wait<0>();
}

// Block: WARPS warps; dynamic shared memory: Shape<D, E4M3>::FLAG + 16 bytes. Two blocks fit on a multiprocessor.
#define DECODE_ATTENTION(name, D, E4M3)                                                                                        \
  extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)                                                                  \
      name(bf16* out, const bf16* queries, unsigned query_stride, const unsigned char* pool, const Item* items,          \
           const unsigned* shares, const unsigned* tables, unsigned table_width, unsigned block_shift, unsigned group,         \
           unsigned kv_heads, unsigned window, float score_scale, float value_scale, float* part_sums, float2* part_weights,   \
           unsigned* arrived) {                                                                                                \
    decode_attention<D, E4M3>({items, shares, tables, table_width, block_shift, pool, queries, query_stride, group, kv_heads,  \
                               window, score_scale, value_scale, out, part_sums, part_weights, arrived});                      \
  }                                                                                                                            \
  REGISTER_KERNEL(name)

DECODE_ATTENTION(decode_attention_d64_bf16, 64, false)
DECODE_ATTENTION(decode_attention_d128_bf16, 128, false)
DECODE_ATTENTION(decode_attention_d64_e4m3, 64, true)
DECODE_ATTENTION(decode_attention_d128_e4m3, 128, true)

}  // namespace decode
