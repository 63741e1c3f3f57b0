//! The Responses API of OpenAI without what it stores: from JSON to the one kind of request and
//! back. A conversation's earlier turns are all in `input`.

use axum::extract::{FromRef, State};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::post;
use axum::{Extension, Router};
use tokio::time::Instant;

use super::Front;
use super::door::Caller;
use super::openai::body::Body;
use super::openai::error::ApiError;
use super::openai::gather::gather_one;
use super::openai::stream::stream;
use super::openai::tools;

mod events;
mod input;
mod reply;
mod request;

#[cfg(test)]
mod tests;

use events::ResponseEvents;
use reply::Answering;
use request::ResponsesRequest;

/// The endpoint.
pub(super) fn routes<S>() -> Router<S>
where
    S: Clone + Send + Sync + 'static,
    Front: FromRef<S>,
{
    Router::new().route("/v1/responses", post(create))
}

/// Answers an input.
async fn create(
    State(front): State<Front>,
    Extension(caller): Extension<Caller>,
    Body(asked): Body<ResponsesRequest>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let ResponsesRequest { mut request, stream: streams, tools, said } = asked;
    let reader = tools::apply(&front, &mut request, tools.as_ref()).await?;
    let started = front.start(&caller, vec![request], None, arrived).await?;
    started.span.streams(streams);
    let (answering, mut messages) = Answering::new(started, said);
    if streams {
        return stream(messages, ResponseEvents::new(answering, reader)).await;
    }
    let choice = gather_one(&mut messages).await?;
    let output = answering.output(&reader.read(&choice.text), &choice.finished);
    Ok(Json(answering.response(output, Some(&choice.finished))).into_response())
}
