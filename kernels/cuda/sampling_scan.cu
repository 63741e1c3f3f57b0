// The first pass of sampling: adjusts logits, finds the likeliest token, measures log-probabilities. See sampling.cuh.
#include "descent.cuh"
#include "sampling.cuh"

constexpr unsigned IN_PROMPT = 0x80000000u;

// A tile whose logits are changed: by bias, penalties and masks, each of which reaches any token.
struct Adjusted {
  float logits[TILE];
  unsigned counts[TILE];  // occurrences in the output, and IN_PROMPT
};

struct Shared {
  union {
    Adjusted adjusted;
    Descent descent;
  };
  u64 ranks[MAX_WARPS];
  double sums[MAX_WARPS];
  float floats[MAX_WARPS];
};

__device__ __forceinline__ void count_history(const Sampling& s, const RowContext& row, Adjusted& tile) {
  const RowParams& params = row.params;
  const unsigned* history = s.histories + (size_t)params.history * s.history_stride;
  const unsigned first = params.repetition_penalty != 1 ? 0 : penalizes_output(params) ? params.prompt_tokens : row.length;
  for (unsigned i = first + threadIdx.x; i < row.length; i += THREADS) {
    // Below the tile the difference wraps around.
    const unsigned at = history[i] - row.tile * TILE;
    if (at >= TILE) continue;
    if (i < params.prompt_tokens) {
      atomicOr(&tile.counts[at], IN_PROMPT);
    } else {
      atomicAdd(&tile.counts[at], 1u);
    }
  }
}

__device__ __forceinline__ void add_biases(const Sampling& s, const RowContext& row, Adjusted& tile) {
  for (unsigned i = threadIdx.x; i < row.params.biases_count; i += THREADS) {
    const unsigned at = s.bias_tokens[row.params.biases_start + i] - row.tile * TILE;
    if (at < TILE) tile.logits[at] += s.bias_values[row.params.biases_start + i];
  }
}

__device__ __forceinline__ void forbid_ends(const Sampling& s, const RowContext& row, Adjusted& tile) {
  if (row.position >= row.params.min_tokens) return;
  for (unsigned i = threadIdx.x; i < row.params.ends_count; i += THREADS) {
    const unsigned at = s.ends[row.params.ends_start + i] - row.tile * TILE;
    if (at < TILE) tile.logits[at] = NOTHING;
  }
}

__device__ __forceinline__ bool allowed(const Sampling& s, const RowContext& row, unsigned token) {
  if (!row.params.constrained || token >= s.vocab) return true;
  const unsigned words = (s.vocab + 31) / 32;
  return s.allowed[(size_t)row.row * words + token / 32] >> token % 32 & 1;
}

// Not fused, as on the CPU.
__device__ __forceinline__ float penalized(float logit, unsigned counts, const RowParams& params) {
  const float penalty = params.repetition_penalty;
  if (counts != 0 && penalty != 1) logit = logit > 0 ? __fdiv_rn(logit, penalty) : __fmul_rn(logit, penalty);
  const unsigned count = counts & ~IN_PROMPT;
  if (count == 0 || !penalizes_output(params)) return logit;
  return __fsub_rn(__fsub_rn(logit, __fmul_rn(params.frequency_penalty, (float)count)), params.presence_penalty);
}

// Changes the thread's logits, and writes them out for the draw.
__device__ __forceinline__ void adjust(const Sampling& s, const RowContext& row, Adjusted& tile, Logits& logits) {
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) {
    const unsigned at = token_of(row, i) % TILE;
    tile.logits[at] = logits.at[i];
    tile.counts[at] = 0;
  }
  __syncthreads();
  count_history(s, row, tile);
  add_biases(s, row, tile);
  __syncthreads();
  forbid_ends(s, row, tile);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) {
    const unsigned token = token_of(row, i), at = token % TILE;
    const float logit = penalized(tile.logits[at], tile.counts[at], row.params);
    logits.at[i] = allowed(s, row, token) ? logit : NOTHING;
    if (token < s.vocab) s.adjusted[(size_t)row.row * s.stride + token] = logits.at[i];
  }
  // The union's other use comes next.
  __syncthreads();
}

