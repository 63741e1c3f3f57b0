//! The operations for processors.
//!
//! Matrices are row-major `f32` slices; *rows* are the tokens of a batch. Operations split their
//! work over a [`ThreadPool`] whose caller works too, and return when all is done.
//!
//! How bits stay equal (see the crate's page): a sum over the inputs of a matrix runs over them in
//! ascending order with fused multiply-adds, vector lanes and threads run over *outputs*; attention
//! takes keys in partitions of 32 that begin at multiples of 32 of the absolute position. All
//! instruction sets share one source, written over [`simd::F32x16`].

mod activation;
mod attention;
mod element;
mod embedding;
mod heads;
mod kv;
mod matmul;
mod memory;
mod norm;
mod packed;
mod pool;
mod rope;
mod scratch;
mod simd;
mod tile;

#[cfg(test)]
mod tests;

pub use activation::{add, add_bias, silu_mul};
pub use attention::{AttentionRow, Queries, attention};
pub use embedding::embed;
pub use heads::Heads;
pub use kv::{KvLayout, KvRow, KvStore, MAX_HEAD_DIM, write_kv};
pub use matmul::matmul;
pub use norm::{rms_norm, rms_norm_heads};
pub use packed::PackedMatrix;
pub use pool::ThreadPool;
pub use rope::rotate_heads;
