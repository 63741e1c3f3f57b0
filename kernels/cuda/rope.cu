// What happens to queries, keys and values between their projection and attention: norms of heads (some models), rotation
// to their positions (https://arxiv.org/abs/2104.09864), and keys and values into the cache.
#include "fp8.cuh"
#include "reduce.cuh"

// The position of a row that pads a batch to the size of its graph: nothing is done for it.
constexpr unsigned NO_POSITION = ~0u;

// cos and sin: [rows, pairs] of position * frequencies: [pairs], times `scale`. Once per step, as all layers turn alike.
//
// The product is rounded to single precision, as transformers has it; what follows is exact to single precision however
// far the position, as whole turns are removed in double precision.
extern "C" __global__ void __launch_bounds__(128)
    rope_angles(float* cos, float* sin, const unsigned* positions, const float* frequencies, float scale, int pairs) {
  const unsigned position = positions[blockIdx.x];
  if (position == NO_POSITION) return;
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const double half_turns = (double)__fmul_rn((float)position, frequencies[i]) * 0.318309886183790671538;
    double s, c;
    sincospi(half_turns, &s, &c);
    cos[(size_t)blockIdx.x * pairs + i] = (float)c * scale;
    sin[(size_t)blockIdx.x * pairs + i] = (float)s * scale;
  }
}
REGISTER_KERNEL(rope_angles)

// Shape of a row [heads | kv_heads | kv_heads] of heads, and of the pool.
struct Shape {
  int heads, kv_heads, block_tokens, max_blocks;
};

// One head of a row as a thread has it: 8 elements of its first half, and the 8 of its second half that they turn with.
struct Pairs {
  Floats first, second;
};

// Root-mean-square norm over a head of `lanes` threads.
template <int LANES>
__device__ __forceinline__ void normalize(Pairs& head, const bf16* weight, float eps, int lane) {
  constexpr int HALF = LANES * VECTOR;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    squares += head.first.at[i] * head.first.at[i] + head.second.at[i] * head.second.at[i];
  }
  const float factor = 1.0f / sqrtf(warp_reduce<Sum>(squares, LANES) / (2 * HALF) + eps);
  const Floats first = widen(load_vector(weight + lane * VECTOR)), second = widen(load_vector(weight + HALF + lane * VECTOR));
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    head.first.at[i] *= factor * first.at[i];
    head.second.at[i] *= factor * second.at[i];
  }
}

__device__ __forceinline__ Floats load_floats(const float* from) {
  const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// Element i of the first half turns with element i of the second (transformers' `rotate_half`).
__device__ __forceinline__ void rotate(Pairs& head, const float* cos, const float* sin) {
  const Floats c = load_floats(cos), s = load_floats(sin);
#pragma unroll
  for (int i = 0; i < VECTOR; i++) {
    const float a = head.first.at[i], b = head.second.at[i];
    head.first.at[i] = a * c.at[i] - b * s.at[i];
    head.second.at[i] = b * c.at[i] + a * s.at[i];
  }
}

// How the pool keeps elements.
struct Bf16Pool {
  typedef bf16 Element;
  __device__ static void store(bf16* to, const Floats& values, float) { store_vector(to, narrow(values)); }
};
// e4m3 of value / scale; what is beyond its range saturates.
struct E4m3Pool {
  typedef unsigned char Element;
  __device__ static void store(unsigned char* to, const Floats& values, float inverse_scale) {
    Floats scaled;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) scaled.at[i] = values.at[i] * inverse_scale;
    *reinterpret_cast<uint2*>(to) = narrow_e4m3(scaled);
  }
};

// What one call does, but for the pool.
struct Turn {
  bf16* qkv;
  const float *cos, *sin;
  const bf16 *q_norm, *k_norm;  // null if the model has none
  const unsigned *positions, *sequences, *tables;
  Shape shape;
  float eps;
};

