//! Who sends a request, and what the request uses of what they may.

use std::sync::Arc;

use axum::http::uri::Authority;
use axum::http::{Extensions, HeaderMap};
use baton_proto::trace::TraceContext;
use baton_proto::wire::v1::GenerateRequest;
use tonic::Status;

use super::Door;
use super::keys::Key;
use super::quota::Exceeded;
use super::scope::Scope;
use crate::front::names::{MAX_NAME_BYTES, Name};
use crate::front::refusal::Refusal;

/// Who sends a request. Both fronts find it in the request's extensions.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    key: Option<(Door, Arc<Key>)>,
    /// The client's own span.
    pub(crate) trace: Option<TraceContext>,
    /// What an HTTP client calls the request.
    pub(super) request: Option<Arc<str>>,
    /// What the client calls this server.
    pub(crate) server: Option<Authority>,
}

impl Caller {
    /// Somebody who shows this key, or none where none is needed.
    pub(super) fn new(key: Option<(Door, Arc<Key>)>, headers: &HeaderMap) -> Self {
        let trace = headers.get("traceparent").and_then(|text| text.to_str().ok()?.parse().ok());
        Self { key, trace, request: None, server: None }
    }

    /// Who sends a request with these extensions. Nobody may do anything: then the guard is not in front.
    pub(crate) fn of(extensions: &Extensions) -> Result<Self, Status> {
        extensions.get().cloned().ok_or_else(|| Status::internal("nobody was let in"))
    }

    /// Whose key was given. `None` without keys: then a request may name its tenant itself.
    pub(crate) fn tenant(&self) -> Option<&str> {
        self.key.as_ref().map(|(_, key)| &*key.tenant)
    }

    /// The name under which a request runs, if its client gave it one.
    pub(crate) fn name_of(&self, request: &GenerateRequest) -> Result<Option<Name>, Refusal> {
        let text = match (&*request.request_id, &self.request) {
            ("", None) => return Ok(None),
            ("", Some(name)) => name.clone(),
            (name, _) => name.into(),
        };
        if text.len() > MAX_NAME_BYTES {
            let limit = format!("at most {MAX_NAME_BYTES} bytes long");
            let given = format_args!("{} bytes long", text.len());
            return Err(Refusal::field("request_id", given, &limit));
        }
        let tenant = self.tenant().unwrap_or(&request.tenant).into();
        Ok(Some(Name { tenant, text }))
    }

    /// Whether the key has this scope; without keys everybody has it.
    pub(crate) fn may(&self, scope: Scope) -> bool {
        self.key.as_ref().is_none_or(|(_, key)| key.scopes.contains(&scope))
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

    /// Gives back what was charged for a prompt for which nothing was done.
    pub(crate) fn refund_prompt(&self, tokens: usize) {
        if let Some((door, key)) = &self.0.key {
            door.quotas(|quotas, now| quotas.refund_prompt(&key.accounts, tokens as u64, now));
        }
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
