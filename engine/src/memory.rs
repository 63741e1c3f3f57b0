//! [`KvMemory`]: where the blocks of an engine lie, as leases see it.

use std::pin::Pin;
use std::sync::Arc;

use baton_kernels::cpu::KvStore;

use crate::staging::Staging;

/// Something that takes a copy, or none. What it needs has been asked for already when it is
/// returned; dropping it only says that nobody waits.
pub type Soon<T> = Pin<Box<dyn Future<Output = Result<T, MemoryLost>> + Send>>;

/// The device that holds the blocks has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory of the KV cache has failed")]
pub struct MemoryLost;

/// A [`Soon`] for memory that is at hand.
pub(crate) fn at_hand<T: Send + 'static>(value: T) -> Soon<T> {
    Box::pin(std::future::ready(Ok(value)))
}

/// The memory of a KV cache.
#[derive(Clone)]
pub enum KvMemory {
    /// Of the host: read and written in place.
    Host(Arc<KvStore>),
    /// Of a device: read and written through page-locked memory.
    Device(Staging),
}
