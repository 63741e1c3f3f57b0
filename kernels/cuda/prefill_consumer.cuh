// The warpgroups of prefill_attention.cu that multiply.
#pragma once
#include "prefill_shared.cuh"

namespace prefill {

// Running maximum and sum of the two rows that a thread has a share of: lane / 4, and 8 below it.
struct Softmax {
  float greatest[2], sum[2];
};

// Position of accumulator element i in a thread: half (row lane / 4, or 8 below it) and column, less the lane's own.
__device__ __forceinline__ constexpr int half_of(int i) { return i >> 1 & 1; }
__device__ __forceinline__ constexpr int column_of(int i) { return (i >> 2) * 8 + (i & 1); }

// What to add to a matrix descriptor for an address so many bytes on: addresses are in units of 16.
__device__ __forceinline__ constexpr unsigned descriptor_offset(unsigned bytes) { return bytes / 16; }

// S = Q K^T in flight: 64 x TILE_KEYS scores.
template <int D>
__device__ __forceinline__ void start_scores(float (&scores)[TILE_KEYS / 2], unsigned queries, unsigned keys) {
  keep_registers(scores);
  wgmma_fence();
  const uint64_t left = matrix_descriptor(queries, 16, GROUP_BYTES), right = matrix_descriptor(keys, 16, GROUP_BYTES);
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    const unsigned at = descriptor_offset(k / 4 * COLUMN_BYTES + k % 4 * 32);
    wgmma_bf16<TILE_KEYS, false>(scores, left + at, right + at, k > 0);
  }
  wgmma_commit();
}

// O += P V in flight, or O = P V.
template <int D>
__device__ __forceinline__ void start_output(float (&output)[D / 2], unsigned (&weights)[TILE_KEYS / 16][4], unsigned values, bool add) {
  keep_registers(output);
  wgmma_fence();
  const uint64_t right = matrix_descriptor(values, COLUMN_BYTES, GROUP_BYTES);
#pragma unroll
  for (int k = 0; k < TILE_KEYS / 16; k++) {
    wgmma_bf16<D, true>(output, weights[k], right + descriptor_offset(k * 2 * GROUP_BYTES), add || k > 0);
  }
  wgmma_commit();
}

// Scores become 2^(score - greatest); `shrink` is what earlier sums and outputs are to be multiplied with.
__device__ __forceinline__ void soften(float (&scores)[TILE_KEYS / 2], Softmax& rows, float (&shrink)[2], float scale_log2) {
  float greatest[2][2] = {{rows.greatest[0], rows.greatest[0]}, {rows.greatest[1], rows.greatest[1]}};
#pragma unroll
  for (int i = 0; i < TILE_KEYS / 2; i++) greatest[half_of(i)][i & 1] = fmaxf(greatest[half_of(i)][i & 1], scores[i]);
  float base[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float now = quad_max(fmaxf(greatest[half][0], greatest[half][1]));
    base[half] = softmax_base(now * scale_log2);
    shrink[half] = exp2_approx(rows.greatest[half] * scale_log2 - base[half]);
    rows.greatest[half] = now;
    rows.sum[half] *= shrink[half];
  }
#pragma unroll
  for (int i = 0; i < TILE_KEYS / 2; i++) {
    scores[i] = exp2_approx(scores[i] * scale_log2 - base[half_of(i)]);
    rows.sum[half_of(i)] += scores[i];
  }
}

// The accumulator of S is, rounded, the left operand of P V: both lay rows and columns out over lanes alike.
__device__ __forceinline__ void round_weights(unsigned (&weights)[TILE_KEYS / 16][4], const float (&scores)[TILE_KEYS / 2]) {
#pragma unroll
  for (int k = 0; k < TILE_KEYS / 16; k++) {
#pragma unroll
    for (int j = 0; j < 4; j++) weights[k][j] = pack_bf16(scores[8 * k + 2 * j], scores[8 * k + 2 * j + 1]);
  }
}

// In the four lanes of a quad: word j of lane i becomes word i of lane j.
__device__ __forceinline__ void transpose_quad(unsigned (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j & bit) continue;
      const unsigned received = __shfl_xor_sync(ALL_LANES, upper ? words[j] : words[j | bit], bit);
      words[j] = upper ? received : words[j];
      words[j | bit] = upper ? words[j | bit] : received;
    }
  }
}

template <int D>
struct Consumer {
  const Arguments& a;
  Shared<D> shared;
  int number;       // of the consumer warpgroup
  int warp, lane;   // in it
  unsigned consumed;  // key tiles, over all work

