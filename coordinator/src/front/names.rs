//! Requests that run under a name that their client gave them. Each name runs once: a request that is sent again while
//! it still runs is not computed twice. And by its name a client can end it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Longest name.
pub(crate) const MAX_NAME_BYTES: usize = 256;
/// Requests with names that run at a time; far more than may run in all.
const MAX_NAMES: usize = 1 << 16;

/// What a client calls a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    /// Whose names are meant.
    pub(crate) tenant: Arc<str>,
    /// The client's word.
    pub(crate) text: Arc<str>,
}

/// A request cannot run under its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NameError {
    /// Another one does.
    #[error("request {0:?} is already running; it is computed once at a time")]
    Running(Arc<str>),
    /// Too many requests have names.
    #[error("too many requests run")]
    Full,
}

/// All names. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names(Arc<Mutex<Taken>>);

/// Names, and how to tell that the request is to end.
type Taken = HashMap<Name, watch::Sender<bool>>;

/// A name that is taken until this is dropped.
#[derive(Debug)]
pub(crate) struct Named {
    names: Names,
    name: Name,
    aborted: watch::Receiver<bool>,
}

impl Names {
    /// Takes a name.
    pub(crate) fn take(&self, name: Name) -> Result<Named, NameError> {
        let mut taken = self.lock();
        let full = taken.len() >= MAX_NAMES;
        match taken.entry(name.clone()) {
            Entry::Occupied(_) => Err(NameError::Running(name.text)),
            Entry::Vacant(_) if full => Err(NameError::Full),
            Entry::Vacant(free) => {
                let (abort, aborted) = watch::channel(false);
                free.insert(abort);
                Ok(Named { names: self.clone(), name, aborted })
            }
        }
    }

    /// Ends the request of that name, if it runs.
    pub(crate) fn abort(&self, name: &Name) {
        if let Some(abort) = self.lock().get(name) {
            abort.send_replace(true);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        // Nothing panics with the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Named {
    /// Returns when the request is to end.
    pub(crate) async fn aborted(&self) {
        // The sender is there as long as this is.
        let _ = self.aborted.clone().wait_for(|&aborted| aborted).await;
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.names.lock().remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(tenant: &str, text: &str) -> Name {
        Name { tenant: tenant.into(), text: text.into() }
    }

    #[tokio::test]
    async fn a_name_runs_once_at_a_time_and_ends_by_it() {
        let names = Names::default();
        let first = names.take(name("a", "r")).unwrap();
        assert_eq!(names.take(name("a", "r")).unwrap_err(), NameError::Running("r".into()));
        let others = [name("b", "r"), name("a", "s")];
        let others: Vec<_> = others.into_iter().map(|other| names.take(other).unwrap()).collect();
        names.abort(&name("c", "r"));
        names.abort(&name("a", "r"));
        first.aborted().await;
        assert!(others.iter().all(|other| !*other.aborted.borrow()));
        drop(first);
        assert!(!*names.take(name("a", "r")).unwrap().aborted.borrow());
        drop(others);
        assert!(names.lock().is_empty());
    }

    #[test]
    fn there_are_so_many_names() {
        let names = Names::default();
        let taken: Vec<_> =
            (0..MAX_NAMES).map(|at| names.take(name("", &at.to_string())).unwrap()).collect();
        assert_eq!(names.take(name("", "one more")).unwrap_err(), NameError::Full);
        assert_eq!(names.take(name("", "7")).unwrap_err(), NameError::Running("7".into()));
        drop(taken);
        assert!(names.take(name("", "one more")).is_ok());
    }
}
