// The threads of one block: fibers of one CPU thread, which switch where a CUDA thread waits.
#pragma once
#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>
#include "types.h"

namespace emulator {

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;
constexpr int NAMED_BARRIERS = 16;
constexpr int SLOT_BYTES = 64;

// Ascending, but half of the first warp's lanes run only when nobody else can.
constexpr unsigned STRAGGLERS = 2;

// How a grid is run. Any schedule that CUDA allows must give the same results, so tests run several.
struct Schedule {
  unsigned order = 0;  // of threads, warps and blocks: 0 ascending, 1 descending, STRAGGLERS, else shuffled by this seed
  bool early = false;  // asynchronous copies and products happen when issued, instead of as late as they may
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> body;  // what each thread runs
  Schedule schedule;
};

// Runs a grid, block after block. Empty if all went well, else what went wrong.
std::string launch(const Launch&);

// Ends the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// One 16 byte copy (or less) of cp.async. The rest up to `bytes` becomes zero.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, copied;
};

// Products of wgmma that a thread has issued and not waited for; see hopper.h.
struct PendingProduct {
  uint64_t number;  // counts the products of the warpgroup
  float* accumulators;
  bool accumulate;
};

// Barriers count those who have arrived and begin a new generation when all have.
struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

// Where lanes of a warp exchange values. Two rounds of slots: a lane may be one round ahead of a reader.
struct Meeting {
  unsigned arrived = 0;
  uint64_t generation = 0;
  unsigned char slots[2][WARP][SLOT_BYTES];
};

struct Thread {
  uint3 index;
  int number, lane, warp;
  bool finished = false;
  void* stack_pointer = nullptr;

  // What it waits for: until `ready(*watched, value)`, or for a number of turns.
  bool (*ready)(const void* watched, uint64_t value) = nullptr;
  const void* watched = nullptr;
  uint64_t value = 0;
  int turns = 0;
  const char* waits_for = "";

  // cp.async: issued, committed in groups, and waited for but not yet at a barrier.
  std::vector<AsyncCopy> issued_copies, arrived_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;


  uint64_t products = 0;  // how many it has issued
  std::vector<PendingProduct> issued_products;
  std::deque<std::vector<PendingProduct>> product_groups;
};

struct Product;  // hopper.h

struct Warpgroup {
  uint64_t first_product = 0;  // number of products.front()
  std::deque<Product*> products;
};

// The block that runs now. Only one runs in a process: the driver's lock sees to that.
struct Block {
  uint3 index;
  dim3 grid, size;
  Schedule schedule;
  const char* kernel;
  std::vector<Thread> threads;
  Thread* current = nullptr;
  int alive = 0;
  bool idle = false;  // nobody can run but stragglers
  Barrier barriers[NAMED_BARRIERS];
  std::vector<Meeting> full_meetings;                     // by warp, of all its lanes
  std::vector<std::map<unsigned, Meeting>> meetings;      // by warp and mask
  std::vector<Warpgroup> warpgroups;
  std::deque<std::function<void()>> bulk_copies;          // TMA, done when no thread can run
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::string failure;
};
extern Block& block;

// Shared memory begins at this address of the shared window, so that address 0 is never valid.
constexpr unsigned SHARED_START = 1024;
unsigned shared_address(const void* pointer);
void* shared_pointer(unsigned address);

void wait_until(bool (*ready)(const void*, uint64_t), const void* watched, uint64_t value, const char* what);
// Lets others run first, so that whoever was let go too early is overtaken. Nothing in ascending order.
void step_aside();
// `threads` = 0: all that have not exited.
void barrier(int number, int threads);
// Counts at a barrier without waiting there.
void barrier_arrive(int number, int threads);
// What cp.async brought and was waited for becomes visible.
void land_copies(Thread&);
// Leaves a value for the other lanes of `mask`, waits for theirs and returns all of them.
unsigned char (*meet(unsigned mask, const void* value, size_t bytes))[SLOT_BYTES];

}  // namespace emulator

#define threadIdx (emulator::block.current->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)
#define warpSize 32
