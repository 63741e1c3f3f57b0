//! Who sends a request, and what the request uses of what they may.

use std::sync::Arc;

use axum::http::HeaderMap;
use baton_proto::trace::TraceContext;

use super::Door;
use super::keys::Key;
use super::quota::Exceeded;

/// Who sends a request. Both fronts find it in the request's extensions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    key: Option<(Door, Arc<Key>)>,
    /// The client's own span.
    pub(crate) trace: Option<TraceContext>,
}

impl Caller {
    /// Somebody who shows this key, or none where none is needed.
    pub(super) fn new(key: Option<(Door, Arc<Key>)>, headers: &HeaderMap) -> Self {
        let trace = headers.get("traceparent").and_then(|text| text.to_str().ok()?.parse().ok());
        Self { key, trace }
    }

    /// Whose key was given. `None` without keys: then a request may name its tenant itself.
    pub(crate) fn tenant(&self) -> Option<&str> {
        self.key.as_ref().map(|(_, key)| &*key.tenant)
    }

    /// Begins a request, before anything is done for it.
    pub(crate) fn enter(&self) -> Result<Admission, Exceeded> {
        if let Some((door, key)) = &self.key {
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
        let Some((door, key)) = &self.0.key else { return Ok(()) };
        door.quotas(|quotas, now| quotas.charge_prompt(&key.accounts, tokens as u64, now))
    }

    /// Charges tokens that were generated.
    pub(crate) fn charge_output(&self, tokens: usize) {
        if let Some((door, key)) = &self.0.key {
            door.quotas(|quotas, now| quotas.charge_output(&key.accounts, tokens as u64, now));
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some((door, key)) = &self.0.key {
            door.quotas(|quotas, now| quotas.leave(&key.accounts, now));
        }
    }
}