  __device__ int first_row() const { return number * CONSUMER_ROWS + warp * 16 + lane / 4; }

  __device__ void run() {
    const unsigned queries = shared.queries() + number * CONSUMER_ROWS * ROW_BYTES;
    Work work;
    if (number == 1) barrier_arrive(turn_of(0), CONSUMERS * WARPGROUP);
    for (unsigned round = 0; take_work(a, round, work); round++) {
      mbarrier_wait(shared.queries_full(), round & 1);
      attend(work, queries);
    }
  }

  __device__ __forceinline__ void attend(const Work& work, unsigned queries) {
    float scores[TILE_KEYS / 2], output[D / 2], shrink[2];
    unsigned weights[TILE_KEYS / 16][4];
    Softmax rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};

    mbarrier_wait(shared.keys_full(consumed), full_phase(consumed));
    start_scores<D>(scores, queries, shared.keys(consumed));
    wgmma_wait<0>();
    keep_registers(scores);
    release(shared.keys_empty(consumed));
    mask(scores, work, work.end - 1);
    soften(scores, rows, shrink, a.scale_log2);
    round_weights(weights, scores);

    for (int tile = work.end - 2; tile >= work.first; tile--) {
      const bool add = tile < work.end - 2;
      barrier_sync(turn_of(number), CONSUMERS * WARPGROUP);  // not seen by the emulator: it is for speed alone
      mbarrier_wait(shared.keys_full(consumed + 1), full_phase(consumed + 1));
      start_scores<D>(scores, queries, shared.keys(consumed + 1));
      mbarrier_wait(shared.values_full(consumed), full_phase(consumed));
      start_output<D>(output, weights, shared.values(consumed), add);
      barrier_arrive(turn_of(1 - number), CONSUMERS * WARPGROUP);

      wgmma_wait<1>();
      keep_registers(scores);
      release(shared.keys_empty(consumed + 1));
      mask(scores, work, tile);
      soften(scores, rows, shrink, a.scale_log2);
      finish_before_wait(rows.sum[0] + rows.sum[1]);  // or exponentials move after the wait, where they overlap nothing
      wgmma_wait<0>();
      keep_registers(output);
      keep_registers(scores);
      release(shared.values_empty(consumed));
#pragma unroll
      for (int i = 0; i < D / 2; i++) output[i] *= shrink[half_of(i)];
      round_weights(weights, scores);
      consumed++;
    }

    release(shared.queries_empty());
    mbarrier_wait(shared.values_full(consumed), full_phase(consumed));
    start_output<D>(output, weights, shared.values(consumed), work.end - work.first > 1);
    wgmma_wait<0>();
    keep_registers(output);
    release(shared.values_empty(consumed));
    consumed++;
    write(work, output, rows);
  }

  // Named barrier at which a consumer waits until it may issue its products.
  __device__ static int turn_of(int number) { return 1 + number; }

  // This warp has done with what the barrier guards: only wgmma reads it, whose wait all lanes of a warp end together.
  __device__ void release(unsigned barrier) const {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // Hides keys after a row's own position, and those before its window.
  __device__ __forceinline__ void mask(float (&scores)[TILE_KEYS / 2], const Work& work, int tile) const {
    const int start = tile * TILE_KEYS, end = start + TILE_KEYS;
    const int first = work.tile.position, last = work.end_key - 1, window = a.window ? a.window : last + 1;
    if (end - 1 <= first && start > last - window) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int position = first + (first_row() + half * 8) / (int)a.group;
      const int newest = position - start - lane % 4 * 2, oldest = newest - window;
#pragma unroll
      for (int i = 0; i < TILE_KEYS / 2; i++) {
        if (half_of(i) == half && (column_of(i) > newest || column_of(i) <= oldest)) scores[i] = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void write(const Work& work, const float (&output)[D / 2], const Softmax& rows) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const unsigned m = first_row() + half * 8, token = m / a.group, head = work.kv_head * a.group + m % a.group;
      const float inverse = 1.0f / quad_sum(rows.sum[half]);
      bf16* to = a.out + ((size_t)(work.tile.row + token) * a.group * a.kv_heads + head) * D + lane % 4 * 8;
#pragma unroll
      for (int columns = 0; columns < D / 32; columns++) {
        unsigned words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int i = (columns * 4 + j) * 4 + half * 2;
          words[j] = pack_bf16(output[i] * inverse, output[i + 1] * inverse);
        }
        transpose_quad(words, lane);
        if (token < work.tile.rows) *(uint4*)(to + columns * 32) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
};

}  // namespace prefill
