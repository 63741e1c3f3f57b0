//! Kernels and the device layer, on a GPU or on the emulator.
#![expect(clippy::unwrap_used, reason = "tests")]

mod child;
mod device;
mod failures;
mod gemm;
mod images;
mod ipc;
mod norm;
mod resolve;
mod support;
mod tile;
