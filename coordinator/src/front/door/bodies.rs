//! How much memory the bodies of all requests may take together.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::front::openai::body::MAX_BODY_BYTES;

/// Default of how many bytes bodies may have that are read or parsed at a time.
pub(crate) const MAX_BODIES_BYTES: usize = 16 * MAX_BODY_BYTES;

/// Memory for bodies. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct BodyMemory(Arc<Semaphore>);

/// Memory of one body, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reserved(OwnedSemaphorePermit);

impl BodyMemory {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))))
    }

    /// Reserves so many bytes, if they are there now: whoever waits would hold what it has so far.
    pub(crate) fn reserve(&self, bytes: usize) -> Option<Reserved> {
        let permits = u32::try_from(bytes).ok()?;
        self.0.clone().try_acquire_many_owned(permits).ok().map(Reserved)
    }
}

impl Reserved {
    /// Adds memory to this.
    pub(crate) fn add(&mut self, more: Self) {
        self.0.merge(more.0);
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.0.num_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_there_again_when_a_body_is_gone() {
        let memory = BodyMemory::new(10);
        let mut first = memory.reserve(4).unwrap();
        let second = memory.reserve(5).unwrap();
        assert!(memory.reserve(2).is_none());
        first.add(memory.reserve(1).unwrap());
        assert_eq!(first.bytes(), 5);
        drop(second);
        assert!(memory.reserve(6).is_none());
        drop(first);
        assert!(memory.reserve(10).is_some());
        assert!(memory.reserve(usize::MAX).is_none());
    }
}
