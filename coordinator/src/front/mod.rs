//! What clients and operators talk to: text, chat templates, stop strings, gRPC and HTTP.
//! Behind it, the core knows tokens only.

use std::sync::Arc;

use crate::aliases::Alias;
use crate::core::{Core, StatusView};
use aliases::Aliases;
use baton_telemetry::Tracer;
use computing::Computing;
use models::Models;
use names::Names;
use running::Running;
use structured::Compiler;

pub mod chat;
pub mod defaults;
pub mod door;
pub mod models;
pub mod stop;
pub mod text;
pub mod tools;

mod aliases;
mod choice;
mod cluster;
mod completion;
mod computing;
mod continued;
mod conversation;
mod details;
mod embed;
mod explain;
mod gateway;
mod http;
mod inference;
mod messages;
mod names;
mod openai;
mod pieces;
mod prepare;
mod python_json;
mod refusal;
mod responses;
mod running;
mod serve;
mod strftime;
mod structured;
mod tokens;
mod trace;
mod watch;

#[cfg(test)]
mod embed_tests;
#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod service_tests;
#[cfg(test)]
mod tests;

pub use http::serve_http;
pub(crate) use openai::body::MAX_BODY_BYTES;
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
    running: Running,
    names: Names,
    computing: Computing,
    compiler: Compiler,
    tracer: Tracer,
}

impl Front {
    /// A front of `core` for `models`, of which some have further names.
    #[must_use]
    pub fn new(core: Core, models: Models, aliases: Vec<Alias>, tracer: Tracer) -> Self {
        let aliases = Aliases::new(aliases, &models);
        Self {
            core,
            models: Arc::new(models),
            aliases: Arc::new(aliases),
            started: openai::unix_now(),
            running: Running::default(),
            names: Names::default(),
            computing: Computing::default(),
            compiler: Compiler::default(),
            tracer,
        }
    }

    /// Begins no more requests, says so wherever it is asked for its health, and returns when those
    /// that run have ended.
    pub async fn drain(&self) {
        self.running.drain();
        self.running.drained().await;
    }

    /// The coordinator as a whole; one that drains is not ready.
    pub(crate) async fn status(&self) -> StatusView {
        let status = self.core.status().await;
        match self.running.draining() {
            true => StatusView { ready: false, reason: "draining".to_owned(), ..status },
            false => status,
        }
    }
}
