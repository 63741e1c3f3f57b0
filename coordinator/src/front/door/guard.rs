//! The guards in front of both services: keys first, then the body.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio_stream::StreamExt;
use tonic::{Code, Status};

use super::{Entrance, NotLetIn, scope};
use crate::front::openai::body::MAX_BODY_BYTES;
use crate::front::openai::error::ApiError;

/// Names a request for those who look for it.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID_BYTES: usize = 128;

/// Lets gRPC calls in, with their [`Caller`](super::Caller).
pub(crate) async fn guard_rpc(
    State(Entrance { door, .. }): State<Entrance>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = request_id(&request);
    let response = match door.let_in(request.headers(), scope::of_rpc(request.uri().path())) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => {
            let code = match &refusal {
                NotLetIn::Unauthenticated => Code::Unauthenticated,
                NotLetIn::Forbidden { .. } => Code::PermissionDenied,
            };
            count(&refusal, code);
            Status::new(code, refusal.to_string()).into_http()
        }
    };
    named(response, id)
}

/// Lets HTTP requests in, with their [`Caller`](super::Caller) and their whole body.
pub(crate) async fn guard_http(
    State(entrance): State<Entrance>,
    request: Request,
    next: Next,
) -> Response {
    let id = request_id(&request);
    let response = match let_in(&entrance, request).await {
        Ok(request) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };
    named(response, id)
}

async fn let_in(entrance: &Entrance, mut request: Request) -> Result<Request, Refused> {
    let caller = entrance.door.let_in(request.headers(), scope::of_path(request.uri().path()))?;
    request.extensions_mut().insert(caller);
    let (head, body) = request.into_parts();
    let length = head.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > MAX_BODY_BYTES as u64) {
        return Err(Refused::TooLarge);
    }
    let wait = entrance.patience.body;
    let body = tokio::time::timeout(wait, whole(body)).await;
    let body = body.map_err(|_| Refused::TooSlow(wait))??;
    Ok(Request::from_parts(head, Body::from(body)))
}

/// All of a body.
async fn whole(body: Body) -> Result<Bytes, Refused> {
    let mut parts = body.into_data_stream();
    let mut all = Vec::new();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|_| Refused::BrokeOff)?;
        if all.len() + part.len() > MAX_BODY_BYTES {
            return Err(Refused::TooLarge);
        }
        all.extend_from_slice(&part);
    }
    Ok(all.into())
}

/// Why an HTTP request does not reach its handler.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    NotLetIn(#[from] NotLetIn),
    #[error("the body has more than {MAX_BODY_BYTES} bytes")]
    TooLarge,
    #[error("the body did not arrive within {} s", .0.as_secs_f32())]
    TooSlow(Duration),
    #[error("the body broke off")]
    BrokeOff,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let (status, grpc, code) = match self {
            Self::NotLetIn(NotLetIn::Unauthenticated) => {
                (StatusCode::UNAUTHORIZED, Code::Unauthenticated, "invalid_api_key")
            }
            Self::NotLetIn(NotLetIn::Forbidden { .. }) => {
                (StatusCode::FORBIDDEN, Code::PermissionDenied, "insufficient_permissions")
            }
            Self::TooLarge => {
                (StatusCode::PAYLOAD_TOO_LARGE, Code::InvalidArgument, "request_too_large")
            }
            Self::TooSlow(_) => {
                (StatusCode::REQUEST_TIMEOUT, Code::DeadlineExceeded, "request_timeout")
            }
            Self::BrokeOff => (StatusCode::BAD_REQUEST, Code::Cancelled, "unreadable_body"),
        };
        count(&self, grpc);
        let mut response = ApiError::new(status, code, self.to_string()).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

fn count(why: &dyn std::error::Error, code: Code) {
    tracing::debug!(%why, "request refused at the door");
    let code = format!("{code:?}");
    metrics::counter!("baton_refused_requests_total", "code" => code).increment(1);
}

/// The client's own name for a request, if it is one that can be shown.
fn request_id(request: &Request) -> Option<HeaderValue> {
    let id = request.headers().get(REQUEST_ID)?;
    let fine = (1..=MAX_REQUEST_ID_BYTES).contains(&id.len());
    (fine && id.as_bytes().iter().all(u8::is_ascii_graphic)).then(|| id.clone())
}

/// Gives a response the client's name for its request, unless it has one.
fn named(mut response: Response, id: Option<HeaderValue>) -> Response {
    if let Some(id) = id {
        response.headers_mut().entry(REQUEST_ID).or_insert(id);
    }
    response
}
