// How decode_attention.cu adds up what its warps and blocks have.
#pragma once
#include "decode_products.cuh"

namespace decode {

// Adds up what the warps of a block have, then what the items of a unit have.
template <int D, bool E4M3>
struct Merge {
  using S = Shape<D, E4M3>;

  const Arguments& a;
  unsigned char* memory;
  int head, warp, lane;

  // Reference and sum of weights of rows, by warp.
  __device__ float2* weights() const { return reinterpret_cast<float2*>(memory + S::WEIGHTS); }
  __device__ float* sums() const { return reinterpret_cast<float*>(memory + S::SUMS); }

  // The block's reference of a row: the greatest of its warps'.
  __device__ float reference_of(int row) const {
    float reference = -INFINITY;
    for (int w = 0; w < WARPS; w++) reference = fmaxf(reference, weights()[w * QUERY_ROWS + row].x);
    return reference;
  }
  __device__ float weight_of(int row, float reference) const {
    float sum = 0;
    for (int w = 0; w < WARPS; w++) {
      const float2 part = weights()[w * QUERY_ROWS + row];
      sum += part.y * exp2_approx(part.x - softmax_base(reference));
    }
    return sum;
  }

  // Warps add in turn, so always in one order.
  __device__ void add_warps(const Sums<D>& mine, const Warp<D, E4M3>& layout) const {
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const float weight = quad_sum(mine.weight[below]);
      if (lane % 4 == 0) {
        weights()[warp * QUERY_ROWS + lane / 4 + below * 8] = make_float2(mine.reference[below], weight);
      }
    }
    __syncthreads();
    float shrink[2];
#pragma unroll
    for (int below = 0; below < 2; below++) {
      shrink[below] = exp2_approx(mine.reference[below] - softmax_base(reference_of(lane / 4 + below * 8)));
    }
    for (int turn = 0; turn < WARPS; turn++) {
      if (turn == warp) {
#pragma unroll
        for (int tile = 0; tile < D / 8; tile++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& sum = sums()[(lane / 4 + i / 2 * 8) * D + layout.element_of(tile, i)];
            sum = (turn ? sum : 0.0f) + mine.output[tile][i] * shrink[i / 2];
          }
        }
      }
      __syncthreads();
    }
  }

  __device__ void finish(const Item& item, unsigned number) const {
    if (item.parts == 1) {
      for (int i = threadIdx.x; i < (int)(item.rows * a.group) * D / 2; i += WARPS * 32) {
        const int row = i * 2 / D;
        const float factor = a.value_scale / weight_of(row, reference_of(row));
        write(item, i, sums()[i * 2] * factor, sums()[i * 2 + 1] * factor);
      }
    } else {
      store_part(item, number);
      if (is_last(item)) add_parts(item);
    }
    __syncthreads();  // before the next item's sums
  }

  // Elements 2 i and 2 i + 1 of the unit's [rows * group, D].
  __device__ void write(const Item& item, int i, float first, float second) const {
    const unsigned m = i * 2 / D, element = i * 2 % D, row = item.row + m / a.group, query_head = head * a.group + m % a.group;
    const size_t at = ((size_t)row * a.group * a.kv_heads + query_head) * D + element;
    *reinterpret_cast<unsigned*>(a.out + at) = pack_bf16(first, second);
  }

  __device__ size_t part_row(unsigned number) const { return ((size_t)number * a.kv_heads + head) * QUERY_ROWS; }

  __device__ void store_part(const Item& item, unsigned number) const {
    const int rows = item.rows * a.group;
    for (int i = threadIdx.x; i < rows * D / 4; i += WARPS * 32) {
      reinterpret_cast<float4*>(a.part_sums + part_row(number) * D)[i] = reinterpret_cast<const float4*>(sums())[i];
    }
    if ((int)threadIdx.x < rows) {
      const float reference = reference_of(threadIdx.x);
      a.part_weights[part_row(number) + threadIdx.x] = make_float2(reference, weight_of(threadIdx.x, reference));
    }
  }

  // Whether this block is the last of its unit and head to store a part, in which case it sees all of them. Nobody waits for anybody.
  __device__ bool is_last(const Item& item) const {
    unsigned& flag = *reinterpret_cast<unsigned*>(memory + S::FLAG);
    __syncthreads();  // not seen by the emulator, whose blocks run one after another: all of the part is stored
    if (threadIdx.x == 0) {
      // One fence does for what all threads stored before the barrier, and one for what they load after the next.
      __threadfence();
      unsigned& arrived = a.arrived[item.first_part * a.kv_heads + head];
      flag = atomicAdd(&arrived, 1u) == item.parts - 1;
      if (flag) arrived = 0;
      __threadfence();
    }
    __syncthreads();
    return flag;
  }

  // Threads share out rows x parts for the factors of parts, which go to shared memory, and then elements, each of which is added
  // up over the parts in their order; so of a long sequence's many parts several are always being loaded.
  __device__ void add_parts(const Item& item) const {
    constexpr int THREADS = WARPS * 32, STRIPES = THREADS / QUERY_ROWS, PIECES = QUERY_ROWS * D / 4 / THREADS;
    const int rows = item.rows * a.group, row = threadIdx.x % QUERY_ROWS, stripe = threadIdx.x / QUERY_ROWS;
    const int parts = row < rows ? item.parts : 0;
    // Not from L1, which does not see other multiprocessors' stores.
    const float2* of_row = a.part_weights + part_row(item.first_part) + row;
    const size_t stride = (size_t)a.kv_heads * QUERY_ROWS;
    float reference = -INFINITY, weight = 0;
    for (int p = stripe; p < parts; p += STRIPES) reference = fmaxf(reference, __ldcg(of_row + p * stride).x);
    reference = over_stripes(reference, [](float x, float y) { return fmaxf(x, y); });

    float* factors = sums();  // [PART_FACTORS][QUERY_ROWS]: the block's own sums were stored
    float4 total[PIECES] = {};
    for (unsigned first = 0; first < item.parts; first += S::PART_FACTORS) {
      const int end = min((int)(item.parts - first), S::PART_FACTORS);
      for (int p = stripe; p < end && row < rows; p += STRIPES) {
        const float2 part = __ldcg(of_row + (first + p) * stride);
        const float factor = exp2_approx(part.x - reference);
        weight += part.y * factor;
        factors[p * QUERY_ROWS + row] = factor;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < PIECES; i++) add_piece(total[i], i * THREADS + threadIdx.x, rows, part_row(item.first_part + first), end, factors);
      __syncthreads();
    }
    weight = over_stripes(weight, [](float x, float y) { return x + y; });
    // Rows of elements are not those of factors.
    if (stripe == 0) factors[row] = a.value_scale / weight;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int piece = i * THREADS + threadIdx.x;
      if (piece * 4 >= rows * D) continue;
      const float factor = factors[piece * 4 / D];
      write(item, piece * 2, total[i].x * factor, total[i].y * factor);
      write(item, piece * 2 + 1, total[i].z * factor, total[i].w * factor);
    }
  }

  // Adds four elements of `count` parts, the first of which lies in row `at` of the parts' sums.
  __device__ void add_piece(float4& total, int piece, int rows, size_t at, int count, const float* factors) const {
    if (piece * 4 >= rows * D) return;
    const float4* from = reinterpret_cast<const float4*>(a.part_sums + at * D) + piece;
    const size_t stride = (size_t)a.kv_heads * QUERY_ROWS * D / 4;
#pragma unroll 8
    for (int p = 0; p < count; p++) {
      const float4 sum = __ldcg(from + p * stride);
      const float factor = factors[p * QUERY_ROWS + piece * 4 / D];
      total.x += sum.x * factor;
      total.y += sum.y * factor;
      total.z += sum.z * factor;
      total.w += sum.w * factor;
    }
  }

  // Over the threads that have the same row: two in each warp. Calls are to have a barrier between them.
  template <class Combine>
  __device__ float over_stripes(float value, Combine combine) const {
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, QUERY_ROWS));
    float* by_warp = reinterpret_cast<float*>(weights());
    if (lane < QUERY_ROWS) by_warp[warp * QUERY_ROWS + lane] = value;
    __syncthreads();
    float result = by_warp[lane % QUERY_ROWS];
    for (int w = 1; w < WARPS; w++) result = combine(result, by_warp[w * QUERY_ROWS + lane % QUERY_ROWS]);
    return result;
  }
};

}  // namespace decode
