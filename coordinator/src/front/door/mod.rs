//! The door: who may come in, as whom, and how much of it. Connections and their limits are in
//! `entrance`, keys in `keys`, what they allow in `scope`, how much in `quota`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwapOption;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;

mod bodies;
mod caller;
mod connection;
mod entrance;
mod guard;
pub mod keys;
mod quota;
mod room;
pub mod scope;
mod tls;

#[cfg(test)]
mod body_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;

pub(crate) use bodies::{MAX_BODIES_BYTES, Reserved};
pub(crate) use caller::{Admission, Caller};
pub use entrance::Entrance;
pub(crate) use entrance::MAX_CONNECTIONS;
pub(crate) use guard::{guard_http, guard_rpc};
pub(crate) use quota::Exceeded;
pub(crate) use room::Room;
pub use tls::{Protocol, Tls, TlsFiles};

use keys::{KeyRing, KeysError};
use quota::{Account, Quotas};
use scope::{Need, Scope};

/// Where clients give their key, beside `authorization`.
const API_KEY_HEADER: &str = "x-api-key";

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum NotLetIn {
    /// No key, or one that is not known. Which of them is nobody's business.
    #[error("a valid API key is needed: `Authorization: Bearer KEY` or `x-api-key: KEY`")]
    Unauthenticated,
    /// The key is for something else.
    #[error("key {key:?} has no scope {:?}, which this needs", scope.as_str())]
    Forbidden {
        /// The key's name.
        key: String,
        /// The scope.
        scope: Scope,
    },
}

/// Checks keys and counts what they use. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Door(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// `None`: everybody is let in, as nobody.
    keys: ArcSwapOption<KeyRing>,
    file: Option<PathBuf>,
    quotas: Mutex<Quotas>,
}

impl Door {
    /// A door for those who have a key of this file; without a file, for everybody.
    pub fn new(file: Option<PathBuf>) -> Result<Self, KeysError> {
        let keys = file.as_deref().map(KeyRing::load).transpose()?;
        let keys = ArcSwapOption::from_pointee(keys);
        Ok(Self(Arc::new(Inner { keys, file, quotas: Mutex::default() })))
    }

    /// Number of keys; `None` without a file.
    #[must_use]
    pub fn key_count(&self) -> Option<usize> {
        self.0.keys.load().as_ref().map(|keys| keys.len())
    }

    /// Reads the file again. If it cannot be used, the keys stay as they are. Gives their number,
    /// `None` without a file. What accounts have used stays used.
    pub fn reload(&self) -> Result<Option<usize>, KeysError> {
        let Some(file) = &self.0.file else { return Ok(None) };
        let keys = Arc::new(KeyRing::load(file)?);
        let count = keys.len();
        self.quotas(|quotas, _| quotas.retain(|account: &Account| keys.knows(account)));
        self.0.keys.store(Some(keys));
        Ok(Some(count))
    }

    /// Who sends a request with these headers, if that is somebody who may.
    pub(crate) fn let_in(&self, headers: &HeaderMap, need: Need) -> Result<Caller, NotLetIn> {
        let keys = self.0.keys.load();
        let Some(keys) = &*keys else { return Ok(Caller::new(None, headers)) };
        if need == Need::Nothing {
            return Ok(Caller::new(None, headers));
        }
        let key = secret(headers).and_then(|secret| keys.find(secret));
        let key = key.ok_or(NotLetIn::Unauthenticated)?;
        match need {
            Need::Scope(scope) if !key.scopes.contains(&scope) => {
                Err(NotLetIn::Forbidden { key: key.name.clone(), scope })
            }
            _ => Ok(Caller::new(Some((self.clone(), key.clone())), headers)),
        }
    }

    /// Does something with the accounts, now.
    fn quotas<T>(&self, then: impl FnOnce(&mut Quotas, Instant) -> T) -> T {
        let mut quotas = self.0.quotas.lock().unwrap_or_else(PoisonError::into_inner);
        then(&mut quotas, Instant::now())
    }
}

/// The key that a request gives. Clients that need none often send an empty one.
fn secret(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, secret) = value.as_bytes().split_at_checked("bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| secret.trim_ascii())
    });
    let bearer = bearer.filter(|secret| !secret.is_empty());
    bearer.or_else(|| headers.get(API_KEY_HEADER).map(|value| value.as_bytes().trim_ascii()))
}
