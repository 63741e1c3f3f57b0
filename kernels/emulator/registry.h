// Kernels by name, with the sizes of their parameters, for the stand-in driver.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

struct Kernel {
  const char* name;
  std::vector<size_t> parameter_bytes;
  std::function<void(void**)> call;  // runs one thread with its parameters at these addresses
};
std::map<std::string, Kernel>& kernels();

template <class... P, size_t... I>
void call_kernel(void (*kernel)(P...), void** parameters, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<P>*)parameters[I]...);
}
template <class... P>
bool register_kernel(const char* name, void (*kernel)(P...)) {
  auto call = [kernel](void** parameters) { call_kernel(kernel, parameters, std::index_sequence_for<P...>{}); };
  return kernels().insert({name, Kernel{name, {sizeof(P)...}, call}}).second;
}

}  // namespace emulator

// After each kernel's definition, once. Nothing for nvcc (see ptx.cuh).
#define REGISTER_KERNEL(name) static bool registered_##name = emulator::register_kernel(#name, name);
