// A libnccl.so.2 whose ranks are processes or devices of one machine, with sockets between them: what kernels/src/cuda/nccl uses.
#include <unistd.h>
#include <climits>
#include <cstdio>
#include <cstring>
#include <map>
#include "../types.h"
#include "communicator.h"

using namespace nccl;

// Of the stand-in driver. Work is asked for again as long as it gives NOT_READY.
extern "C" int emulator_enqueue(void* stream, int (*work)(void*), void (*release)(void*), void* data);
extern "C" int emulator_is_device_memory(uint64_t address, size_t bytes);
extern "C" int emulator_current_device();
extern "C" int emulator_memory_device(uint64_t address);
extern "C" int cuStreamIsCapturing(void* stream, int* status);

namespace {

constexpr int WORK_DONE = 0, WORK_NOT_READY = 600;
constexpr unsigned CONFIG_MAGIC = 0xcafebeef;
enum { INT8 = 0, UINT8 = 1, FLOAT32 = 7, BFLOAT16 = 9 };  // ncclDataType_t
enum { SUM = 0 };                                         // ncclRedOp_t

struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

// A rank and its device.
struct Member : Communicator {
  int device = -1;
  using Communicator::Communicator;
};
typedef std::shared_ptr<Member> Handle;

// What tests break, by device: after so many further messages the next one never ends; calls do not return. Until an abort.
struct Faults {
  int messages_left = -1;  // -1: all
  bool calls_hang = false;
};
std::map<int, Faults> faults;

// The library refuses two ranks of a communicator on one device, where it can see that: here, in one process.
void refuse_duplicates(const std::string& id, const Handle& own) {
  static auto& members = *new std::multimap<std::string, std::weak_ptr<Member>>;
  for (auto [at, end] = members.equal_range(id); at != end; ++at) {
    Handle other = at->second.lock();
    if (other && other->device == own->device) other->state = own->state = INVALID_USAGE;
  }
  members.emplace(id, own);
}

// Names that were made here and wait for ranks: how many those who came said there would be, and how many came. The library has a thread
// for each until all are there, or some differ; of other processes' ranks nothing is known here.
auto& awaiting = *new std::map<std::string, std::pair<int, int>>;
void check_in(const std::string& id, int ranks) {
  auto at = awaiting.find(id);
  if (at == awaiting.end()) return;
  auto& [expected, came] = at->second;
  if ((came && expected != ranks) || ++came == ranks) awaiting.erase(at);
  else expected = ranks;
}

size_t element_bytes(int type) {
  static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < 10 ? bytes[type] : 0;
}

// What is to be added up when all parts are here.
struct Reduction {
  const char* own;
  char* result;
  size_t count;
  int type;
  std::map<int, std::vector<char>> parts;  // of other ranks
};

// Everything between a group's start and its end, of one communicator and stream.
struct Group {
  Handle communicator;
  bool captured;    // for a graph, which may run it many times, in its place in the stream
  uint64_t number;  // otherwise: its place among all of the communicator
  std::vector<Transfer> transfers;
  std::vector<std::pair<const char*, size_t>> to_self;  // sends to its own rank, and where they go
  std::vector<std::pair<char*, size_t>> from_self;
  std::vector<std::unique_ptr<Reduction>> reductions;
};

float load(const char* p, int type, size_t i) { return type == FLOAT32 ? ((const float*)p)[i] : (float)((const __nv_bfloat16*)p)[i]; }

// In the order of ranks, so that all get the same bits.
void reduce(const Reduction& r, int rank, int ranks) {
  for (size_t i = 0; i < r.count; i++) {
    float sum = 0;
    for (int other = 0; other < ranks; other++) sum += load(other == rank ? r.own : r.parts.at(other).data(), r.type, i);
    if (r.type == FLOAT32) ((float*)r.result)[i] = sum;
    else ((__nv_bfloat16*)r.result)[i] = sum;
  }
}

int run(void* data) {
  std::lock_guard<std::mutex> locked(mutex);
  Group& group = *(Group*)data;
  Member& c = *group.communicator;
  if (c.aborted) return WORK_DONE;
  int& messages_left = faults[c.device].messages_left;
  if (!group.transfers.empty() && messages_left == 0) return WORK_NOT_READY;
  if ((!group.captured && c.done != group.number) || c.state != SUCCESS) return WORK_NOT_READY;
  for (size_t i = 0; i < group.to_self.size(); i++) memmove(group.from_self[i].first, group.to_self[i].first, group.to_self[i].second);
  Progress progress = nccl::advance(c, group.transfers);  // not std::advance, which takes anything
  // As on a device, work whose peer is gone goes on until the communicator is aborted.
  if (progress == Progress::broken) c.state = REMOTE_ERROR;
  if (progress != Progress::done) return WORK_NOT_READY;
  if (!group.transfers.empty() && messages_left > 0) messages_left--;
  for (auto& reduction : group.reductions) reduce(*reduction, c.rank, c.ranks);
  for (Transfer& t : group.transfers) t.moved = 0;  // a graph may run it again
  if (!group.captured) c.done++;
  return WORK_DONE;
}

// The groups of this thread, by communicator and stream, in the order of their first operation.
thread_local int depth = 0;
thread_local std::vector<std::pair<void*, std::unique_ptr<Group>>> open_groups;

Group& group_of(const Handle& communicator, void* stream) {
  for (auto& [other, group] : open_groups)
    if (other == stream && group->communicator == communicator) return *group;
  open_groups.emplace_back(stream, std::make_unique<Group>());
  open_groups.back().second->communicator = communicator;
  return *open_groups.back().second;
}

Result submit(void* stream, std::unique_ptr<Group> group) {
  if (group->to_self.size() != group->from_self.size()) return INVALID_USAGE;  // to itself only with its receipt
  for (size_t i = 0; i < group->to_self.size(); i++)
    if (group->to_self[i].second != group->from_self[i].second) return INVALID_USAGE;
  int capturing = 0;
  cuStreamIsCapturing(stream, &capturing);
  group->captured = capturing;
  {
    std::lock_guard<std::mutex> locked(mutex);
    if (!capturing) group->number = group->communicator->groups++;
  }
  return emulator_enqueue(stream, run, [](void* group) { delete (Group*)group; }, group.release()) ? UNHANDLED_CUDA_ERROR : SUCCESS;
}

Result end_group() {
  if (--depth > 0) return SUCCESS;
  auto groups = std::move(open_groups);
  open_groups.clear();
  for (auto& [stream, group] : groups)
    if (Result result = submit(stream, std::move(group))) return result;
  return SUCCESS;
}

// Adds an operation to the group, or makes a group of it.
template <class Add>
Result operation(void* handle, void* stream, Add add) {
  const Handle communicator = *(Handle*)handle;
  for (;; usleep(100)) {
    std::lock_guard<std::mutex> locked(mutex);
    if (!faults[communicator->device].calls_hang) break;
    if (communicator->aborted) return REMOTE_ERROR;
  }
  {
    std::lock_guard<std::mutex> locked(mutex);
    if (communicator->state != SUCCESS) return communicator->state == IN_PROGRESS ? INVALID_USAGE : communicator->state;
  }
  depth++;
  add(group_of(communicator, stream));
  return end_group();
}

// Whether it is memory of the communicator's device.
bool on_device(void* handle, const void* p, size_t bytes) {
  return emulator_is_device_memory((uint64_t)p, bytes) && emulator_memory_device((uint64_t)p) == (*(Handle*)handle)->device;
}

void add_transfer(Group& group, int peer, bool sends, const void* data, size_t bytes) {
  if (peer != group.communicator->rank) group.transfers.push_back({peer, sends, (char*)data, bytes});
  else if (sends) group.to_self.push_back({(const char*)data, bytes});
  else group.from_self.push_back({(char*)data, bytes});
}

Result transfer(const void* data, size_t count, int type, int peer, bool sends, void* handle, void* stream) {
  size_t bytes = count * element_bytes(type);
  if (!element_bytes(type) || peer < 0 || peer >= (*(Handle*)handle)->ranks || !on_device(handle, data, bytes)) return INVALID_ARGUMENT;
  return operation(handle, stream, [&](Group& group) { add_transfer(group, peer, sends, data, bytes); });
}

}  // namespace

