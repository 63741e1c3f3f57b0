// A libcuda.so.1 that runs kernels with the emulator: the part of the driver API that kernels/src/cuda uses.
//
// Streams are lazy: work runs only when somebody waits for it, and then only what was waited for and what that depends on by
// events. So a missing event, or a host buffer read or reused too early, shows as poison instead of working by luck.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

namespace driver {

// The values of cuda.h that are used here.
typedef int Result;
enum : Result {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, DEINITIALIZED = 4, NO_DEVICE = 100, INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
  ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901,
  CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907, UNKNOWN = 999,
};

// A piece of work of a stream. NOT_READY: it waits for something outside and is to be asked again.
// It may run several times, as part of a graph.
typedef std::function<Result()> Work;

struct Stream;

// What streams recorded instead of running it.
struct Capture {
  std::vector<Work> work;
  Stream* origin;
  std::set<Stream*> unjoined;  // others, whose latest work the origin has not waited for
};

struct Stream {
  std::deque<Work> queue;
  uint64_t queued = 0, done = 0;  // pieces of work so far
  Result error = SUCCESS;         // of work that failed; it stays, as on a device, but only for this stream
  std::shared_ptr<Capture> capture;
  uint64_t captured = 0;
};

// Where in a stream an event was recorded last.
struct Event {
  std::shared_ptr<Stream> stream;
  uint64_t position = 0;
  std::shared_ptr<double> seconds;  // when that was reached
  std::shared_ptr<Capture> capture;
  uint64_t captured = 0;
};

// Everything here is under this lock, kernels too.
std::unique_lock<std::recursive_mutex> lock();
// Set when the device was lost: every call fails with it from then on.
extern Result lost;

std::shared_ptr<Stream> find_stream(void* handle);
Result enqueue(Stream& stream, Work work);
// Runs a stream's work up to a position; NOT_READY if it got stuck before.
Result advance(Stream& stream, uint64_t position);
// As advance, until it is there.
Result wait(std::unique_lock<std::recursive_mutex>&, Stream& stream, uint64_t position);
Result wait_for_all(std::unique_lock<std::recursive_mutex>&);
// Whether this thread is capturing, so that calls that wait or allocate are refused.
bool capturing_thread();

// Whether [address, address + bytes) is device memory.
bool is_device_memory(uint64_t address, size_t bytes);
// Bytes of an allocation around which something was written since the last call; 0 if there is none.
size_t find_overrun();

}  // namespace driver

#define DRIVER_API extern "C" __attribute__((visibility("default"))) driver::Result
// The start of every call that uses the device.
#define DRIVER_ENTER      \
  auto locked = driver::lock(); \
  if (driver::lost) return driver::lost
