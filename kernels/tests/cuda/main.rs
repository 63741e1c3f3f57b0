//! Kernels and the device layer, on a GPU or on the emulator.
#![expect(clippy::unwrap_used, reason = "tests")]

mod device;
mod gemm;
mod images;
mod norm;
mod resolve;
mod support;
mod tile;
