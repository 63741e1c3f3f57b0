// One step on for sequences that decode: what the host would otherwise have to write between two steps.
#include "ptx.cuh"

constexpr unsigned NO_POSITION = ~0u;

// For each row that has a length: its token joins `histories` (if there are any) at row `history_rows[row]` of
// [any, history_stride], and its length grows by one. The token is computed next, so its position is that of the row; what
// else is `tokens[row]` stays, to be looked up by the next step's embedding. Rows of length 0 pad the batch.
extern "C" __global__ void __launch_bounds__(256)
    advance_rows(unsigned* positions, unsigned* lengths, unsigned* histories, const unsigned* history_rows,
                 const unsigned* tokens, unsigned history_stride, unsigned rows) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const unsigned length = lengths[row];
  positions[row] = length == 0 ? NO_POSITION : length;
  if (length == 0) return;
  if (histories != nullptr && length < history_stride) {
    histories[(size_t)history_rows[row] * history_stride + length] = tokens[row];
  }
  lengths[row] = length + 1;
}
REGISTER_KERNEL(advance_rows)