// Offset in the pool, in elements, of the row of `head` (of 2 kv_heads) of the token at `position`.
template <int DIM>
__device__ __forceinline__ size_t pool_row(const Turn& turn, unsigned position, int head) {
  const Shape& shape = turn.shape;
  const unsigned* table = turn.tables + (size_t)turn.sequences[blockIdx.x] * shape.max_blocks;
  const unsigned block = table[position / shape.block_tokens], slot = position % shape.block_tokens;
  return (((size_t)block * 2 * shape.kv_heads + head) * shape.block_tokens + slot) * DIM;
}

// LANES neighbouring threads for a head of 16 LANES elements. Every thread of a warp comes along, as lanes exchange values.
template <int LANES, class Pool>
__device__ __forceinline__ void turn_heads(const Turn& turn, typename Pool::Element* pool, float k_inverse, float v_inverse) {
  constexpr int HALF = LANES * VECTOR, DIM = 2 * HALF;
  const Shape& shape = turn.shape;
  const int all = shape.heads + 2 * shape.kv_heads, lane = threadIdx.x % LANES;
  const int head = (blockIdx.y * blockDim.x + threadIdx.x) / LANES;
  const unsigned position = turn.positions[blockIdx.x];
  if (position == NO_POSITION) return;
  const bool exists = head < all, is_q = head < shape.heads, is_v = head >= shape.heads + shape.kv_heads;
  bf16* at = turn.qkv + ((size_t)blockIdx.x * all + (exists ? head : 0)) * DIM + lane * VECTOR;
  Pairs pairs = {widen(load_vector(at)), widen(load_vector(at + HALF))};
  const bf16* norm = is_q ? turn.q_norm : turn.k_norm;
  // The same for all rows and heads: q_norm and k_norm are both there or both null.
  if (norm != nullptr) {
    Pairs normed = pairs;
    normalize<LANES>(normed, norm, turn.eps, lane);
    if (!is_v) pairs = normed;
  }
  if (!exists) return;
  const size_t angle = (size_t)blockIdx.x * HALF + lane * VECTOR;
  if (!is_v) rotate(pairs, turn.cos + angle, turn.sin + angle);
  if (is_q) {
    store_vector(at, narrow(pairs.first));
    store_vector(at + HALF, narrow(pairs.second));
  } else {
    typename Pool::Element* to = pool + pool_row<DIM>(turn, position, head - shape.heads) + lane * VECTOR;
    Pool::store(to, pairs.first, is_v ? v_inverse : k_inverse);
    Pool::store(to + HALF, pairs.second, is_v ? v_inverse : k_inverse);
  }
}

// For each row of qkv: [rows, (heads + 2 kv_heads) head_dim]: norms of the heads of q and k, both turned by cos and sin:
// [rows, head_dim / 2]; q back in place, k and v to block `tables[sequences[row]][position / block_tokens]` of one layer's
// pool [blocks][k|v][kv_heads][block_tokens][head_dim]. tables: [sequences, max_blocks]. Grid: (rows, heads by 256 threads).
#define TURN_AND_STORE(name, lanes, pool_type)                                                                             \
  extern "C" __global__ void __launch_bounds__(256) name(                                                                  \
      bf16* qkv, pool_type::Element* pool, const float* cos, const float* sin, const bf16* q_norm, const bf16* k_norm,     \
      const unsigned* positions, const unsigned* sequences, const unsigned* tables, Shape shape, float eps,                \
      float k_inverse_scale, float v_inverse_scale) {                                                                      \
    const Turn turn = {qkv, cos, sin, q_norm, k_norm, positions, sequences, tables, shape, eps};                           \
    turn_heads<lanes, pool_type>(turn, pool, k_inverse_scale, v_inverse_scale);                                            \
  }                                                                                                                        \
  REGISTER_KERNEL(name)
TURN_AND_STORE(turn_heads_64_bf16, 4, Bf16Pool)
TURN_AND_STORE(turn_heads_128_bf16, 8, Bf16Pool)
TURN_AND_STORE(turn_heads_256_bf16, 16, Bf16Pool)
TURN_AND_STORE(turn_heads_64_e4m3, 4, E4m3Pool)
TURN_AND_STORE(turn_heads_128_e4m3, 8, E4m3Pool)
TURN_AND_STORE(turn_heads_256_e4m3, 16, E4m3Pool)
