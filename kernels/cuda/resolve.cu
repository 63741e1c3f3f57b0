// Tokens that the host may not know yet.
#include "ptx.cuh"

// tokens[i] = sources[i]; where the highest bit is set, sampled[sources[i] without it].
extern "C" __global__ void __launch_bounds__(256)
    resolve_tokens(unsigned* tokens, const unsigned* sources, const unsigned* sampled, unsigned count) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  unsigned source = sources[i];
  tokens[i] = source >> 31 ? sampled[source & 0x7fffffffu] : source;
}
REGISTER_KERNEL(resolve_tokens)
