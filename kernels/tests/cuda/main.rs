//! Kernels and the device layer, on a GPU or on the emulator.

mod device;
mod norm;
mod support;
