// Streams, events and graphs.
#include <time.h>
#include <unistd.h>
#include <cstdio>
#include <cstdlib>
#include <map>
#include "driver.h"

using namespace driver;

extern "C" int emulator_current_device();

namespace driver {
namespace {

std::map<void*, std::shared_ptr<Stream>>& streams() {
  static auto& all = *new std::map<void*, std::shared_ptr<Stream>>;
  return all;
}

// Events are recorded by streams of their own device only.
struct OwnedStream : Stream {
  int device = emulator_current_device();
};
struct OwnedEvent : Event {
  int device = emulator_current_device();
};

// The capture that this thread began.
thread_local std::weak_ptr<Capture> thread_capture;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

}  // namespace

std::shared_ptr<Stream> find_stream(void* handle) {
  // The default stream has several names.
  if ((uintptr_t)handle <= 2) handle = nullptr;
  auto found = streams().find(handle);
  if (found != streams().end()) return found->second;
  if (handle) return nullptr;
  return streams()[nullptr] = std::make_shared<OwnedStream>();
}

bool capturing_thread() { return !thread_capture.expired(); }

Result enqueue(Stream& stream, Work work) {
  if (stream.error) return stream.error;
  if (stream.capture) {
    stream.capture->work.push_back(std::move(work));
    stream.captured++;
    if (&stream != stream.capture->origin) stream.capture->unjoined.insert(&stream);
    return SUCCESS;
  }
  stream.queue.push_back(std::move(work));
  stream.queued++;
  return SUCCESS;
}

Result advance(Stream& stream, uint64_t position) {
  while (stream.done < position) {
    if (stream.error) return stream.error;
    Work work = stream.queue.front();
    Result result = work();
    if (result == NOT_READY) return result;
    stream.queue.pop_front();
    stream.done++;
    stream.error = result;
  }
  return stream.error;
}

// What a stream waits for is another stream's, another thread's or another process'. A device runs all of them meanwhile.
static void advance_all() {
  for (auto& [_, other] : std::map(streams())) advance(*other, other->queued);
}

// Whether a wait for a point in a stream is one. For tests, number BATON_EMULATOR_IGNORE_WAIT of those for something that is not
// done yet is none.
static bool heed(const Stream& stream, uint64_t position) {
  static const char* ignored = getenv("BATON_EMULATOR_IGNORE_WAIT");
  static uint64_t waits = 0;
  if (!ignored || stream.done >= position || ++waits != strtoull(ignored, nullptr, 10)) return true;
  fprintf(stderr, "emulator: wait %s is ignored\n", ignored);
  return false;
}

// Asking lets the device get a little further, so that polling ends.
static Result ask(Stream& stream) {
  Result result = advance(stream, stream.done + 1);
  if (result == NOT_READY) advance_all();
  return result ? result : NOT_READY;
}

Result wait(std::unique_lock<std::recursive_mutex>& locked, Stream& stream, uint64_t position) {
  Result result;
  while ((result = advance(stream, position)) == NOT_READY) {
    advance_all();
    locked.unlock();
    usleep(50);
    locked.lock();
    if (lost) return lost;
  }
  return result;
}

Result wait_for_all(std::unique_lock<std::recursive_mutex>& locked) {
  auto all = streams();  // a copy, as the lock may be let go
  Result first = SUCCESS;  // of those that failed, which is no reason not to wait for the others
  for (auto& [handle, stream] : all)
    if (Result result = wait(locked, *stream, stream->queued); result && !first) first = result;
  return first;
}

}  // namespace driver

DRIVER_API cuStreamCreate(void** handle, unsigned) {
  DRIVER_ENTER;
  auto stream = std::make_shared<OwnedStream>();
  *handle = stream.get();
  streams()[*handle] = stream;
  return SUCCESS;
}
DRIVER_API cuStreamCreateWithPriority(void** handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }
DRIVER_API cuStreamDestroy_v2(void* handle) {
  DRIVER_ENTER;
  auto stream = find_stream(handle);
  if (!stream || !handle) return INVALID_HANDLE;
  wait(locked, *stream, stream->queued);
  streams().erase(handle);
  return SUCCESS;
}
DRIVER_API cuStreamSynchronize(void* handle) {
  DRIVER_ENTER;
  auto stream = find_stream(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) return CAPTURE_UNSUPPORTED;
  return wait(locked, *stream, stream->queued);
}
DRIVER_API cuStreamQuery(void* handle) {
  DRIVER_ENTER;
  auto stream = find_stream(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) return CAPTURE_UNSUPPORTED;
  if (stream->done == stream->queued) return stream->error;
  return ask(*stream);
}
DRIVER_API cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
  DRIVER_ENTER;
  auto stream = find_stream(handle);
  if (!stream) return INVALID_HANDLE;
  Event event = *(Event*)event_handle;
  if (event.capture) {
    if (stream->capture && stream->capture != event.capture) return CAPTURE_ISOLATION;
    stream->capture = event.capture;  // a stream that waits for captured work joins in
    if (stream.get() == event.capture->origin && event.stream->captured == event.captured)
      event.capture->unjoined.erase(event.stream.get());
    return SUCCESS;
  }
  if (stream->capture) return CAPTURE_ISOLATION;
  if (!event.stream) return SUCCESS;  // never recorded
  // What a stream did itself is done anyway.
  if (event.stream == stream || !heed(*event.stream, event.position)) return SUCCESS;
  return enqueue(*stream, [event] { return advance(*event.stream, event.position); });
}

