// Device memory, page-locked host memory, copies, and memory shared between processes.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include "driver.h"

using namespace driver;

extern "C" int emulator_current_device();

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 256;            // the end of an allocation is this close to an inaccessible page
constexpr size_t CAPACITY = (size_t)4 << 30;
constexpr unsigned char POISON = 0xff;       // NaN in every floating-point type, an absurd index as an integer

// An allocation is a file in memory of its own, between two inaccessible pages, so that wild accesses fault,
// freed memory is gone, and other processes can map it.
struct Allocation {
  int file = -1, device = -1;
  char* map = nullptr;  // with both guard pages
  size_t file_bytes = 0, bytes = 0;
  char* start() const { return map + PAGE + offset(); }
  size_t offset() const { return file_bytes - (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
};

struct Memory {
  std::map<uint64_t, Allocation> allocations;  // by start
  std::map<uintptr_t, size_t> pinned;
  std::map<int, size_t> used;  // by device
  size_t capacity = CAPACITY;  // of each
  Memory() {
    if (const char* bytes = getenv("BATON_EMULATOR_MEMORY")) capacity = strtoull(bytes, nullptr, 10);
  }
};
Memory& memory() {
  static auto& all = *new Memory;
  return all;
}

bool map_allocation(Allocation& a) {
  char* map = (char*)mmap(nullptr, a.file_bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return false;
  a.map = map;
  return mmap(map + PAGE, a.file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, a.file, 0) != MAP_FAILED;
}

void release(const Allocation& a) {
  munmap(a.map, a.file_bytes + 2 * PAGE);
  close(a.file);
}

// Poisons what lies between the allocation and its inaccessible pages. False if something had written there.
bool mend_margins(const Allocation& a) {
  char *first = a.map + PAGE, *end = first + a.file_bytes, *after = a.start() + a.bytes;
  auto written = [](char c) { return (unsigned char)c != POISON; };
  bool intact = std::none_of(first, a.start(), written) && std::none_of(after, end, written);
  if (!intact) {
    memset(first, POISON, a.offset());
    memset(after, POISON, end - after);
  }
  return intact;
}

template <class Map, class Key>
auto containing(Map& map, Key address) {
  auto after = map.upper_bound(address);
  return after == map.begin() ? map.end() : --after;
}

bool is_pinned(const void* address, size_t bytes) {
  auto found = containing(memory().pinned, (uintptr_t)address);
  return found != memory().pinned.end() && (uintptr_t)address + bytes <= found->first + found->second;
}

// Work that copies, checked now.
Result enqueue_copy(void* stream_handle, Work copy) {
  auto stream = find_stream(stream_handle);
  return stream ? enqueue(*stream, std::move(copy)) : INVALID_HANDLE;
}

}  // namespace

bool driver::is_device_memory(uint64_t address, size_t bytes) {
  auto found = containing(memory().allocations, address);
  return found != memory().allocations.end() && address + bytes <= found->first + found->second.bytes;
}

size_t driver::find_overrun() {
  size_t bytes = 0;
  for (auto& [_, allocation] : memory().allocations)
    if (!mend_margins(allocation)) bytes = allocation.bytes;
  return bytes;
}

DRIVER_API cuMemGetInfo_v2(size_t* available, size_t* total) {
  DRIVER_ENTER;
  *total = memory().capacity;
  *available = *total - memory().used[emulator_current_device()];
  return SUCCESS;
}
DRIVER_API cuDeviceTotalMem_v2(size_t* total, int) {
  *total = memory().capacity;
  return SUCCESS;
}

DRIVER_API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  DRIVER_ENTER;
  if (!bytes) return INVALID_VALUE;
  if (capturing_thread()) return CAPTURE_UNSUPPORTED;
  Allocation a;
  a.device = emulator_current_device();
  if (a.device < 0) return INVALID_CONTEXT;
  if (memory().used[a.device] + bytes > memory().capacity) return OUT_OF_MEMORY;
  a.bytes = bytes;
  a.file_bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  a.file = memfd_create("baton-emulator", MFD_CLOEXEC);
  if (a.file < 0 || ftruncate(a.file, a.file_bytes) || !map_allocation(a)) return OUT_OF_MEMORY;
  memset(a.map + PAGE, POISON, a.file_bytes);
  *address = (uint64_t)a.start();
  memory().allocations[*address] = a;
  memory().used[a.device] += bytes;
  return SUCCESS;
}
DRIVER_API cuMemFree_v2(uint64_t address) {
  DRIVER_ENTER;
  auto found = memory().allocations.find(address);
  if (found == memory().allocations.end()) return INVALID_VALUE;
  wait_for_all(locked);  // as the driver does; work that failed is no reason to keep memory
  const Allocation a = found->second;
  memory().used[a.device] -= a.bytes;
  memory().allocations.erase(found);
  release(a);
  return SUCCESS;
}

DRIVER_API cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  DRIVER_ENTER;
  if (!bytes) return INVALID_VALUE;
  *address = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
  if (!*address) return OUT_OF_MEMORY;
  memset(*address, POISON, bytes);
  memory().pinned[(uintptr_t)*address] = bytes;
  return SUCCESS;
}
DRIVER_API cuMemFreeHost(void* address) {
  DRIVER_ENTER;
  if (!memory().pinned.count((uintptr_t)address)) return INVALID_VALUE;
  wait_for_all(locked);
  memory().pinned.erase((uintptr_t)address);
  free(address);
  return SUCCESS;
}
DRIVER_API cuMemHostRegister_v2(void* address, size_t bytes, unsigned) {
  DRIVER_ENTER;
  memory().pinned[(uintptr_t)address] = bytes;
  return SUCCESS;
}
DRIVER_API cuMemHostUnregister(void* address) {
  DRIVER_ENTER;
  wait_for_all(locked);
  return memory().pinned.erase((uintptr_t)address) ? SUCCESS : INVALID_VALUE;
}

