#include "block.h"
#include <signal.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <utility>
#include "fiber.h"
#include "hopper_state.h"

// Where __shared__ variables are, by shared.ld.
extern "C" __attribute__((visibility("hidden"))) unsigned char emulator_shared_start[], emulator_shared_end[];

namespace emulator {

// Like all state here never destroyed: threads may be at work when the process ends.
Block& block = *new Block;

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t SHARED_LIMIT = 228 << 10;
constexpr unsigned char POISON = 0xff;  // NaN in every floating-point type
constexpr unsigned char CANARY = 0xa5;

// A bulk copy that breaks a rule when it is done, where no thread runs.
struct LateFailure {
  std::string text;
};

void* scheduler_stack = nullptr;
const std::function<void()>* thread_body = nullptr;

// Shared memory of a block, poisoned, the dynamic part with a canary behind it up to an inaccessible page.
void prepare_shared_memory(size_t bytes) {
  static unsigned char* map = nullptr;
  constexpr size_t map_bytes = SHARED_LIMIT + PAGE;
  if (!map) {
    map = (unsigned char*)mmap(nullptr, map_bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) abort();
    mprotect(map + map_bytes, PAGE, PROT_NONE);
  }
  block.shared = map;
  block.shared_bytes = bytes;
  memset(emulator_shared_start, POISON, emulator_shared_end - emulator_shared_start);
  memset(map, POISON, bytes);
  memset(map + bytes, CANARY, PAGE);
}

bool canary_lives() {
  const unsigned char* canary = block.shared + block.shared_bytes;
  return std::all_of(canary, canary + PAGE, [](unsigned char c) { return c == CANARY; });
}

std::string describe_thread(const Thread& t) {
  char text[96];
  snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", t.index.x, t.index.y, t.index.z, block.index.x,
           block.index.y, block.index.z);
  return text;
}

void finish_thread() {
  Thread& t = *block.current;
  land_copies(t);
  if (!t.issued_copies.empty() || !t.copy_groups.empty()) fail("exits with cp.async copies not waited for");
  if (!t.issued_products.empty() || !t.product_groups.empty()) fail("exits with wgmma products not waited for");
  t.finished = true;
  block.alive--;
  Barrier& all = block.barriers[0];
  if (all.arrived && all.arrived == block.alive) {  // those who left do not count at __syncthreads
    all.arrived = 0;
    all.generation++;
  }
}

void thread_main() {
  (*thread_body)();
  finish_thread();
  switch_stack(&block.current->stack_pointer, scheduler_stack);
}

// A wild access of a kernel ends the launch, not the process.
void on_fault(int signal, siginfo_t* info, void*) {
  if (block.current) fail("reads or writes at %p, which is not mapped", info->si_addr);
  // Not ours: die of it as if nobody had looked.
  ::signal(signal, SIG_DFL);
  raise(signal);
}

struct FaultHandlers {
  struct sigaction segv, bus;
  FaultHandlers() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
  }
  ~FaultHandlers() {
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
  }
};

void shuffle(std::vector<int>& numbers, unsigned order, std::mt19937& random) {
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > STRAGGLERS) std::shuffle(numbers.begin(), numbers.end(), random);
}

void prepare_threads(int count) {
  int warps = (count + WARP - 1) / WARP;
  block.threads.assign(count, Thread());
  block.full_meetings.assign(warps, Meeting());
  block.meetings.assign(warps, {});
  for (Warpgroup& group : block.warpgroups)
    for (Product* product : group.products) delete product;
  block.warpgroups.clear();
  block.warpgroups.resize((count + WARPGROUP - 1) / WARPGROUP);
  block.bulk_copies.clear();
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  block.alive = count;
  block.failure.clear();
  for (int i = 0; i < count; i++) {
    Thread& t = block.threads[i];
    unsigned x = block.size.x, y = block.size.y;
    t.index = {i % x, i / x % y, i / (x * y)};
    t.number = i;
    t.lane = i % WARP;
    t.warp = i / WARP;
    t.stack_pointer = fresh_stack(i, thread_main);
  }
}

enum class Turn { waits, paused, ran };

// Lets a thread run until it waits.
Turn take_turn(Thread& t, std::mt19937& random) {
  if (t.turns > 0) {
    t.turns--;
    return Turn::paused;
  }
  if (t.ready && !t.ready(t.watched, t.value)) return Turn::waits;
  if (block.schedule.order == STRAGGLERS && t.warp == 0 && t.lane >= WARP / 2 && !block.idle) return Turn::waits;
  if (block.schedule.order > STRAGGLERS && random() % 4 == 0) return Turn::paused;  // left behind by its warp
  t.ready = nullptr;
  block.current = &t;
  switch_stack(&scheduler_stack, t.stack_pointer);
  block.current = nullptr;
  return Turn::ran;
}

