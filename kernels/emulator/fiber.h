// Stacks that threads of a block run on, and switching between them.
#pragma once

namespace emulator {

// Stack number `i`, reset so that switching to what is returned enters `entry`.
void* fresh_stack(int i, void (*entry)());
// Saves where it is in *save and goes on at `to`.
void switch_stack(void** save, void* to);

}  // namespace emulator
