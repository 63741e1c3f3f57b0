// Shared memory, barriers, and lanes that meet: what threads of a block have in common.
#include <algorithm>
#include "block.h"

namespace emulator {

unsigned shared_address(const void* pointer) {
  ptrdiff_t offset = (const unsigned char*)pointer - block.shared;
  if (offset < 0 || offset > (ptrdiff_t)block.shared_bytes) fail("uses %p as an address of dynamic shared memory", pointer);
  return SHARED_START + (unsigned)offset;
}

void* shared_pointer(unsigned address) {
  if (address < SHARED_START || address > SHARED_START + block.shared_bytes) fail("uses shared address %#x, which it does not have", address);
  return block.shared + (address - SHARED_START);
}

namespace {
void wait_for_generation(const uint64_t& generation, uint64_t old, const char* what) {
  wait_until([](const void* now, uint64_t old) { return *(const uint64_t*)now != old; }, &generation, old, what);
}
}  // namespace

// True if that was the last one.
static bool arrive(Barrier& barrier, int threads) {
  barrier.arrived++;
  if (barrier.arrived != threads) return false;
  barrier.arrived = 0;
  barrier.generation++;
  return true;
}

static Barrier& named(int number) {
  if (number < 0 || number >= NAMED_BARRIERS) fail("names barrier %d", number);
  land_copies(*block.current);
  return block.barriers[number];
}

void barrier(int number, int threads) {
  Barrier& b = named(number);
  uint64_t generation = b.generation;
  if (arrive(b, threads ? threads : block.alive)) return;
  wait_for_generation(b.generation, generation, number ? "a named barrier" : "__syncthreads");
}

void barrier_arrive(int number, int threads) {
  arrive(named(number), threads);
  step_aside();
}

void land_copies(Thread& thread) {
  for (const AsyncCopy& copy : thread.arrived_copies) {
    memcpy(copy.to, copy.from, copy.copied);
    memset((char*)copy.to + copy.copied, 0, copy.bytes - copy.copied);
  }
  thread.arrived_copies.clear();
}

unsigned char (*meet(unsigned mask, const void* value, size_t bytes))[SLOT_BYTES] {
  Thread& t = *block.current;
  if (!(mask >> t.lane & 1)) fail("is lane %d, which is not in its mask %#x", t.lane, mask);
  unsigned present = 0;
  int lanes = std::min<int>(WARP, (int)block.threads.size() - t.warp * WARP);
  present = lanes == WARP ? ~0u : (1u << lanes) - 1;
  if (mask & ~present) fail("names lanes %#x of a warp that has only %#x", mask, present);
  Meeting& meeting = mask == ~0u ? block.full_meetings[t.warp] : block.meetings[t.warp][mask];
  int round = meeting.generation & 1;
  uint64_t generation = meeting.generation;
  if (bytes) {
    memcpy(meeting.slots[round][t.lane], value, bytes);
  } else {
    land_copies(t);  // a barrier of the warp makes its lanes' copies visible to each other
  }
  meeting.arrived |= 1u << t.lane;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    meeting.generation++;
  } else {
    wait_for_generation(meeting.generation, generation, "other lanes of its warp");
  }
  return meeting.slots[round];
}

}  // namespace emulator
