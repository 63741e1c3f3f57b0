//! Server-sent events: a request's messages as they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use baton_proto::wire::v1::GenerateResponse;
use tokio::sync::mpsc;
use tokio_stream::Stream;

use super::error::ApiError;
use crate::front::refusal::Refusal;

/// A client hears something at least this often. So long, a failure before the first token is still
/// told by the response's status.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// What an API makes of a request's messages.
pub(crate) trait Events: Send + Unpin + 'static {
    /// Events of a message.
    fn message(&mut self, message: GenerateResponse) -> Vec<Event>;
    /// Events after the last message of the last completion; `None` while one has not finished.
    fn end(&mut self) -> Option<Vec<Event>>;
    /// The only further event of a request that failed.
    fn failure(&self, error: &ApiError) -> Event;
}

/// An event of JSON without a name.
pub(crate) fn data(json: &serde_json::Value) -> Event {
    Event::default().json_data(json).expect("a JSON value is written without errors")
}

/// An event that has its type as its name.
pub(crate) fn named(json: &serde_json::Value) -> Event {
    let name = json["type"].as_str().expect("every named event has a type");
    Event::default().event(name).json_data(json).expect("a JSON value is written without errors")
}

type Messages = mpsc::Receiver<Result<GenerateResponse, Refusal>>;

/// Streams what `events` make of `messages`. A client that goes away drops both, which cancels.
pub(crate) async fn stream(
    mut messages: Messages,
    mut events: impl Events,
) -> Result<Response, ApiError> {
    let mut waiting = VecDeque::new();
    match tokio::time::timeout(KEEPALIVE_INTERVAL, messages.recv()).await {
        Ok(Some(message)) => waiting.extend(events.message(message?)),
        Ok(None) => return Err(ApiError::internal("a completion was lost")),
        Err(_) => waiting.push_back(Event::default().comment("ping")),
    }
    let stream = EventStream { messages, events, waiting, ended: false };
    let keep_alive = KeepAlive::new().interval(KEEPALIVE_INTERVAL).text("ping");
    let mut response = Sse::new(stream).keep_alive(keep_alive).into_response();
    // Proxies that gather responses would keep tokens back.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

struct EventStream<E> {
    messages: Messages,
    events: E,
    waiting: VecDeque<Event>,
    ended: bool,
}

impl<E: Events> Stream for EventStream<E> {
    type Item = Result<Event, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(event) = this.waiting.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            let failure = match ready!(this.messages.poll_recv(context)) {
                Some(Ok(message)) => {
                    this.waiting.extend(this.events.message(message));
                    continue;
                }
                Some(Err(refusal)) => Some(ApiError::from(refusal)),
                None => None,
            };
            this.ended = true;
            this.messages.close();
            // A stream never ends as if it were whole when it is not.
            let lost = || ApiError::internal("a completion was lost");
            this.waiting.extend(match failure {
                Some(error) => vec![this.events.failure(&error)],
                None => match this.events.end() {
                    Some(last) => last,
                    None => vec![this.events.failure(&lost())],
                },
            });
        }
    }
}
