//! The operations for NVIDIA's GPUs, and everything that talks to the driver.
//!
//! Always compiled; libraries are found at run time ([`Libraries::find`]), and where there are none,
//! that is an error of one line. Everything is queued in a [`Stream`] and returns at once.
//!
//! # Device memory
//! A [`Buffer`] owns it, a [`Slice`] is a part of it. What kernels do with it is outside Rust's
//! rules of borrowing: streams and [`Event`]s order reads and writes. Operations check lengths and
//! alignment; contents that are indices (block tables, token ids) they trust. The host's side of a
//! copy is [`Pinned`], which waits for the copy before it lets the host at the memory.
//!
//! # Adding a kernel
//! 1. `kernels/cuda/name.cu`: `#include "ptx.cuh"` (or `hopper.cuh`, for Hopper only), then
//!    `extern "C" __global__ void __launch_bounds__(threads) name(outputs, inputs, sizes)`, and
//!    after it the line `REGISTER_KERNEL(name)`. Templates are called from kernels with names of
//!    their own. A comment says what it computes and what it wants of its parameters. No asm: an
//!    instruction that is missing is added to `ptx.cuh` or `hopper.cuh` and, for the CPU, to
//!    `kernels/emulator/ptx.h` or `hopper.h`. Dynamic shared memory is `DYNAMIC_SHARED(p)`.
//! 2. `kernels/src/cuda/name.rs`: a safe function that checks lengths and calls
//!    `Stream::launch` with `&[&y, &x, &(n as i32)]` in the order of the parameters, whose sizes
//!    are compared with the kernel's. [`norm`](rms_norm) is the example. Structs that a kernel
//!    takes by value are `repr(C)` and named in `parameters!`.
//! 3. `kernels/tests/cuda/name.rs`: compares with an f64 reference on random shapes, under
//!    `testing::schedules`; see `tests/cuda/norm.rs`. `cargo test -p baton-kernels --test cuda`
//!    compiles the `.cu` files with g++ and runs them on the CPU; on a machine with a GPU the same
//!    binary runs the built-in ones. `BATON_TEST_DEVICE=emulator|real` chooses.
//! 4. `scripts/build-kernels` compiles them with nvcc (which it installs from PyPI), prints
//!    registers and spills and updates `kernels/cuda/cubin/`. A test fails until that is done.
//!    Where binaries conflict in a merge, take either side and run it again.
//! 5. `tests/cuda/faults.rs`, `every_wait_matters`: removes each barrier and wait in turn. What no
//!    test misses is either not needed or not tested; if it is needed for a reason that the
//!    emulator cannot show, its line ends with `// not seen by the emulator: …`.
//!
//! Where a kernel fails in the emulator, standard error has its name, the block, the thread and what
//! it did. `BATON_EMULATOR_SANITIZE=1` compiles it with AddressSanitizer (run the tests with
//! `LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0`).
//! `BATON_EMULATOR_{DEVICES,CAPABILITY,VERSION,MEMORY}` say what it pretends to be: so many
//! devices, compute capability 90, CUDA 13000, bytes of memory.
//! `BATON_EMULATOR_IGNORE_WAIT=3` makes the third wait for an event that has not happened yet none:
//! `testing::waits_not_missed` runs a test without each of them.
#![expect(unsafe_code, reason = "calls the driver")]

mod activation;
mod advance;
mod attention;
mod blocks;
mod device;
mod embedding;
mod error;
mod event;
mod gemm;
mod graph;
mod images;
mod ipc;
mod kernel;
mod kv;
mod library;
mod memory;
mod nccl;
mod norm;
mod probe;
mod quantize;
mod resolve;
mod rope;
mod sampling;
mod shape;
mod stream;
mod symbols;
mod tensor_map;
#[doc(hidden)]
pub mod testing;
mod widen;

pub use activation::silu_mul;
pub use advance::{Histories, RowProgress, advance};
pub use attention::{
    AttentionInput, DecodePlan, DecodeScratch, QueryRows, decode_attention, decode_workers,
    prefill_attention, prefill_tiles, split_runs,
};
pub use blocks::{PieceShare, Pieces, gather_blocks, scatter_blocks};
pub use device::{Device, DeviceMemory};
pub use embedding::take_rows;
pub use error::DeviceError;
pub use event::Event;
pub use gemm::{Factors, Gemm, Matmul, Output, Tuned};
pub use graph::Graph;
pub use images::{IMAGES, Image, Target};
pub use ipc::{IpcHandle, SharedBuffer};
pub use kv::{HeadShape, KvElements, PagedKv};
pub use library::{Libraries, LibraryPaths, Missing};
pub use memory::{Buffer, Element, Pinned, Slice};
pub use nccl::{Abort, Communicator, Nccl, NcclError, Reducible, UniqueId};
pub use norm::{add_rms_norm, rms_norm};
pub use probe::{DeviceReport, Probe, probe};
pub use quantize::{E4M3_MAX, dequantize_rows, quantize_rows};
pub use resolve::{SAMPLED, resolve_tokens};
pub use rope::{NO_POSITION, RowPlaces, Turning, rope_angles, turn_and_store};
pub use sampling::{DeviceSampler, MAX_TOP, MAX_VOCAB, NO_LOGPROBS};
pub use sampling::{SamplingInputs, SamplingOutputs, SamplingRow};
pub use shape::MAX_WIDTH;
pub use stream::Stream;
pub use widen::widen_blocks;