#define NCCL_API extern "C" __attribute__((visibility("default"))) Result

NCCL_API ncclGetVersion(int* version) {
  *version = 22809;
  return SUCCESS;
}
extern "C" __attribute__((visibility("default"))) const char* ncclGetErrorString(Result result) {
  switch (result) {
    case SUCCESS: return "no error";
    case UNHANDLED_CUDA_ERROR: return "unhandled cuda error";
    case SYSTEM_ERROR: return "unhandled system error";
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    case IN_PROGRESS: return "NCCL operation in progress";
    default: return "unknown result code";
  }
}

struct UniqueId {
  char bytes[ID_BYTES];
};
NCCL_API ncclGetUniqueId(UniqueId* id) {
  static int count = 0;
  std::lock_guard<std::mutex> locked(mutex);
  uint64_t random = 0;
  if (getentropy(&random, sizeof random)) return SYSTEM_ERROR;
  memset(id, 0, sizeof *id);
  snprintf(id->bytes, ID_BYTES, "baton-nccl-%d-%d-%016llx", getpid(), count++, (unsigned long long)random);
  awaiting[id->bytes] = {};
  return SUCCESS;
}

NCCL_API ncclCommInitRankConfig(void** handle, int ranks, UniqueId id, int rank, const Config* config) {
  if (rank < 0 || rank >= ranks || (config && config->magic != CONFIG_MAGIC)) return INVALID_ARGUMENT;
  auto communicator = std::make_shared<Member>(id.bytes, rank, ranks);
  communicator->device = emulator_current_device();
  *handle = new Handle(communicator);
  {
    std::lock_guard<std::mutex> locked(mutex);
    refuse_duplicates(id.bytes, communicator);
    check_in(id.bytes, ranks);
  }
  if (config && config->blocking == 0) return IN_PROGRESS;
  while (communicator->state == IN_PROGRESS) {
    communicator->connect();
    usleep(100);
  }
  return communicator->state;
}
// Of this process' devices.
NCCL_API ncclCommInitAll(void** handles, int ranks, const int* devices) {
  UniqueId id;
  if (Result result = ncclGetUniqueId(&id)) return result;
  std::vector<Handle> all;
  for (int rank = 0; rank < ranks; rank++) {
    for (int other = 0; other < rank; other++)
      if (devices[other] == devices[rank]) return INVALID_USAGE;
    all.push_back(std::make_shared<Member>(id.bytes, rank, ranks));
    all.back()->device = devices[rank];
  }
  for (bool all_here = false; !all_here;) {
    all_here = true;
    for (const Handle& c : all) {
      c->connect();
      if (c->state == SYSTEM_ERROR) return SYSTEM_ERROR;
      all_here &= c->state == SUCCESS;
    }
  }
  for (int rank = 0; rank < ranks; rank++) {
    std::lock_guard<std::mutex> locked(mutex);
    check_in(id.bytes, ranks);
    handles[rank] = new Handle(all[rank]);
  }
  return SUCCESS;
}
NCCL_API ncclCommGetAsyncError(void* handle, Result* state) {
  std::lock_guard<std::mutex> locked(mutex);
  Communicator& c = **(Handle*)handle;
  c.connect();
  *state = c.state;
  return SUCCESS;
}
NCCL_API ncclCommFinalize(void*) { return SUCCESS; }
NCCL_API ncclCommDestroy(void* handle) {
  std::lock_guard<std::mutex> locked(mutex);
  delete (Handle*)handle;  // its work keeps what it needs
  return SUCCESS;
}
NCCL_API ncclCommAbort(void* handle) {
  std::lock_guard<std::mutex> locked(mutex);
  (*(Handle*)handle)->aborted = true;
  (*(Handle*)handle)->close();
  delete (Handle*)handle;
  return SUCCESS;
}

