// The second pass of sampling: filters and draws. See sampling.cuh.
#include "descent.cuh"
#include "sampling.cuh"

// Weights are added as integers, in units of 2^-45: exact for weights from 2^-22, and 2^18 of them fit 64 bits.
constexpr float UNIT_INVERSE = 35184372088832.0f;  // 2^45
constexpr unsigned TOKEN_BITS = 18;

// The tokens among which one is drawn: `ids`, or all from `first` on.
struct Source {
  const unsigned* ids;
  const float* values;
  unsigned first, count;
};

struct Shared {
  Descent descent;
  unsigned ids[LISTED];
  float values[LISTED];
};

// A token's weight: proportional to its probability, 1 for the likeliest.
struct Weigher {
  float greatest, inverse_temperature;
  __device__ float scaled(float logit) const { return __fmul_rn(__fsub_rn(logit, greatest), inverse_temperature); }
  __device__ float weight(float logit) const { return exp_of(scaled(logit)); }
};
__device__ __forceinline__ u64 units(float weight) { return (u64)(weight * UNIT_INVERSE); }

// Less for likelier tokens, the lower id first: (how far below the likeliest, order key, id). The first is implied by
// the second; it spreads the ranks evenly over the first digit's bins.
constexpr int RANK_DIGITS = 6;
__device__ __forceinline__ u64 filter_rank(const Weigher& weigher, float logit, unsigned token) {
  const unsigned distance = (unsigned)(weigher.scaled(logit) * -11.5f);
  return ((u64)(distance < BINS ? distance : BINS - 1) << 32 | (unsigned)~order_key(logit)) << TOKEN_BITS | token;
}

// Calls visit(token, logit, weight) for the thread's tokens that are possible at all.
template <class Visit>
__device__ __forceinline__ void each_token(const Source& source, const Weigher& weigher, Visit visit) {
  for (unsigned i = threadIdx.x; i < source.count; i += THREADS) {
    const unsigned token = source.ids != nullptr ? source.ids[i] : source.first + i;
    const float weight = weigher.weight(source.values[i]);
    if (weight > 0) visit(token, source.values[i], weight);
  }
}

// What filters keep: ranks up to `last`, weights from `least` on.
struct Kept {
  u64 last;
  float least;
};

// Sum over tokens up to rank `last` of their weights, or of 1.
template <class Amount>
__device__ u64 sum_up_to(const Source& source, const Weigher& weigher, u64 last, Shared& shared, Amount amount) {
  u64 sum = 0;
  each_token(source, weigher, [&](unsigned token, float logit, float weight) {
    if (filter_rank(weigher, logit, token) <= last) sum += amount(weight);
  });
  return block_reduce<Sum>(sum, shared.descent.partial);
}

// The rank at which the running sum over tokens up to rank `last` reaches `goal`.
template <class Amount>
__device__ u64 rank_reaching(
    const Source& source, const Weigher& weigher, u64 last, u64 goal, Shared& shared, Amount amount) {
  return first_reaching(shared.descent, RANK_DIGITS, goal, [&](auto visit) {
    each_token(source, weigher, [&](unsigned token, float logit, float weight) {
      const u64 rank = filter_rank(weigher, logit, token);
      if (rank <= last) visit(rank, amount(weight));
    });
  });
}

__device__ __forceinline__ u64 share(float p, u64 total) {
  const u64 goal = (u64)ceil((double)p * (double)total);
  return goal > 1 ? goal : 1;
}

// Top-k, then top-p of what it kept: the rank of the last token kept. `total` is the weight of all tokens, of which the
// source may lack those that are not kept.
__device__ u64 last_kept(
    const Source& source, const Weigher& weigher, const RowParams& params, u64 total, Shared& shared) {
  const auto one = [](float) -> u64 { return 1; };
  u64 last = ~0ull;
  if (params.top_k > 0 && sum_up_to(source, weigher, last, shared, one) > params.top_k) {
    last = rank_reaching(source, weigher, last, params.top_k, shared, one);
  }
  if (params.top_p >= 1) return last;
  if (params.top_k > 0) total = sum_up_to(source, weigher, last, shared, units);
  return total == 0 ? last : rank_reaching(source, weigher, last, share(params.top_p, total), shared, units);
}

