//! The Messages API of Anthropic: from JSON to the one kind of request and back.

use axum::extract::{FromRef, State};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::post;
use axum::{Extension, Router};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Front;
use super::door::Caller;
use super::openai::body::Body;
use super::openai::error::ApiError;
use super::openai::gather::gather_one;
use super::openai::stream::stream;
use super::openai::tools;

mod content;
mod error;
mod events;
mod reply;
mod request;

#[cfg(test)]
mod tests;

pub(super) use error::MessagesError;
use events::MessageEvents;
use reply::Answering;
use request::{MessagesRequest, ToCount};

/// The endpoints.
pub(super) fn routes<S>() -> Router<S>
where
    S: Clone + Send + Sync + 'static,
    Front: FromRef<S>,
{
    Router::new()
        .route("/v1/messages", post(create))
        .route("/v1/messages/count_tokens", post(count_tokens))
}

/// Answers a conversation.
async fn create(
    State(front): State<Front>,
    Extension(caller): Extension<Caller>,
    body: Result<Body<MessagesRequest>, ApiError>,
) -> Result<Response, MessagesError> {
    let arrived = Instant::now();
    let MessagesRequest { mut request, stream: streams, tools } = body?.0;
    let reader = tools::apply(&front, &mut request, tools.as_ref()).await?;
    let started = front.start(&caller, vec![request], None, arrived).await?;
    started.span.streams(streams);
    let (answering, mut messages) = Answering::new(started);
    if streams {
        return Ok(stream(messages, MessageEvents::new(answering, reader)).await?);
    }
    let choice = gather_one(&mut messages).await?;
    Ok(Json(answering.message(&reader.read(&choice.text), &choice.finished)).into_response())
}

/// How many tokens a conversation is.
async fn count_tokens(
    State(front): State<Front>,
    body: Result<Body<ToCount>, ApiError>,
) -> Result<Json<Value>, MessagesError> {
    let ToCount { mut request, tools } = body?.0;
    tools::apply(&front, &mut request, tools.as_ref()).await?;
    let (_, _, tokens) = front.tokenize(request, false).await?;
    Ok(Json(json!({ "input_tokens": tokens.len() })))
}