NCCL_API ncclGroupStart() {
  depth++;
  return SUCCESS;
}
NCCL_API ncclGroupEnd() { return depth > 0 ? end_group() : INVALID_USAGE; }

NCCL_API ncclSend(const void* data, size_t count, int type, int peer, void* handle, void* stream) {
  return transfer(data, count, type, peer, true, handle, stream);
}
NCCL_API ncclRecv(void* data, size_t count, int type, int peer, void* handle, void* stream) {
  return transfer(data, count, type, peer, false, handle, stream);
}
NCCL_API ncclAllReduce(const void* from, void* to, size_t count, int type, int reduction, void* handle, void* stream) {
  size_t bytes = count * element_bytes(type);
  bool known = (type == FLOAT32 || type == BFLOAT16) && reduction == SUM;
  if (!known || !on_device(handle, from, bytes) || !on_device(handle, to, bytes)) return INVALID_ARGUMENT;
  return operation(handle, stream, [&](Group& group) {
    auto r = std::make_unique<Reduction>();
    r->own = (const char*)from;
    r->result = (char*)to;
    r->count = count;
    r->type = type;
    for (int peer = 0; peer < group.communicator->ranks; peer++) {
      if (peer == group.communicator->rank) continue;
      auto& part = r->parts[peer];
      part.resize(bytes);
      add_transfer(group, peer, true, from, bytes);
      add_transfer(group, peer, false, part.data(), bytes);
    }
    group.reductions.push_back(std::move(r));
  });
}
NCCL_API ncclAllGather(const void* from, void* to, size_t count, int type, void* handle, void* stream) {
  size_t bytes = count * element_bytes(type);
  int ranks = (*(Handle*)handle)->ranks;
  if (!bytes || !on_device(handle, from, bytes) || !on_device(handle, to, bytes * ranks)) return INVALID_ARGUMENT;
  return operation(handle, stream, [&](Group& group) {
    for (int peer = 0; peer < ranks; peer++) {
      add_transfer(group, peer, true, from, bytes);
      add_transfer(group, peer, false, (char*)to + peer * bytes, bytes);
    }
  });
}

// For tests: whether a name that was made here waits for ranks.
extern "C" __attribute__((visibility("default"))) int emulator_nccl_awaits(const UniqueId* id) {
  std::lock_guard<std::mutex> locked(mutex);
  return awaiting.count(id->bytes);
}
// For tests: from now on only so many messages that a device sends or receives end (-1: all), and calls for it hang or not.
extern "C" __attribute__((visibility("default"))) void emulator_break_nccl(int device, int messages, int calls_hang) {
  std::lock_guard<std::mutex> locked(mutex);
  faults[device] = {messages, calls_hang != 0};
}
