// Modules, launches and tensor maps. A module's contents are ignored: kernels are those compiled into this library.
#include <cstdio>
#include <cstring>
#include "../block.h"
#include "../hopper_state.h"
#include "../registry.h"
#include "driver.h"

using namespace driver;

extern "C" int emulator_current_device();
extern "C" int emulator_memory_device(uint64_t address);

std::map<std::string, emulator::Kernel>& emulator::kernels() {
  static auto& all = *new std::map<std::string, Kernel>;
  return all;
}

namespace {

constexpr unsigned SHARED_DEFAULT = 48 << 10, SHARED_MOST = 227 << 10;
constexpr int MAX_DYNAMIC_SHARED = 8;  // CUfunction_attribute

struct Function {
  const emulator::Kernel* kernel;
  unsigned shared_allowed = SHARED_DEFAULT;
};

thread_local emulator::Schedule schedule;

// What a launch passes by value, copied at the call.
struct Parameters {
  std::vector<std::vector<unsigned char>> storage;
  std::vector<void*> addresses;
  Parameters(const emulator::Kernel& kernel, void** parameters) {
    for (size_t i = 0; i < kernel.parameter_bytes.size(); i++) {
      size_t bytes = kernel.parameter_bytes[i];
      storage.emplace_back(bytes + 64);
      addresses.push_back((void*)(((uintptr_t)storage.back().data() + 63) & ~(uintptr_t)63));
      memcpy(addresses.back(), parameters[i], bytes);
    }
  }
};

// Whether an address among the parameters is of another device's memory, which a kernel cannot reach: no access between
// devices is enabled.
bool reaches_elsewhere(const emulator::Kernel& kernel, void** parameters) {
  for (size_t i = 0; i < kernel.parameter_bytes.size(); i++) {
    if (kernel.parameter_bytes[i] != sizeof(uint64_t)) continue;
    int device = emulator_memory_device(*(uint64_t*)parameters[i]);
    if (device >= 0 && device != emulator_current_device()) return true;
  }
  return false;
}

Result run(const emulator::Launch& launch) {
  std::string failure = emulator::launch(launch);
  size_t overrun = find_overrun();
  if (failure.empty() && overrun)
    failure = std::string(launch.kernel) + ": writes before or after " + std::to_string(overrun) + " bytes of device memory";
  if (failure.empty()) return SUCCESS;
  fprintf(stderr, "emulator: %s\n", failure.c_str());
  bool address = overrun || failure.find("not mapped") != std::string::npos;
  return address ? ILLEGAL_ADDRESS : LAUNCH_FAILED;
}

}  // namespace

// For tests: how this thread's next launches are run.
extern "C" __attribute__((visibility("default"))) void emulator_set_schedule(unsigned order, int early) {
  schedule = {order, early != 0};
}

DRIVER_API cuModuleLoadData(void** module, const void*) {
  *module = (void*)0x20;
  return SUCCESS;
}
DRIVER_API cuModuleUnload(void*) { return SUCCESS; }
DRIVER_API cuModuleGetFunction(void** function, void*, const char* name) {
  DRIVER_ENTER;
  static auto& functions = *new std::map<std::string, Function>;
  auto found = emulator::kernels().find(name);
  if (found == emulator::kernels().end()) return NOT_FOUND;
  Function& entry = functions[name];
  entry.kernel = &found->second;
  *function = &entry;
  return SUCCESS;
}
DRIVER_API cuFuncSetAttribute(void* function, int attribute, int value) {
  DRIVER_ENTER;
  if (attribute != MAX_DYNAMIC_SHARED) return SUCCESS;
  if (value < 0 || (unsigned)value > SHARED_MOST) return INVALID_VALUE;
  ((Function*)function)->shared_allowed = value;
  return SUCCESS;
}
DRIVER_API cuFuncGetParamInfo(void* function, size_t i, size_t* offset, size_t* bytes) {
  const auto& sizes = ((Function*)function)->kernel->parameter_bytes;
  if (i >= sizes.size()) return INVALID_VALUE;
  *offset = 0;
  *bytes = sizes[i];
  return SUCCESS;
}
DRIVER_API cuLaunchKernel(void* function_handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream_handle, void** parameters, void**) {
  DRIVER_ENTER;
  const Function& function = *(Function*)function_handle;
  auto stream = find_stream(stream_handle);
  if (!stream) return INVALID_HANDLE;
  uint64_t threads = (uint64_t)block_x * block_y * block_z;
  if (!threads || threads > 1024 || block_z > 64 || shared_bytes > function.shared_allowed) return INVALID_VALUE;
  if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535) return INVALID_VALUE;
  if (reaches_elsewhere(*function.kernel, parameters)) {
    fprintf(stderr, "emulator: %s: memory of another device\n", function.kernel->name);
    return enqueue(*stream, [] { return ILLEGAL_ADDRESS; });
  }
  auto values = std::make_shared<Parameters>(*function.kernel, parameters);
  const emulator::Kernel& kernel = *function.kernel;
  emulator::Launch launch = {kernel.name, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, [values, &kernel] { kernel.call(values->addresses.data()); }, schedule};
  return enqueue(*stream, [launch] { return run(launch); });
}

// CUtensorMapDataType, by bytes of an element.
static int element_bytes(int type) {
  static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < 10 ? bytes[type] : 0;
}

DRIVER_API cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* sizes, const uint64_t* strides,
                                  const unsigned* box, const unsigned* element_strides, int interleave, int swizzle, int, int) {
  emulator::TensorMapContents c = {};
  c.element_bytes = element_bytes(type);
  if (rank < 1 || rank > 5 || !c.element_bytes || interleave || (uintptr_t)base % 16 || (uintptr_t)map % 64) return INVALID_VALUE;
  if (swizzle && swizzle != emulator::SWIZZLE_128B) return INVALID_VALUE;  // the others are not modelled
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > (uint64_t)1 << 32 || !box[i] || box[i] > 256 || element_strides[i] != 1) return INVALID_VALUE;
    if (i && strides[i - 1] % 16) return INVALID_VALUE;
    c.sizes[i] = sizes[i];
    c.box[i] = box[i];
    if (i) c.strides[i - 1] = strides[i - 1];
  }
  unsigned row_bytes = box[0] * c.element_bytes;
  if (row_bytes % 16 || (swizzle && row_bytes > 128)) return INVALID_VALUE;
  c.base = (unsigned char*)base;
  c.rank = rank;
  c.swizzle = swizzle;
  memset(map, 0, 128);
  memcpy(map, &c, sizeof c);
  return SUCCESS;
}