DRIVER_API cuEventCreate(void** handle, unsigned) {
  *handle = new OwnedEvent;
  return SUCCESS;
}
DRIVER_API cuEventDestroy_v2(void* handle) {
  delete (OwnedEvent*)handle;
  return SUCCESS;
}
DRIVER_API cuEventRecord(void* handle, void* stream_handle) {
  DRIVER_ENTER;
  auto stream = find_stream(stream_handle);
  if (!stream) return INVALID_HANDLE;
  OwnedEvent& event = *(OwnedEvent*)handle;
  if (event.device != static_cast<OwnedStream&>(*stream).device) return INVALID_HANDLE;
  event.stream = stream;
  event.capture = stream->capture;
  event.captured = stream->captured;
  if (stream->capture) return SUCCESS;
  auto seconds = std::make_shared<double>(0);
  Result result = enqueue(*stream, [seconds] {
    *seconds = now();
    return SUCCESS;
  });
  event.seconds = seconds;
  event.position = stream->queued;
  return result;
}
DRIVER_API cuEventSynchronize(void* handle) {
  DRIVER_ENTER;
  Event event = *(Event*)handle;
  if (event.capture) return CAPTURED_EVENT;
  if (!event.stream || !heed(*event.stream, event.position)) return SUCCESS;
  return wait(locked, *event.stream, event.position);
}
DRIVER_API cuEventQuery(void* handle) {
  DRIVER_ENTER;
  Event event = *(Event*)handle;
  if (event.capture) return CAPTURED_EVENT;
  if (!event.stream) return SUCCESS;
  if (event.stream->done >= event.position) return event.stream->error;
  return ask(*event.stream);
}
DRIVER_API cuEventElapsedTime_v2(float* ms, void* start_handle, void* end_handle) {
  DRIVER_ENTER;
  Event &start = *(Event*)start_handle, &end = *(Event*)end_handle;
  if (!start.seconds || !end.seconds) return INVALID_HANDLE;
  if (start.stream->done < start.position || end.stream->done < end.position) return NOT_READY;
  *ms = (float)((*end.seconds - *start.seconds) * 1e3);
  return SUCCESS;
}
DRIVER_API cuEventElapsedTime(float* ms, void* start, void* end) { return cuEventElapsedTime_v2(ms, start, end); }

// A graph is a list: the order in which work was captured is one that its dependencies allow.
typedef std::vector<Work> Graph;

DRIVER_API cuStreamBeginCapture_v2(void* handle, int) {
  DRIVER_ENTER;
  auto stream = find_stream(handle);
  if (!stream || !handle || stream->capture) return CAPTURE_UNSUPPORTED;
  stream->capture = std::make_shared<Capture>();
  stream->capture->origin = stream.get();
  thread_capture = stream->capture;
  return SUCCESS;
}
DRIVER_API cuStreamEndCapture(void* handle, void** graph) {
  DRIVER_ENTER;
  *graph = nullptr;
  auto stream = find_stream(handle);
  if (!stream || !stream->capture || stream->capture->origin != stream.get()) return INVALID_VALUE;
  auto capture = stream->capture;
  for (auto& [_, other] : streams())
    if (other->capture == capture) other->capture = nullptr;
  thread_capture.reset();
  if (!capture->unjoined.empty()) return CAPTURE_UNJOINED;
  *graph = new Graph(capture->work);
  return SUCCESS;
}
DRIVER_API cuStreamIsCapturing(void* handle, int* status) {
  DRIVER_ENTER;
  auto stream = find_stream(handle);
  if (!stream) return INVALID_HANDLE;
  *status = stream->capture != nullptr;
  return SUCCESS;
}
DRIVER_API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*(Graph*)graph);
  return SUCCESS;
}
DRIVER_API cuGraphUpload(void*, void*) { return SUCCESS; }
DRIVER_API cuGraphLaunch(void* executable, void* stream_handle) {
  DRIVER_ENTER;
  auto stream = find_stream(stream_handle);
  if (!stream) return INVALID_HANDLE;
  for (const Work& work : *(Graph*)executable)
    if (Result result = enqueue(*stream, work)) return result;
  return SUCCESS;
}
DRIVER_API cuGraphExecDestroy(void* executable) {
  delete (Graph*)executable;  // launches hold copies of its work
  return SUCCESS;
}
DRIVER_API cuGraphDestroy(void* graph) {
  delete (Graph*)graph;
  return SUCCESS;
}

// For tests: from now on everything in the streams of one device fails.
extern "C" __attribute__((visibility("default"))) void emulator_fail_streams(int device) {
  auto locked = lock();
  for (auto& [_, stream] : streams())
    if (static_cast<OwnedStream&>(*stream).device == device) stream->error = LAUNCH_FAILED;
}

// For the stand-ins of other libraries: work that may be asked for again (NOT_READY), and how to free what it needs.
extern "C" __attribute__((visibility("default"))) Result emulator_enqueue(void* handle, Result (*work)(void*), void (*release)(void*), void* data) {
  DRIVER_ENTER;
  std::shared_ptr<void> owned(data, release);
  auto stream = find_stream(handle);
  if (!stream) return INVALID_HANDLE;
  return enqueue(*stream, [work, owned] { return work(owned.get()); });
}
