// Root-mean-square normalisation (https://arxiv.org/abs/1910.07467): y = x / sqrt(mean(x^2) + eps) * weight.
//
// One block per row, which it reads once and keeps in registers. The number of threads depends on the width alone, so
// a row's result does not depend on the rows beside it.
#include "reduce.cuh"
#include "vector.cuh"

// 16-byte pieces of a row that a thread keeps: rows of up to 4 * 8 * 1024 elements.
constexpr int PIECES = 4;

struct Row {
  uint4 pieces[PIECES];
};

// Where piece `i` of this thread lies; past the end if the row has none.
__device__ __forceinline__ int place(int i) { return (i * blockDim.x + threadIdx.x) * VECTOR; }

__device__ __forceinline__ Row load_row(const bf16* from, int width) {
  Row row;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    row.pieces[i] = place(i) < width ? load_vector(from + place(i)) : make_uint4(0, 0, 0, 0);
  }
  return row;
}

// row += update, rounded to bf16: what is normalised is what the stream holds from now on.
__device__ __forceinline__ void add_row(Row& row, const bf16* update, int width) {
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    if (place(i) >= width) continue;
    Floats sum = widen(row.pieces[i]);
    const Floats more = widen(load_vector(update + place(i)));
#pragma unroll
    for (int j = 0; j < VECTOR; j++) sum.at[j] += more.at[j];
    row.pieces[i] = narrow(sum);
  }
}

__device__ __forceinline__ float sum_of_squares(const Row& row) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const Floats x = widen(row.pieces[i]);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) squares += x.at[j] * x.at[j];
  }
  return squares;
}

__device__ __forceinline__ void store_row(bf16* to, const Row& row, int width) {
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    if (place(i) < width) store_vector(to + place(i), row.pieces[i]);
  }
}

__device__ __forceinline__ void store_normed(bf16* to, const Row& row, const bf16* weight, float epsilon, int width) {
  __shared__ float partial[MAX_WARPS];
  const float squares = block_reduce<Sum>(sum_of_squares(row), partial);
  const float factor = 1.0f / sqrtf(squares / width + epsilon);
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    if (place(i) >= width) continue;
    Floats x = widen(row.pieces[i]);
    const Floats scale = widen(load_vector(weight + place(i)));
#pragma unroll
    for (int j = 0; j < VECTOR; j++) x.at[j] = x.at[j] * factor * scale.at[j];
    store_vector(to + place(i), narrow(x));
  }
}

// y = norm(x) * weight, for each row of `width` elements. y may be x.
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(bf16* y, const bf16* x, const bf16* weight, int width, float epsilon) {
  const size_t start = (size_t)blockIdx.x * width;
  store_normed(y + start, load_row(x + start, width), weight, epsilon, width);
}
REGISTER_KERNEL(rms_norm)

// x += update; y = norm(x) * weight.
extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(bf16* y, bf16* x, const bf16* update, const bf16* weight, int width, float epsilon) {
  const size_t start = (size_t)blockIdx.x * width;
  Row row = load_row(x + start, width);
  add_row(row, update + start, width);
  store_row(x + start, row, width);
  store_normed(y + start, row, weight, epsilon, width);
}
REGISTER_KERNEL(add_rms_norm)