DRIVER_API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
  DRIVER_ENTER;
  if (!is_device_memory(to, bytes)) return INVALID_VALUE;
  return enqueue_copy(stream, [=] {
    memset((void*)to, value, bytes);
    return SUCCESS;
  });
}
// Page-locked memory is read when the copy runs; other memory is read at once, as the driver stages it.
DRIVER_API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  DRIVER_ENTER;
  if (!is_device_memory(to, bytes)) return INVALID_VALUE;
  auto staged = std::make_shared<std::vector<char>>();
  if (!is_pinned(from, bytes)) {
    staged->assign((const char*)from, (const char*)from + bytes);
    from = staged->data();
  }
  return enqueue_copy(stream, [=] {
    (void)staged;
    memcpy((void*)to, from, bytes);
    return SUCCESS;
  });
}
DRIVER_API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream_handle) {
  DRIVER_ENTER;
  if (!is_device_memory(from, bytes)) return INVALID_VALUE;
  Result result = enqueue_copy(stream_handle, [=] {
    memcpy(to, (void*)from, bytes);
    return SUCCESS;
  });
  if (result || is_pinned(to, bytes)) return result;
  auto stream = find_stream(stream_handle);
  return stream->capture ? SUCCESS : wait(locked, *stream, stream->queued);
}
DRIVER_API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  DRIVER_ENTER;
  if (!is_device_memory(to, bytes) || !is_device_memory(from, bytes)) return INVALID_VALUE;
  return enqueue_copy(stream, [=] {
    memmove((void*)to, (void*)from, bytes);
    return SUCCESS;
  });
}

DRIVER_API cuMemGetAddressRange_v2(uint64_t* start, size_t* bytes, uint64_t address) {
  DRIVER_ENTER;
  auto found = containing(memory().allocations, address);
  if (found == memory().allocations.end()) return INVALID_VALUE;
  *start = found->first;
  *bytes = found->second.bytes;
  return SUCCESS;
}

// An allocation's file, as another process of this user can open it.
struct IpcHandle {
  uint64_t magic, bytes;
  int process, file;
};
static_assert(sizeof(IpcHandle) <= 64, "fits a CUipcMemHandle");
static constexpr uint64_t IPC_MAGIC = 0x62746e2d6d656d31;

DRIVER_API cuIpcGetMemHandle(void* handle, uint64_t address) {
  DRIVER_ENTER;
  auto found = containing(memory().allocations, address);
  if (found == memory().allocations.end()) return INVALID_VALUE;
  IpcHandle contents = {IPC_MAGIC, found->second.bytes, getpid(), found->second.file};
  memset(handle, 0, 64);
  memcpy(handle, &contents, sizeof contents);
  return SUCCESS;
}
struct IpcHandleBytes {
  unsigned char bytes[64];
};
DRIVER_API cuIpcOpenMemHandle_v2(uint64_t* address, IpcHandleBytes handle, unsigned) {
  DRIVER_ENTER;
  IpcHandle contents;
  memcpy(&contents, &handle, sizeof contents);
  if (contents.magic != IPC_MAGIC) return INVALID_VALUE;
  if (contents.process == getpid()) return INVALID_CONTEXT;  // as a device refuses to
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", contents.process, contents.file);
  Allocation a;
  a.device = emulator_current_device();
  a.bytes = contents.bytes;
  a.file_bytes = (a.bytes + PAGE - 1) / PAGE * PAGE;
  a.file = open(path, O_RDWR | O_CLOEXEC);
  if (a.file < 0 || !map_allocation(a)) return INVALID_VALUE;
  *address = (uint64_t)a.start();
  memory().allocations[*address] = a;
  return SUCCESS;
}
DRIVER_API cuIpcCloseMemHandle(uint64_t address) {
  DRIVER_ENTER;
  auto found = memory().allocations.find(address);
  if (found == memory().allocations.end()) return INVALID_VALUE;
  wait_for_all(locked);
  release(found->second);
  memory().allocations.erase(found);
  return SUCCESS;
}

// The device whose memory this is, or -1.
extern "C" __attribute__((visibility("default"))) int emulator_memory_device(uint64_t address) {
  auto locked = lock();
  auto found = containing(memory().allocations, address);
  bool inside = found != memory().allocations.end() && address < found->first + found->second.bytes;
  return inside ? found->second.device : -1;
}
extern "C" __attribute__((visibility("default"))) int emulator_is_device_memory(uint64_t address, size_t bytes) {
  auto locked = lock();
  return is_device_memory(address, bytes);
}
