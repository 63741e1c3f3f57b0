// How a warp of decode_attention.cu multiplies.
#pragma once
#include "decode_shared.cuh"

namespace decode {

// D[16x8] += A B: bf16 for bf16 caches, f16 (which holds every e4m3) for e4m3 caches.
template <bool E4M3>
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  if constexpr (E4M3) mma_m16n8k16_f16(d, a, b);
  else mma_m16n8k16(d, a, b);
}
__device__ __forceinline__ unsigned low_halves(F16x4 x) { return (x.low & 0xffff) | x.high << 16; }
__device__ __forceinline__ unsigned high_halves(F16x4 x) { return x.low >> 16 | (x.high & 0xffff0000); }

template <bool E4M3>
__device__ __forceinline__ unsigned pack(float low, float high) {
  return E4M3 ? pack_f16(low, high) : pack_bf16(low, high);
}

// The running softmax and output of a warp. Thread: rows lane / 4 and 8 below, as mma has them.
template <int D>
struct Sums {
  float reference[2];  // a scaled score that is at most LAZINESS below the greatest: weights are 2^(scaled score - reference)
  float weight[2];
  float output[D / 8][4];
};
// Outputs are rescaled when weights would exceed 2^LAZINESS, which is rare, and not whenever there is a greater score, as in
// FlashAttention-4. Sums are in f32, and weights far from the ends of bf16 and f16.
constexpr float LAZINESS = 8.0f;

template <int D, bool E4M3>
struct Warp {
  using S = Shape<D, E4M3>;

  const Arguments& a;
  int head, lane;

