// What the two kernels of sampling share. Semantics and random numbers are those of the engine's CPU sampler
// (engine/src/sampler.rs), whose steps they follow.
//
// A row of logits is cut into tiles, one block each, so that a small batch uses the whole device as well. Whichever
// block of a row finishes last goes on with what needs all of it (nobody waits). `sample_scan` adjusts the logits, finds
// the likeliest token, and is all that a greedy row needs; `sample_draw` draws. Each reads the row once, unless a
// filter keeps more than its list holds.
//
// Results do not depend on schedules: weights are added as integers, and tokens are ordered by (logit, id).
#pragma once
#include "reduce.cuh"

constexpr int THREADS = 256;
// Logits of one block, and of one thread: pieces of 16 bytes.
constexpr int TILE = 4096;
constexpr int PIECES = TILE / THREADS / 4;
// Tokens whose greatest logit is kept, to bound the k-th greatest logit from below.
constexpr int GROUP = 64;
constexpr int GROUPS = TILE / GROUP;
// Tokens that a row's list of the likeliest has room for.
constexpr int LISTED = 4096;
// Alternatives with log-probabilities, at most.
constexpr int TOP = 20;
constexpr unsigned NO_LOGPROBS = ~0u;
// Below this, a temperature is 0.
constexpr float MIN_TEMPERATURE = 1e-5f;

// The logit of what is impossible: negative infinity.
#define NOTHING __int_as_float(0xff800000)

typedef unsigned long long u64;

// What a row asks for; `SamplingRow` in Rust.
struct RowParams {
  u64 seed;
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  unsigned top_k, min_tokens;
  // Its row of `histories`, and how many tokens of that are the prompt.
  unsigned history, prompt_tokens;
  // Ranges of `ends` (impossible before min_tokens) and of the biases, one for a token at most.
  unsigned ends_start, ends_count, biases_start, biases_count;
  // Alternatives wanted, or NO_LOGPROBS.
  unsigned logprobs;
  // Whether `allowed` applies.
  unsigned constrained;
};

// Notes between blocks; `finished` and `listed` are 0 between launches.
struct RowState {
  double normalizer;  // logprob = logit - normalizer
  unsigned finished, listed, likeliest;
  unsigned threshold;  // of the list: order keys from here on
};
struct TileState {
  double sum;          // of e^(logit - greatest), the model's own
  u64 best, weight;    // rank of the likeliest token; sum of weights
  float greatest;      // the model's own
  unsigned unused;
};

// `SamplingArgs` in Rust.
struct Sampling {
  const float* logits;  // [rows, stride]
  float* adjusted;      // [rows, stride]
  const RowParams* params;
  const unsigned* lengths;    // [rows] tokens of prompt and output; 0: a row that pads the batch
  const unsigned* histories;  // [any, history_stride]
  const unsigned* ends;
  const unsigned* bias_tokens;
  const float* bias_values;
  const unsigned* allowed;  // [rows, ceil(vocab / 32)] bits
  unsigned* tokens;         // [rows]
  float* logprobs;          // [rows]
  unsigned* top_tokens;     // [rows, TOP]
  float* top_logprobs;      // [rows, TOP]
  RowState* row_states;     // [rows]
  TileState* tile_states;   // [rows, tiles]
  unsigned* group_keys;     // [rows, tiles, GROUPS]
  u64* tile_tops;           // [rows, tiles, TOP]
  unsigned* lists;          // [rows, LISTED]
  unsigned vocab, stride, history_stride, tiles;
};

struct RowContext {
  RowParams params;
  unsigned row, tile, length, position;  // position in the output
  bool adjusts;
};

__device__ __forceinline__ bool penalizes_output(const RowParams& params) {
  return params.presence_penalty != 0 || params.frequency_penalty != 0;
}

// Grid: (tiles, rows).
__device__ __forceinline__ RowContext context_of(const Sampling& s) {
  RowContext row;
  row.params = s.params[blockIdx.y];
  row.row = blockIdx.y;
  row.tile = blockIdx.x;
  row.length = s.lengths[blockIdx.y];
  row.position = row.length - row.params.prompt_tokens;
  row.adjusts = row.params.biases_count > 0 || row.position < row.params.min_tokens || row.params.constrained ||
                row.params.repetition_penalty != 1 || penalizes_output(row.params);
  return row;
}

__device__ __forceinline__ bool greedy(const RowParams& params) { return params.temperature < MIN_TEMPERATURE; }
__device__ __forceinline__ bool filtered(const RowParams& params) { return params.top_k > 0 || params.top_p < 1; }

// The floats of the thread's pieces, in `at[piece * 4 + i]`, and their tokens.
struct Logits {
  float at[PIECES * 4];
};
__device__ __forceinline__ unsigned token_of(const RowContext& row, int i) {
  return row.tile * TILE + (i / 4 * THREADS + threadIdx.x) * 4 + i % 4;
}

__device__ __forceinline__ Logits load_logits(const Sampling& s, const RowContext& row, const float* from) {
  Logits logits;
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    const unsigned token = token_of(row, piece * 4);
    float4 four = make_float4(NOTHING, NOTHING, NOTHING, NOTHING);
    if (token < s.stride) four = *reinterpret_cast<const float4*>(from + (size_t)row.row * s.stride + token);
    const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++) logits.at[piece * 4 + i] = token + i < s.vocab ? values[i] : NOTHING;
  }
  return logits;
}

// Greater for greater floats, by IEEE 754's total order; 0, below all numbers, for NaN.
__device__ __forceinline__ unsigned order_key(float value) {
  if (value != value) return 0;
  const unsigned bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Less for likelier tokens, the lower id first among equals (0 and -0 are equal). What is impossible is equal, too.
__device__ __forceinline__ u64 rank_of(float logit, unsigned token) {
  const unsigned key = logit > NOTHING ? order_key(__fadd_rn(logit, 0.0f)) : 0;
  return (u64)~key << 32 | token;
}

// e^x for x of at most 0: the CPU sampler's, bit for bit, so never with fused operations.
__device__ __forceinline__ float exp_of(float x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float clamped = x > -87.0f ? x : -87.0f;
  const float n = __fsub_rn(__fadd_rn(__fmul_rn(clamped, 1.44269504088896341f), round), round);
  const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
  const float coefficients[5] = {1.3982e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f};
  float p = 1.9875691e-4f;
#pragma unroll
  for (int i = 0; i < 5; i++) p = __fadd_rn(__fmul_rn(p, r), coefficients[i]);
  const float fraction = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
  const float power = __uint_as_float((unsigned)((int)n + 127) << 23);
  return x > -87.0f ? __fmul_rn(fraction, power) : 0.0f;
}

// True for the threads of the row's last block to come here, which then sees what the others wrote (by __ldcg).
__device__ __forceinline__ bool last_of_row(RowState& state, unsigned tiles) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&state.finished, 1u) == tiles - 1;
    if (last) state.finished = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}
