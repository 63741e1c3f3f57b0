//! [`KvMemory`]: where the blocks of an engine lie, as leases see it.

use std::any::Any;
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

/// A KV cache as it is described to other processes of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedKv {
    /// How many blocks it has.
    pub blocks: u32,
    /// What the device's driver opens it by, and what it must look like.
    pub description: Vec<u8>,
}

/// The KV cache of another process, open until all clones are dropped.
#[derive(Clone)]
pub struct PeerKv {
    /// How many blocks it has.
    pub blocks: u32,
    /// What the device knows it by.
    pub cache: Arc<dyn Any + Send + Sync>,
}

/// The memory of a KV cache.
#[derive(Clone)]
pub enum KvMemory {
    /// Of the host: read and written in place.
    Host(Arc<KvStore>),
    /// Of a device: read and written through page-locked memory.
    Device(Staging),
}

impl KvMemory {
    /// How processes of this machine can open it, if they can.
    #[must_use]
    pub fn shared(&self) -> Option<SharedKv> {
        match self {
            Self::Host(_) => None,
            Self::Device(staging) => staging.shared().cloned(),
        }
    }

    /// Opens the cache of another process of this machine; `None` if that cannot be done.
    #[must_use]
    pub fn open(&self, shared: SharedKv) -> Soon<Option<PeerKv>> {
        match self {
            Self::Host(_) => at_hand(None),
            Self::Device(staging) => staging.open(shared),
        }
    }
}
