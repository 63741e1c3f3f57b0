//! The API of OpenAI, with vLLM's additions: from JSON to the one kind of request and back.
//! docs/api.md lists what is understood; everything else is refused by its name.

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRef};
use axum::http::{Method, StatusCode, Uri};
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
mod logprobs;
mod models;
mod reply;
mod tokenize;
mod usage;

#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
pub(crate) mod tools_tests;

use error::ApiError;
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
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::retrieve))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .layer(DefaultBodyLimit::max(body::MAX_BODY_BYTES))
}

/// Nothing is there.
pub(super) async fn not_found(method: Method, uri: Uri) -> ApiError {
    let what = format!("{method} {} is not served here", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", what)
}

/// Something is there for another method.
pub(super) async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let what = format!("{} does not answer to {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", what)
}