// Runs a warp until all its lanes wait for something outside it. True if any got further.
// In a shuffled order other warps get their turns between, and some lanes are left behind.
bool run_warp(int warp, const std::vector<int>& lanes, std::mt19937& random) {
  bool progress = false, again = true, shuffled = block.schedule.order > STRAGGLERS;
  while (again) {
    again = false;
    for (int lane : lanes) {
      int i = warp * WARP + lane;
      if (i >= (int)block.threads.size() || block.threads[i].finished) continue;
      Turn turn = take_turn(block.threads[i], random);
      if (!block.failure.empty()) return true;
      again |= turn == Turn::ran;
      progress |= turn != Turn::waits;
    }
    again &= !shuffled;
  }
  return progress;
}

void report_deadlock() {
  std::map<std::string, std::vector<int>> waiting;
  for (const Thread& t : block.threads)
    if (!t.finished) waiting[t.waits_for].push_back(t.number);
  block.failure = "deadlock:";
  for (const auto& [what, threads] : waiting)
    block.failure += " " + std::to_string(threads.size()) + " threads from " + std::to_string(threads[0]) + " on wait for " + what + ";";
}

void do_bulk_copy(std::mt19937& random) {
  // In any order, as hardware promises none.
  auto at = block.bulk_copies.begin() + (block.schedule.order > STRAGGLERS ? random() % block.bulk_copies.size() : 0);
  auto copy = std::move(*at);
  block.bulk_copies.erase(at);
  try {
    copy();
  } catch (const LateFailure& failure) {
    block.failure = "a bulk copy " + failure.text;
  }
}

void run_block(std::mt19937& random) {
  int count = block.size.x * block.size.y * block.size.z;
  prepare_shared_memory(block.shared_bytes);
  prepare_threads(count);
  std::vector<int> warps((count + WARP - 1) / WARP), lanes(WARP);
  shuffle(warps, block.schedule.order, random);
  shuffle(lanes, block.schedule.order, random);
  while (block.alive && block.failure.empty()) {
    bool progress = false;
    for (int warp : warps) {
      progress |= run_warp(warp, lanes, random);
      if (!block.failure.empty()) return;
    }
    bool idle = std::exchange(block.idle, false);
    if (progress) continue;
    if (!block.bulk_copies.empty()) do_bulk_copy(random);
    else if (block.schedule.order == STRAGGLERS && !idle) block.idle = true;
    else report_deadlock();
  }
  if (!block.failure.empty()) return;
  if (!block.bulk_copies.empty()) block.failure = "ends while bulk copies are under way";
  if (!canary_lives()) block.failure = "writes past the end of its dynamic shared memory";
}

}  // namespace

std::string launch(const Launch& launch) {
  block.grid = launch.grid;
  block.size = launch.block;
  block.schedule = launch.schedule;
  block.kernel = launch.kernel;
  block.shared_bytes = launch.shared_bytes;
  thread_body = &launch.body;
  FaultHandlers handlers;
  std::mt19937 random(launch.schedule.order);
  dim3 grid = launch.grid;
  std::vector<int> blocks((size_t)grid.x * grid.y * grid.z);
  shuffle(blocks, launch.schedule.order, random);
  for (unsigned i : blocks) {
    block.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(random);
    if (!block.failure.empty()) return std::string(launch.kernel) + ": " + block.failure;
  }
  return "";
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!block.current) throw LateFailure{text};
  block.failure = describe_thread(*block.current) + " " + text;
  void* abandoned;
  switch_stack(&abandoned, scheduler_stack);
  abort();  // nobody comes back to an abandoned stack
}

void wait_until(bool (*ready)(const void*, uint64_t), const void* watched, uint64_t value, const char* what) {
  if (ready(watched, value)) return;
  Thread& t = *block.current;
  t.ready = ready;
  t.watched = watched;
  t.value = value;
  t.waits_for = what;
  switch_stack(&t.stack_pointer, scheduler_stack);
}

void step_aside() {
  if (block.schedule.order == 0) return;
  Thread& t = *block.current;
  t.turns = 64;
  switch_stack(&t.stack_pointer, scheduler_stack);
}

}  // namespace emulator