struct Ranks {
  u64 at[PIECES * 4];
};
__device__ __forceinline__ Ranks ranks_of(const RowContext& row, const Logits& logits) {
  Ranks ranks;
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) ranks.at[i] = rank_of(logits.at[i], token_of(row, i));
  return ranks;
}

// Rank of the likeliest of the thread's tokens, which ascend.
__device__ __forceinline__ u64 best_rank(const RowContext& row, const Logits& logits) {
  float best = NOTHING;
  unsigned token = token_of(row, 0);
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) {
    if (logits.at[i] > best) {
      best = logits.at[i];
      token = token_of(row, i);
    }
  }
  return rank_of(best, token);
}

// Least rank above `previous` among the block's logits; u64 max if there is none. No rank is 0.
__device__ __forceinline__ u64 next_rank(const Ranks& ranks, u64 previous, u64* partial) {
  u64 least = ~0ull;
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) {
    if (ranks.at[i] < least && ranks.at[i] > previous) least = ranks.at[i];
  }
  return block_reduce<Least>(least, partial);
}

// Of the model's own logits: the tile's share of the softmax's sum, and its likeliest tokens.
__device__ __forceinline__ void measure_tile(
    const Sampling& s, const RowContext& row, const Logits& logits, Shared& shared, TileState& state) {
  float greatest = NOTHING;
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) greatest = logits.at[i] > greatest ? logits.at[i] : greatest;
  greatest = block_reduce<Greatest>(greatest, shared.floats);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) sum += exp_of(__fsub_rn(logits.at[i], greatest));
  sum = block_reduce<Sum>(sum, shared.sums);
  if (threadIdx.x == 0) {
    state.greatest = greatest;
    state.sum = sum;
  }
  const Ranks ranks = ranks_of(row, logits);
  u64* tops = s.tile_tops + ((size_t)row.row * s.tiles + row.tile) * TOP;
  u64 rank = 0;
  for (unsigned i = 0; i < row.params.logprobs; i++) {
    rank = next_rank(ranks, rank, shared.ranks);
    if (threadIdx.x == 0) tops[i] = rank;
  }
}

// Greatest order key of each group of tokens: of 4 neighbouring lanes.
__device__ __forceinline__ void note_groups(const Sampling& s, const RowContext& row, const Logits& logits) {
  unsigned greatest = 0;
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) greatest = max(greatest, order_key(logits.at[i]));
  constexpr int LANES = THREADS / GROUPS;
  greatest = warp_reduce<Greatest>(greatest, LANES);
  unsigned* keys = s.group_keys + ((size_t)row.row * s.tiles + row.tile) * GROUPS;
  if (threadIdx.x % LANES == 0) keys[threadIdx.x / LANES] = greatest;
}

// The normaliser of log-probabilities and the likeliest tokens, from the tiles'.
__device__ __forceinline__ void measure_row(const Sampling& s, const RowContext& row, Shared& shared) {
  const TileState* tiles = s.tile_states + (size_t)row.row * s.tiles;
  const bool has = threadIdx.x < s.tiles;
  const float own = has ? __ldcg(&tiles[threadIdx.x].greatest) : NOTHING;
  const float greatest = block_reduce<Greatest>(own, shared.floats);
  const double share = has ? __ldcg(&tiles[threadIdx.x].sum) * exp((double)own - greatest) : 0;
  const double normalizer = greatest + log(block_reduce<Sum>(share, shared.sums));
  if (threadIdx.x == 0) s.row_states[row.row].normalizer = normalizer;

  const unsigned wanted = row.params.logprobs;
  const u64* tops = s.tile_tops + (size_t)row.row * s.tiles * TOP;
  u64 rank = 0;
  for (unsigned i = 0; i < wanted; i++) {
    u64 least = ~0ull;
    for (unsigned j = threadIdx.x; j < s.tiles * wanted; j += THREADS) {
      const u64 other = __ldcg(&tops[j / wanted * TOP + j % wanted]);
      if (other < least && other > rank) least = other;
    }
    rank = block_reduce<Least>(least, shared.ranks);
    if (threadIdx.x == 0) {
      const unsigned token = (unsigned)rank;
      s.top_tokens[row.row * TOP + i] = token;
      if (token < s.vocab) {
        s.top_logprobs[row.row * TOP + i] = (float)(s.logits[(size_t)row.row * s.stride + token] - normalizer);
      }
    }
  }
}

