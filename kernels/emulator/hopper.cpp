#include "hopper.h"
#include <memory>

namespace emulator {

// --- mbarrier: as on the device 8 bytes of shared memory.
namespace {
struct MBarrier {
  uint16_t arrivals : 15, phase : 1;
  int16_t pending;
  int32_t bytes;  // expected and not yet here; negative if they came first
};
static_assert(sizeof(MBarrier) == 8, "the size of an mbarrier");

MBarrier& mbarrier(unsigned address) {
  if (address % 8) fail("uses an mbarrier at %#x, which is not aligned", address);
  return *(MBarrier*)shared_pointer(address);
}

void complete_if_full(MBarrier& b) {
  if (b.pending < 0) fail("arrives at an mbarrier more often than it was initialised for");
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.arrivals;
}
}  // namespace

void mbarrier_init(unsigned address, int arrivals) {
  MBarrier& b = mbarrier(address);
  b.arrivals = b.pending = arrivals;
  b.phase = 0;
  b.bytes = 0;
}

void mbarrier_arrive(unsigned address, int expected_bytes) {
  MBarrier& b = mbarrier(address);
  b.bytes += expected_bytes;
  b.pending--;
  complete_if_full(b);
  step_aside();
}

void mbarrier_wait(unsigned address, int parity) {
  auto passed = [](const void* barrier, uint64_t parity) { return ((const MBarrier*)barrier)->phase != parity; };
  wait_until(passed, &mbarrier(address), parity, "an mbarrier");
}

// --- TMA
namespace {
// 16 byte units of a row of 128 bytes, exchanged by the row's number modulo 8.
unsigned swizzle_128(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

TensorMapContents contents(const TensorMap* map, unsigned shared, size_t rank) {
  TensorMapContents c;
  memcpy(&c, map, sizeof c);
  if (c.rank != rank) fail("uses a tensor map of %d dimensions with %zu coordinates", c.rank, rank);
  if (shared % (c.swizzle == SWIZZLE_128B ? 1024 : 128)) fail("gives TMA a tile at %#x, which is not aligned", shared);
  return c;
}

// Calls `visit(in shared memory, in the tensor or null outside of it)` for each element of a tile.
template <class Visit>
int for_each_element(const TensorMapContents& c, unsigned shared, const std::vector<int>& corner, Visit visit) {
  int count = 1;
  for (int i = 0; i < c.rank; i++) count *= c.box[i];
  for (int i = 0; i < count; i++) {
    unsigned char* element = c.base;
    bool inside = true;
    for (int dimension = 0, rest = i; dimension < c.rank; rest /= c.box[dimension++]) {
      long at = corner[dimension] + rest % c.box[dimension];
      inside &= at >= 0 && at < (long)c.sizes[dimension];
      element += at * (long)(dimension ? c.strides[dimension - 1] : c.element_bytes);
    }
    unsigned address = shared + i * c.element_bytes;
    if (c.swizzle == SWIZZLE_128B) address = swizzle_128(address);
    visit((unsigned char*)shared_pointer(address), inside ? element : nullptr);
  }
  return count * c.element_bytes;
}

void do_later(std::function<void()> copy) {
  if (block.schedule.early) {
    copy();
  } else {
    block.bulk_copies.push_back(std::move(copy));
  }
}
}  // namespace

void tma_load(unsigned to, const TensorMap* map, unsigned barrier, std::vector<int> corner) {
  TensorMapContents c = contents(map, to, corner.size());
  do_later([=] {
    int bytes = for_each_element(c, to, corner, [&](unsigned char* shared, unsigned char* element) {
      element ? memcpy(shared, element, c.element_bytes) : memset(shared, 0, c.element_bytes);
    });
    MBarrier& b = mbarrier(barrier);
    b.bytes -= bytes;
    complete_if_full(b);
  });
}

// --- wgmma
namespace {
// An element of an operand in shared memory with 128 byte swizzle. Descriptors count in units of 16 bytes.
float operand_element(uint64_t descriptor, int element_bytes, bool mn_major, int mn, int k) {
  if (descriptor >> 62 != 1) fail("uses a matrix descriptor without 128 byte swizzle");
  unsigned start = (descriptor & 0x3fff) << 4;
  unsigned leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  unsigned address = mn_major ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                              : start + mn / 8 * stride + mn % 8 * 128 + k * element_bytes;
  const void* element = shared_pointer(swizzle_128(address));
  return element_bytes == 2 ? (float)*(const __nv_bfloat16*)element : emulator_e4m3_to_float(*(const uint8_t*)element);
}

// A from registers lies as in mma.sync, 16 rows a warp.
float register_element(const Product& p, int row, int k) {
  int per_word = 4 / p.element_bytes, half = 16 / p.element_bytes;
  int thread = row / 16 * WARP + row % 8 * 4 + k % half / per_word;
  return emulator_element(p.registers[thread][k / half * 2 + row % 16 / 8], k % per_word, p.element_bytes);
}

void multiply(Product& p) {
  int depth = 32 / p.element_bytes;
  std::vector<float> a(64 * depth), b(p.n * depth);
  for (int row = 0; row < 64; row++)
    for (int k = 0; k < depth; k++)
      a[row * depth + k] = p.a_in_registers ? register_element(p, row, k) : operand_element(p.a, p.element_bytes, false, row, k);
  for (int column = 0; column < p.n; column++)
    for (int k = 0; k < depth; k++)
      b[k * p.n + column] = operand_element(p.b, p.element_bytes, p.b_mn_major, column, k);
  p.result.assign(64 * p.n, 0);
  for (int row = 0; row < 64; row++)
    for (int k = 0; k < depth; k++)
      for (int column = 0; column < p.n; column++) p.result[row * p.n + column] += a[row * depth + k] * b[k * p.n + column];
  p.done = true;
}

Warpgroup& own_warpgroup() {
  if (block.threads.size() % WARPGROUP) fail("uses wgmma in a block that is not of whole warpgroups");
  return block.warpgroups[block.current->number / WARPGROUP];
}

void collect(const PendingProduct& pending) {
  Warpgroup& group = own_warpgroup();
  Product* p = group.products[pending.number - group.first_product];
  auto issued_by_all = [](const void* count, uint64_t all) { return (uint64_t)*(const int*)count == all; };
  wait_until(issued_by_all, &p->issued, WARPGROUP, "other warps of its warpgroup to issue wgmma");
  if (!p->done) multiply(*p);
  int lane = block.current->lane, warp = block.current->warp % 4;
  for (int i = 0; i < p->n / 2; i++) {
    int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = p->result[row * p->n + column];
    pending.accumulators[i] = pending.accumulate ? pending.accumulators[i] + sum : sum;
  }
  p->collected++;
  while (!group.products.empty() && group.products.front()->collected == WARPGROUP) {
    delete group.products.front();
    group.products.pop_front();
    group.first_product++;
  }
}
}  // namespace

void issue_product(float* accumulators, const Product& product, const unsigned* registers, bool accumulate) {
  Thread& t = *block.current;
  Warpgroup& group = own_warpgroup();
  uint64_t number = t.products++;
  if (number - group.first_product == group.products.size()) group.products.push_back(new Product(product));
  Product& p = *group.products[number - group.first_product];
  if (p.a != product.a || p.b != product.b || p.n != product.n || p.a_in_registers != product.a_in_registers)
    fail("issues another wgmma than other threads of its warpgroup");
  if (registers) memcpy(p.registers[t.number % WARPGROUP], registers, sizeof p.registers[0]);
  p.issued++;
  t.issued_products.push_back({number, accumulators, accumulate});
  if (block.schedule.early && p.issued == WARPGROUP) multiply(p);
}

void commit_products() {
  Thread& t = *block.current;
  t.product_groups.push_back(std::move(t.issued_products));
  t.issued_products.clear();
}

void wait_for_products(int groups_left) {
  Thread& t = *block.current;
  while ((int)t.product_groups.size() > groups_left) {
    for (const PendingProduct& pending : t.product_groups.front()) collect(pending);
    t.product_groups.pop_front();
  }
}

}  // namespace emulator
