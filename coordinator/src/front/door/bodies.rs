//! How much memory the bodies of all requests may take together.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::front::openai::body::MAX_BODY_BYTES;
use crate::front::refusal::Refusal;

/// Default of how many bytes bodies may have that are read or parsed at a time.
pub(crate) const MAX_BODIES_BYTES: usize = 16 * MAX_BODY_BYTES;

/// Memory for bodies. A tenant may have half of it, so that none can take all; but enough for one body. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct BodyMemory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_tenant: HashMap<Arc<str>, usize>,
}

/// Memory of one body, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reserved {
    memory: BodyMemory,
    tenant: Option<Arc<str>>,
    bytes: usize,
}

impl BodyMemory {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(Inner { most: bytes, taken: Mutex::default() }))
    }

    /// Memory for a body of that tenant, none yet. Without keys nobody can be told from others.
    pub(crate) fn begin(&self, tenant: Option<&str>) -> Reserved {
        Reserved { memory: self.clone(), tenant: tenant.map(Arc::from), bytes: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reserved {
    /// Takes so many bytes more, if they are there now: whoever waits would hold what it has so far.
    pub(crate) fn grow(&mut self, bytes: usize) -> Result<(), Refusal> {
        let most = self.memory.0.most;
        let mut taken = self.memory.lock();
        let fits = |used: usize, most: usize| bytes <= most.saturating_sub(used);
        if !fits(taken.all, most) {
            return Err(Refusal::NoMemory);
        }
        if let Some(tenant) = &self.tenant {
            let own = taken.by_tenant.get(tenant).copied().unwrap_or(0);
            if !fits(own, (most / 2).max(MAX_BODY_BYTES)) {
                return Err(Refusal::NoMemory);
            }
            taken.by_tenant.insert(tenant.clone(), own + bytes);
        }
        taken.all += bytes;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut taken = self.memory.lock();
        taken.all -= self.bytes;
        let Some(tenant) = &self.tenant else { return };
        if let Some(own) = taken.by_tenant.get_mut(tenant) {
            *own -= self.bytes;
            if *own == 0 {
                taken.by_tenant.remove(tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_there_again_when_a_body_is_gone() {
        let memory = BodyMemory::new(10);
        let [mut first, mut second, mut third] = [(); 3].map(|()| memory.begin(None));
        first.grow(4).unwrap();
        second.grow(5).unwrap();
        assert!(third.grow(2).is_err());
        first.grow(1).unwrap();
        drop(second);
        assert!(third.grow(6).is_err());
        drop(first);
        assert!(third.grow(usize::MAX).is_err());
        third.grow(10).unwrap();
    }

    #[test]
    fn a_tenant_has_half_of_it() {
        let memory = BodyMemory::new(4 * MAX_BODY_BYTES);
        let [mut first, mut second, mut other] = ["a", "a", "b"].map(|who| memory.begin(Some(who)));
        first.grow(MAX_BODY_BYTES).unwrap();
        second.grow(MAX_BODY_BYTES).unwrap();
        assert!(first.grow(1).is_err());
        other.grow(2 * MAX_BODY_BYTES).unwrap();
        drop(second);
        first.grow(MAX_BODY_BYTES).unwrap();
        drop((first, other));
        let taken = memory.lock();
        assert_eq!((taken.all, taken.by_tenant.len()), (0, 0));
    }

    #[test]
    fn little_memory_is_enough_for_a_body() {
        let memory = BodyMemory::new(MAX_BODY_BYTES);
        memory.begin(Some("a")).grow(MAX_BODY_BYTES).unwrap();
    }
}
