//! Tensor operations on the CPU and on GPUs. This crate knows nothing about models.
//!
//! # Equal bits
//! Every output is a function of its own inputs alone, computed in one fixed order: the number of
//! rows in a batch, how a prompt was cut into chunks, the number of threads, the size of KV blocks
//! and the processor's vector width never change a bit of any result. So a sequence may move
//! between machines and batches, and tests may compare for equality.

pub mod cpu;
pub mod cuda;
mod dtype;

pub use dtype::Dtype;

/// To be raised by every change of an operation that changes a bit of any result. Nodes of
/// different revisions do not exchange KV blocks.
pub const RESULT_REVISION: u32 = 1;