  // Query rows as left operands. With e4m3, k is permuted as keys need it: lane q of a quad has elements 4 q to 4 q + 3 of 16,
  // where mma wants 2 q, 2 q + 1, 2 q + 8 and 2 q + 9.
  __device__ void load_queries(unsigned (&queries)[D / 16][4], const Item& item) const {
    const int first = E4M3 ? lane % 4 * 4 : lane % 4 * 2, second = E4M3 ? first + 2 : first + 8;
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const unsigned m = lane / 4 + below * 8, token = m / a.group;
      const bool exists = token < item.rows;
      const bf16* row = a.queries + (size_t)(item.row + token) * a.query_stride + (head * a.group + m % a.group) * D;
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        queries[k][below] = exists ? load_pair(row + k * 16 + first) : 0;
        queries[k][below + 2] = exists ? load_pair(row + k * 16 + second) : 0;
      }
    }
  }

  __device__ static unsigned load_pair(const bf16* from) {
    const unsigned pair = *reinterpret_cast<const unsigned*>(from);
    return E4M3 ? pack_f16(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)) : pair;
  }

  // scores[j]: of keys 8 j to 8 j + 7.
  __device__ void multiply_keys(float (&scores)[2][4], const unsigned (&queries)[D / 16][4], const unsigned char* keys) const {
    unsigned r[4];
    if constexpr (E4M3) {
      // Matrices of 8 keys x 16 elements; two of keys, two of elements.
#pragma unroll
      for (int k = 0; k < D / 16; k += 2) {
        ldmatrix_x4(r, keys + S::place(lane % 16, k + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const F16x4 four = e4m3x4_to_f16x4(r[i]);
          multiply<true>(scores[i % 2], queries[k + i / 2], four.low, four.high);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        ldmatrix_x4(r, keys + S::place(lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        multiply<false>(scores[0], queries[k], r[0], r[1]);
        multiply<false>(scores[1], queries[k], r[2], r[3]);
      }
    }
  }

  // With e4m3, output tiles 2 i and 2 i + 1 are the even and the odd ones of 16 elements: see element_of.
  __device__ void multiply_values(float (&output)[D / 8][4], const unsigned (&weights)[4], const unsigned char* values) const {
    unsigned r[4];
    if constexpr (E4M3) {
#pragma unroll
      for (int i = 0; i < D / 16; i += 2) {
        ldmatrix_x4_trans(r, values + S::place(lane % 16, i + lane / 16));
#pragma unroll
        for (int j = 0; j < 2; j++) {
          // Pairs of neighbouring elements of two keys each: mma wants pairs of keys.
          const F16x4 first = e4m3x4_to_f16x4(r[2 * j]), second = e4m3x4_to_f16x4(r[2 * j + 1]);
          multiply<true>(output[2 * (i + j)], weights, low_halves(first), low_halves(second));
          multiply<true>(output[2 * (i + j) + 1], weights, high_halves(first), high_halves(second));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        ldmatrix_x4_trans(r, values + S::place(lane % 16, i * 2 + lane / 16));
        multiply<false>(output[2 * i], weights, r[0], r[1]);
        multiply<false>(output[2 * i + 1], weights, r[2], r[3]);
      }
    }
  }

  // Which element of the head output[tile][i] is (i = 0 or 1, or 2 or 3 for the row below).
  __device__ int element_of(int tile, int i) const {
    const int column = lane % 4 * 2 + i % 2;
    return E4M3 ? tile / 2 * 16 + column * 2 + tile % 2 : tile * 8 + column;
  }

  // One step: 16 keys from `key` on.
  __device__ void step(Sums<D>& sums, const unsigned (&queries)[D / 16][4], const Item& item, unsigned key,
                       const unsigned char* memory) const {
    float scores[2][4] = {};
    multiply_keys(scores, queries, memory);
    mask(scores, item, key);
    rescale(sums, scores, a.score_scale);
    soften(scores, sums, a.score_scale);
    const unsigned weights[4] = {pack<E4M3>(scores[0][0], scores[0][1]), pack<E4M3>(scores[0][2], scores[0][3]),
                                 pack<E4M3>(scores[1][0], scores[1][1]), pack<E4M3>(scores[1][2], scores[1][3])};
    multiply_values(sums.output, weights, memory + S::HALF_BYTES);
  }

  // Hides keys after a row's own position, and those before its window.
  __device__ void mask(float (&scores)[2][4], const Item& item, int key) const {
    const int last = item.position + item.rows - 1, window = a.window ? a.window : last + 1;
    if (key + STEP_KEYS - 1 <= (int)item.position && key > last - window) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int position = item.position + (lane / 4 + i / 2 * 8) / (int)a.group;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int at = key + j * 8 + lane % 4 * 2 + i % 2;
        if (at > position || at <= position - window) scores[j][i] = -INFINITY;
      }
    }
  }

  // Raises the reference of rows that have outgrown it.
  __device__ static void rescale(Sums<D>& sums, const float (&scores)[2][4], float scale) {
    float greatest[2];
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const int i = below * 2;
      greatest[below] = scale * quad_max(fmaxf(fmaxf(scores[0][i], scores[0][i + 1]), fmaxf(scores[1][i], scores[1][i + 1])));
    }
    const bool outgrown = greatest[0] > sums.reference[0] + LAZINESS || greatest[1] > sums.reference[1] + LAZINESS;
    if (!__any_sync(ALL_LANES, outgrown)) return;
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const float reference = fmaxf(sums.reference[below], greatest[below]);
      const float shrink = exp2_approx(sums.reference[below] - softmax_base(reference));
      sums.reference[below] = reference;
      sums.weight[below] *= shrink;
#pragma unroll
      for (int tile = 0; tile < D / 8; tile++) {
        sums.output[tile][below * 2] *= shrink;
        sums.output[tile][below * 2 + 1] *= shrink;
      }
    }
  }

  // Scores become weights.
  __device__ static void soften(float (&scores)[2][4], Sums<D>& sums, float scale) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float base = softmax_base(sums.reference[i / 2]);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        scores[j][i] = exp2_approx(scores[j][i] * scale - base);
        sums.weight[i / 2] += scores[j][i];
      }
    }
  }
};

}  // namespace decode