// SplitMix64 (Steele, Lea and Flood, 2014) of (seed, position), as the CPU sampler's: 53 random bits.
__device__ __forceinline__ u64 mix(u64 z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
__device__ __forceinline__ u64 random_bits(u64 seed, unsigned position) {
  return mix(mix(seed) + 0x9e3779b97f4a7c15ull * (position + 1ull)) >> 11;
}

// What the running sum of weights, in order of ids, must reach, so that each token gets its share: random * total + 1.
__device__ __forceinline__ u64 draw_goal(const RowContext& row, u64 total) {
  return __umul64hi(random_bits(row.params.seed, row.position) << 11, total) + 1;
}

// Draws from what is kept of `source`; `likeliest` if nothing is.
__device__ unsigned draw_kept(
    const Source& source, const Weigher& weigher, Kept kept, const RowContext& row, unsigned likeliest, Shared& shared) {
  const auto drawn = [&](float weight) { return weight < kept.least ? 0 : units(weight); };
  const u64 total = sum_up_to(source, weigher, kept.last, shared, drawn);
  if (total == 0) return likeliest;
  return (unsigned)first_reaching(shared.descent, 2, draw_goal(row, total), [&](auto visit) {
    each_token(source, weigher, [&](unsigned token, float logit, float weight) {
      if (filter_rank(weigher, logit, token) <= kept.last) visit(token, drawn(weight));
    });
  });
}

// Whether the list has every token that the filters keep.
__device__ bool suffices(
    const Source& list, const Weigher& weigher, const RowContext& row, unsigned threshold, u64 total, Shared& shared) {
  if (list.count > LISTED) return false;
  if (threshold == 0) return true;
  if (row.params.top_k > 0) return list.count >= row.params.top_k;
  return sum_up_to(list, weigher, ~0ull, shared, units) >= share(row.params.top_p, total);
}

__device__ unsigned draw_filtered(
    const Sampling& s, const RowContext& row, const Weigher& weigher, const float* values, u64 total, Shared& shared) {
  const RowState& state = s.row_states[row.row];
  const unsigned listed = __ldcg(&state.listed);
  for (unsigned i = threadIdx.x; i < listed && i < LISTED; i += THREADS) {
    shared.ids[i] = __ldcg(&s.lists[(size_t)row.row * LISTED + i]);
    shared.values[i] = values[shared.ids[i]];
  }
  __syncthreads();
  Source source = {shared.ids, shared.values, 0, listed};
  if (!suffices(source, weigher, row, state.threshold, total, shared)) source = {nullptr, values, 0, s.vocab};
  const Kept kept = {last_kept(source, weigher, row.params, total, shared), row.params.min_p};
  return draw_kept(source, weigher, kept, row, state.likeliest, shared);
}

// Without a filter by rank: finds the tile by the tiles' sums, then draws in it.
__device__ unsigned draw_plain(
    const Sampling& s, const RowContext& row, const Weigher& weigher, const float* values, u64 total, Shared& shared) {
  if (total == 0) return s.row_states[row.row].likeliest;
  const u64 goal = draw_goal(row, total);
  const TileState* tiles = s.tile_states + (size_t)row.row * s.tiles;
  const unsigned tile = (unsigned)first_reaching(shared.descent, 1, goal, [&](auto visit) {
    if (threadIdx.x < s.tiles) visit(threadIdx.x, __ldcg(&tiles[threadIdx.x].weight));
  });
  const u64 rest = goal - shared.descent.before;
  const unsigned first = tile * TILE, count = min((unsigned)TILE, s.vocab - first);
  const Source source = {nullptr, values + first, first, count};
  return (unsigned)first_reaching(shared.descent, 2, rest, [&](auto visit) {
    each_token(source, weigher, [&](unsigned token, float, float weight) {
      visit(token, weight < row.params.min_p ? 0 : units(weight));
    });
  });
}

// The tile's weights, and its tokens that may be among the likeliest.
__device__ __forceinline__ void weigh_tile(
    const Sampling& s, const RowContext& row, const Weigher& weigher, const float* from, Shared& shared) {
  RowState& state = s.row_states[row.row];
  const bool lists = filtered(row.params);
  const unsigned threshold = state.threshold;
  const Logits logits = load_logits(s, row, from);
  u64 sum = 0;
#pragma unroll
  for (int i = 0; i < PIECES * 4; i++) {
    const float weight = weigher.weight(logits.at[i]);
    if (lists || weight >= row.params.min_p) sum += units(weight);
    if (lists && weight > 0 && order_key(logits.at[i]) >= threshold) {
      const unsigned at = atomicAdd(&state.listed, 1u);
      if (at < LISTED) s.lists[(size_t)row.row * LISTED + at] = token_of(row, i);
    }
  }
  sum = block_reduce<Sum>(sum, shared.descent.partial);
  if (threadIdx.x == 0) s.tile_states[(size_t)row.row * s.tiles + row.tile].weight = sum;
}

// Grid: (tiles, rows), after sample_scan. Tokens and log-probabilities of the rows that are not greedy.
extern "C" __global__ void __launch_bounds__(THREADS) sample_draw(Sampling s) {
  __shared__ Shared shared;
  const RowContext row = context_of(s);
  if (row.length == 0 || greedy(row.params)) return;
  RowState& state = s.row_states[row.row];
  const float* from = row.adjusts ? s.adjusted : s.logits;
  const float* values = from + (size_t)row.row * s.stride;
  const Weigher weigher = {values[state.likeliest], __fdiv_rn(1.0f, row.params.temperature)};
  weigh_tile(s, row, weigher, from, shared);
  if (!last_of_row(state, s.tiles)) return;
  const TileState* tiles = s.tile_states + (size_t)row.row * s.tiles;
  const u64 own = threadIdx.x < s.tiles ? __ldcg(&tiles[threadIdx.x].weight) : 0;
  const u64 total = block_reduce<Sum>(own, shared.descent.partial);
  const unsigned token = filtered(row.params) ? draw_filtered(s, row, weigher, values, total, shared)
                                              : draw_plain(s, row, weigher, values, total, shared);
  if (threadIdx.x != 0) return;
  state.listed = 0;
  s.tokens[row.row] = token;
  const double logit = s.logits[(size_t)row.row * s.stride + token];
  if (row.params.logprobs != NO_LOGPROBS) s.logprobs[row.row] = (float)(logit - state.normalizer);
}
REGISTER_KERNEL(sample_draw)
