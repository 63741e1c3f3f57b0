//! Kernels and the device layer, on a GPU or on the emulator.
#![expect(clippy::unwrap_used, reason = "tests")]

mod advance;
mod attention;
mod attention_case;
mod blocks;
mod child;
mod device;
mod element;
mod failures;
mod faults;
mod gemm;
mod images;
mod ipc;
mod nccl;
mod norm;
mod quantize;
mod resolve;
mod rope;
mod sampling;
mod support;
mod tile;
mod widen;
