// Runs CUDA C++ on the CPU, to test kernels without a GPU. g++ compiles the same .cu files
// (-x c++ -include emulator.h) that nvcc compiles for devices; driver/ is a libcuda.so.1 that runs them.
//
// One fiber per CUDA thread, one block at a time; a warp runs until all its lanes wait for something outside it.
// Memory is poisoned, and what is asynchronous happens as late as it may, or (Schedule::early) at once, so that a
// missing wait or barrier shows in the results. Where a thread breaks a rule that is checked (a shuffle from a lane
// that is not in the mask, a deadlock, an access outside memory), the launch fails with an error that says where.
//
// It cannot find: missing fences, races between blocks, bank conflicts, too many registers, and whatever this model
// of the instructions has wrong. Blocks cannot wait for each other, as one runs after another.
#pragma once
#define BATON_EMULATOR 1
#include "types.h"
#include "arithmetic.h"
#include "block.h"
#include "warp.h"
#include "registry.h"
