#include "fiber.h"
#include <sys/mman.h>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t GUARD_BYTES = 4096;

char* stack(int i) {
  static auto& stacks = *new std::vector<char*>;
  while ((int)stacks.size() <= i) {
    void* map = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) {
      fprintf(stderr, "emulator: no memory for stacks\n");
      abort();
    }
    mprotect(map, GUARD_BYTES, PROT_NONE);
    stacks.push_back((char*)map + GUARD_BYTES);
  }
  // A thread that failed left its frames behind.
  ASAN_UNPOISON_MEMORY_REGION(stacks[i], STACK_BYTES);
  return stacks[i];
}

}  // namespace

#if defined(__x86_64__)
// The registers that a call preserves, and the stack: a switch is a call that returns elsewhere.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void* fresh_stack(int i, void (*entry)()) {
  void** top = (void**)(stack(i) + STACK_BYTES);
  *--top = nullptr;         // keeps the stack aligned as after a call
  *--top = (void*)entry;    // what `ret` returns to
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  return top;
}

void switch_stack(void** save, void* to) { emulator_switch(save, to); }
#else
void* fresh_stack(int i, void (*entry)()) {
  static auto& contexts = *new std::vector<ucontext_t*>;
  while ((int)contexts.size() <= i) contexts.push_back(new ucontext_t);
  ucontext_t* context = contexts[i];
  getcontext(context);
  context->uc_stack.ss_sp = stack(i);
  context->uc_stack.ss_size = STACK_BYTES;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void switch_stack(void** save, void* to) {
  // A thread's context object is its own for its whole life; the scheduler's is here.
  static ucontext_t scheduler;
  if (!*save) *save = &scheduler;
  swapcontext((ucontext_t*)*save, (ucontext_t*)to);
}
#endif

}  // namespace emulator
