// The warp of prefill_attention.cu that copies tiles to shared memory.
#pragma once
#include "prefill_shared.cuh"

namespace prefill {

// The warp that copies. Lanes look up and copy different boxes: there are 2 to 16 in a tile.
template <int D, int PAGE>
struct Producer {
  static constexpr int PAGES = TILE_KEYS / PAGE;
  static constexpr int COLUMNS = D / COLUMN;
  static_assert(PAGES * COLUMNS <= 32, "a lane for each box");

  const Arguments& a;
  const TensorMap* query_map;  // [rows, heads, D], boxes of TILE_ROWS / group tokens x group heads x COLUMN
  const TensorMap* kv_map;     // [pool_rows, D], boxes of PAGE x COLUMN
  unsigned char* memory;       // of the block, for what is written by hand
  Shared<D> shared;
  int lane;

  __device__ void run() {
    Work work;
    unsigned loaded = 0, tails = 0;
    for (unsigned round = 0; take_work(a, round, work); round++) {
      for (int tile = work.end - 1; tile >= work.first; tile--, loaded++) {
        load_keys(work, tile, loaded);
        // In the order in which there is room and consumers want them: the first keys before the queries, whose place is free only
        // when the tile before has ended, and the next keys before these values.
        if (tile == work.end - 1) load_queries(work, round);
        else load_values(work, tile + 1, loaded - 1, tails);
      }
      load_values(work, work.first, loaded - 1, tails);
    }
  }

  __device__ void load_queries(const Work& work, unsigned round) {
    const unsigned tokens = TILE_ROWS / a.group;
    mbarrier_wait(shared.queries_empty(), round & 1 ^ 1);
    // Copies may be done before they are expected: the barrier counts below zero, and its phase cannot end before lane 0 arrives.
    if (lane == 0) mbarrier_arrive_expect(shared.queries_full(), tokens * a.group * D * sizeof(bf16));
    if (lane < COLUMNS) {
      tma_load_3d(shared.queries() + lane * COLUMN_BYTES, query_map, shared.queries_full(), lane * COLUMN,
                  work.kv_head * a.group, work.tile.row);
    }
  }

  __device__ void load_keys(const Work& work, int tile, unsigned number) {
    const int row = pool_row(work, tile, 0);
    mbarrier_wait(shared.keys_empty(number), empty_phase(number));
    load_boxes(shared.keys(number), shared.keys_full(number), row);
  }

  __device__ void load_values(const Work& work, int tile, unsigned number, unsigned& tails) {
    const int row = pool_row(work, tile, 1);
    mbarrier_wait(shared.values_empty(number), empty_phase(number));
    if (!has_tail(work, tile)) {
      load_boxes(shared.values(number), shared.values_full(number), row);
      return;
    }
    load_boxes(shared.values(number), shared.tail_loaded(), row);
    mbarrier_wait(shared.tail_loaded(), tails++ & 1);
    clear_tail(work, number);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.values_full(number));
  }

  // First row in the pool of the box that this lane copies. Pages that no row of the tile sees are not read: they may not be in the
  // table. They become zeros.
  __device__ int pool_row(const Work& work, int tile, int half) const {
    const int page = tile * PAGES + lane / COLUMNS;
    const bool seen = page * PAGE < work.end_key && (page + 1) * PAGE > work.first_key;
    if (lane >= PAGES * COLUMNS || !seen) return a.pool_rows;
    const unsigned block = a.tables[(size_t)work.tile.table * a.table_width + page];
    return ((block * 2 + half) * a.kv_heads + work.kv_head) * PAGE;
  }

  __device__ void load_boxes(unsigned to, unsigned barrier, int row) const {
    if (lane == 0) mbarrier_arrive_expect(barrier, Shared<D>::TILE_BYTES);
    // Or a lane that copies nothing could fall two phases behind the barriers that it waits for, and wait forever.
    __syncwarp();
    if (lane >= PAGES * COLUMNS) return;
    const int page = lane / COLUMNS, column = lane % COLUMNS;
    tma_load_2d(to + column * COLUMN_BYTES + page * PAGE * ROW_BYTES, kv_map, barrier, column * COLUMN, row);
  }

  // Slots after the sequence's last key hold anything, and 0 * NaN is NaN: hidden values must be finite. (Hidden
  // keys need not be: their scores are replaced.)
  __device__ bool has_tail(const Work& work, int tile) const {
    const int keys = work.tile.keys, tail = keys % PAGE;
    return tail != 0 && tile == keys / TILE_KEYS && keys - tail < work.end_key;
  }

  // Zeros from the sequence's last key to the end of its page.
  __device__ void clear_tail(const Work& work, unsigned number) const {
    const int first = work.tile.keys % TILE_KEYS, end = (first / PAGE + 1) * PAGE;
    for (int i = first * COLUMNS * 8 + lane; i < end * COLUMNS * 8; i += 32) {
      const int row = i / (COLUMNS * 8), column = i / 8 % COLUMNS, piece = i % 8;
      const unsigned at = shared.values(number) - shared.base + column * COLUMN_BYTES + row * ROW_BYTES + piece * 16;
      *(uint4*)(memory + at) = make_uint4(0, 0, 0, 0);
    }
  }
};

}  // namespace prefill