// An order key that at least as many tokens reach as the filters usually keep, and not many more: the n-th greatest of
// the groups' greatest. 0 where the list has room for all that are possible.
__device__ __forceinline__ unsigned list_threshold(const Sampling& s, const RowContext& row, Shared& shared) {
  const unsigned groups = (s.vocab + GROUP - 1) / GROUP, all = s.tiles * GROUPS, likely = min(groups / 2, 1024u);
  const unsigned wanted = row.params.top_k > 0 ? row.params.top_k : likely;
  if (s.vocab <= LISTED || wanted > groups) return 0;
  const unsigned* keys = s.group_keys + (size_t)row.row * all;
  const u64 rank = first_reaching(shared.descent, 4, wanted, [&](auto visit) {
    for (unsigned i = threadIdx.x; i < all; i += THREADS) visit((u64)~__ldcg(&keys[i]), 1);
  });
  const unsigned threshold = ~(unsigned)rank;
  return threshold > order_key(NOTHING) ? threshold : 0;
}

__device__ __forceinline__ void finish_row(const Sampling& s, const RowContext& row, Shared& shared) {
  RowState& state = s.row_states[row.row];
  const TileState* tiles = s.tile_states + (size_t)row.row * s.tiles;
  const u64 best = block_reduce<Least>(threadIdx.x < s.tiles ? __ldcg(&tiles[threadIdx.x].best) : ~0ull, shared.ranks);
  const unsigned likeliest = (unsigned)best;
  if (row.params.logprobs != NO_LOGPROBS) measure_row(s, row, shared);
  if (greedy(row.params)) {
    if (threadIdx.x != 0) return;
    s.tokens[row.row] = likeliest;
    const double logit = s.logits[(size_t)row.row * s.stride + likeliest];
    if (row.params.logprobs != NO_LOGPROBS) s.logprobs[row.row] = (float)(logit - state.normalizer);
    return;
  }
  const unsigned threshold = filtered(row.params) ? list_threshold(s, row, shared) : 0;
  if (threadIdx.x == 0) {
    state.likeliest = likeliest;
    state.threshold = threshold;
  }
}

// Grid: (tiles, rows). Tokens, and log-probabilities where wanted, of greedy rows; the others' are up to sample_draw.
extern "C" __global__ void __launch_bounds__(THREADS) sample_scan(Sampling s) {
  __shared__ Shared shared;
  const RowContext row = context_of(s);
  if (row.length == 0) return;
  TileState& state = s.tile_states[(size_t)row.row * s.tiles + row.tile];
  Logits logits = load_logits(s, row, s.logits);
  if (row.params.logprobs != NO_LOGPROBS) measure_tile(s, row, logits, shared, state);
  if (row.adjusts) adjust(s, row, shared.adjusted, logits);
  if (!greedy(row.params) && filtered(row.params)) note_groups(s, row, logits);
  const u64 best = block_reduce<Least>(best_rank(row, logits), shared.ranks);
  if (threadIdx.x == 0) state.best = best;
  if (last_of_row(s.row_states[row.row], s.tiles)) finish_row(s, row, shared);
}
REGISTER_KERNEL(sample_scan)
