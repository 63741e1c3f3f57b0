// Rows of a table by their numbers: embeddings of tokens, or the rows of a batch whose logits are wanted.
#include "vector.cuh"

// out: [rows, width]; out[i] = table[ids[i] - first] of table: [count, width]. Rows that are not in the table become 0,
// so that the sum over a vocabulary's shards is the embedding.
extern "C" __global__ void __launch_bounds__(256)
    take_rows(bf16* out, const bf16* table, const unsigned* ids, unsigned first, unsigned count, int width) {
  // Below `first` the difference wraps around to more than any count.
  const unsigned row = ids[blockIdx.x] - first;
  const bf16* from = table + (size_t)row * width;
  bf16* to = out + (size_t)blockIdx.x * width;
  for (int i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
    store_vector(to + i, row < count ? load_vector(from + i) : make_uint4(0, 0, 0, 0));
  }
}
REGISTER_KERNEL(take_rows)
