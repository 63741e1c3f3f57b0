//! What clients and operators talk to: text, chat templates, stop strings, gRPC and HTTP.
//! Behind it, the core knows tokens only.

use std::sync::Arc;

use crate::aliases::Alias;
use crate::core::Core;
use aliases::Aliases;
use models::Models;

pub mod chat;
pub mod defaults;
pub mod models;
pub mod stop;
pub mod text;
pub mod tools;

mod aliases;
mod choice;
mod cluster;
mod conversation;
mod http;
mod inference;
mod messages;
mod openai;
mod pieces;
mod prepare;
mod python_json;
mod refusal;
mod responses;
mod serve;
mod strftime;

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;

pub use http::serve_http;
pub use serve::{PlaintextRefused, check_plaintext, serve_grpc};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Serves clients. Cheap to clone.
#[derive(Clone)]
pub struct Front {
    core: Core,
    models: Arc<Models>,
    aliases: Arc<Aliases>,
    /// Seconds since 1970, as the date of the models.
    started: u64,
}

impl Front {
    /// A front of `core` for `models`, of which some have further names.
    #[must_use]
    pub fn new(core: Core, models: Models, aliases: Vec<Alias>) -> Self {
        let aliases = Aliases::new(aliases, &models);
        let started = openai::unix_now();
        Self { core, models: Arc::new(models), aliases: Arc::new(aliases), started }
    }
}
