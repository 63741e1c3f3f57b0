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
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned& arrived = a.arrived[item.first_part * a.kv_heads + head];
      flag = atomicAdd(&arrived, 1u) == item.parts - 1;
      if (flag) arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return flag;
  }

  __device__ void add_parts(const Item& item) const {
    for (int i = threadIdx.x; i < (int)(item.rows * a.group) * D / 2; i += WARPS * 32) {
      const int row = i * 2 / D;
      float reference = -INFINITY, weight = 0, first = 0, second = 0;
      // Not from L1, which does not see other multiprocessors' stores.
      for (unsigned p = 0; p < item.parts; p++) {
        reference = fmaxf(reference, __ldcg(&a.part_weights[part_row(item.first_part + p) + row]).x);
      }
      for (unsigned p = 0; p < item.parts; p++) {
        const size_t part = part_row(item.first_part + p);
        const float2 of_row = __ldcg(&a.part_weights[part + row]);
        const float2 sum = __ldcg(reinterpret_cast<const float2*>(a.part_sums + part * D) + i);
        const float factor = exp2_approx(of_row.x - reference);
        weight += of_row.y * factor;
        first += sum.x * factor;
        second += sum.y * factor;
      }
      write(item, i, first * (a.value_scale / weight), second * (a.value_scale / weight));
    }
  }
};

}  // namespace decode
