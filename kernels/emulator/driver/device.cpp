// Devices, contexts and errors.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "driver.h"

using namespace driver;

namespace driver {

Result lost = SUCCESS;

std::unique_lock<std::recursive_mutex> lock() {
  static auto& mutex = *new std::recursive_mutex;
  return std::unique_lock<std::recursive_mutex>(mutex);
}

}  // namespace driver

namespace {

int from_environment(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}

int devices() { return from_environment("BATON_EMULATOR_DEVICES", 16); }
int capability() { return from_environment("BATON_EMULATOR_CAPABILITY", 90); }

// CUdevice_attribute
enum { MAX_THREADS = 1, WARP_SIZE = 10, SM_COUNT = 16, CACHE_BYTES = 38, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, SHARED_OPTIN = 97 };

thread_local void* current_context = nullptr;
// A context is this and its device's number.
constexpr uintptr_t CONTEXT = 0x10;

struct ErrorName {
  Result code;
  const char *name, *description;
};
const ErrorName ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
};
const ErrorName& describe(Result code) {
  static const ErrorName unknown = {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"};
  for (const ErrorName& error : ERRORS)
    if (error.code == code) return error;
  return unknown;
}

}  // namespace

DRIVER_API cuInit(unsigned) { return devices() ? SUCCESS : NO_DEVICE; }
DRIVER_API cuDriverGetVersion(int* version) {
  *version = from_environment("BATON_EMULATOR_VERSION", 13000);
  return SUCCESS;
}
DRIVER_API cuDeviceGetCount(int* count) {
  *count = devices();
  return SUCCESS;
}
DRIVER_API cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= devices()) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}
DRIVER_API cuDeviceGetName(char* name, int bytes, int) {
  snprintf(name, bytes, "emulator");
  return SUCCESS;
}
DRIVER_API cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  memcpy(uuid, "baton emulator  ", 16);
  uuid[15] = (unsigned char)device;
  return SUCCESS;
}
DRIVER_API cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case MAX_THREADS: *value = 1024; break;
    case WARP_SIZE: *value = 32; break;
    case SM_COUNT: *value = 3; break;  // few, so that grids with a block for each go around
    case CACHE_BYTES: *value = 4096; break;
    case CAPABILITY_MAJOR: *value = capability() / 10; break;
    case CAPABILITY_MINOR: *value = capability() % 10; break;
    case SHARED_OPTIN: *value = (capability() == 89 ? 99 : 227) << 10; break;
    default: *value = 0;
  }
  return SUCCESS;
}
DRIVER_API cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(CONTEXT + device);
  return SUCCESS;
}
DRIVER_API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
DRIVER_API cuDevicePrimaryCtxSetFlags_v2(int, unsigned) { return SUCCESS; }
DRIVER_API cuCtxSetCurrent(void* context) {
  current_context = context;
  return SUCCESS;
}
DRIVER_API cuCtxGetCurrent(void** context) {
  *context = current_context;
  return SUCCESS;
}
DRIVER_API cuCtxSynchronize() {
  DRIVER_ENTER;
  if (capturing_thread()) return CAPTURE_UNSUPPORTED;
  return wait_for_all(locked);
}
// For the rest of the stand-ins: the device of the calling thread, or -1.
extern "C" __attribute__((visibility("default"))) int emulator_current_device() {
  return current_context ? (int)((uintptr_t)current_context - CONTEXT) : -1;
}
DRIVER_API cuGetErrorName(Result code, const char** name) {
  *name = describe(code).name;
  return SUCCESS;
}
DRIVER_API cuGetErrorString(Result code, const char** description) {
  *description = describe(code).description;
  return SUCCESS;
}

// For tests: from now on everything fails, as when a device falls off the bus.
extern "C" __attribute__((visibility("default"))) void emulator_lose_device() {
  auto locked = driver::lock();
  lost = LAUNCH_FAILED;
}
