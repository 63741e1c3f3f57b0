//! The API of OpenAI, with vLLM's additions: from JSON to the one kind of request and back.
//! docs/api.md lists what is understood; everything else is refused by its name.

use axum::Router;
use axum::extract::FromRef;
use axum::routing::{get, post};

use super::Front;

pub(crate) mod body;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod gather;
pub(crate) mod messages;
pub(crate) mod sampling;
pub(crate) mod stream;
pub(crate) mod tools;

mod chat;
mod chat_reply;
mod completions;
mod completions_reply;
mod embeddings;
mod logprobs;
mod models;
mod reply;
mod tokenize;
mod usage;

#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
pub(crate) mod tools_tests;

pub(super) use reply::unix_now;

/// The endpoints.
pub(super) fn routes<S>() -> Router<S>
where
    S: Clone + Send + Sync + 'static,
    Front: FromRef<S>,
{
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::retrieve))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
}
