//! Who sends a request, and what the request uses of what they may.

use std::sync::Arc;

use super::Door;
use super::keys::Key;
use super::quota::Exceeded;

/// Who sends a request. Both fronts find it in the request's extensions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller(Option<(Door, Arc<Key>)>);

impl Caller {
    pub(super) fn with_key(door: Door, key: Arc<Key>) -> Self {
        Self(Some((door, key)))
    }

    /// Whose key was given. `None` without keys: then a request may name its tenant itself.
    pub(crate) fn tenant(&self) -> Option<&str> {
        self.0.as_ref().map(|(_, key)| &*key.tenant)
    }

    /// Begins a request, before anything is done for it.
    pub(crate) fn enter(&self) -> Result<Admission, Exceeded> {
        if let Some((door, key)) = &self.0 {
            door.quotas(|quotas, now| quotas.enter(&key.accounts, now))?;
        }
        Ok(Admission(self.clone()))
    }
}

/// A request that was let in. Dropping it is its end.
#[derive(Debug)]
pub(crate) struct Admission(Caller);

impl Admission {
    /// Charges the prompt, before anything is spent on it.
    pub(crate) fn charge_prompt(&self, tokens: usize) -> Result<(), Exceeded> {
        let Some((door, key)) = &self.0.0 else { return Ok(()) };
        door.quotas(|quotas, now| quotas.charge_prompt(&key.accounts, tokens as u64, now))
    }

    /// Charges tokens that were generated.
    pub(crate) fn charge_output(&self, tokens: usize) {
        if let Some((door, key)) = &self.0.0 {
            door.quotas(|quotas, now| quotas.charge_output(&key.accounts, tokens as u64, now));
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some((door, key)) = &self.0.0 {
            door.quotas(|quotas, now| quotas.leave(&key.accounts, now));
        }
    }
}
