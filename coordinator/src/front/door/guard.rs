//! The guards in front of both services: keys first, then the body.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, HOST, WWW_AUTHENTICATE};
use axum::http::uri::Authority;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use tokio::time::Sleep;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Status};

use super::bodies::Reserved;
use super::scope::{self, Need};
use super::{Entrance, NotLetIn};
use crate::front::http;
use crate::front::inference::random;
use crate::front::names::MAX_NAME_BYTES;
use crate::front::openai::body::MAX_BODY_BYTES;
use crate::front::openai::error::{ApiError, overloaded};
use crate::front::refusal::Refusal;

/// Names a request for those who look for it.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Of requests with the same one, one runs at a time.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Lets gRPC calls in, with their [`Caller`](super::Caller).
pub(crate) async fn guard_rpc(
    State(Entrance { door, bodies, patience, .. }): State<Entrance>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = request_id(&request);
    let (need, server) = (scope::of_rpc(request.uri().path()), server(&request));
    let response = match door.let_in(request.headers(), need) {
        Ok(mut caller) => {
            caller.server = server;
            // Requests of the others are short, and may be many on one stream.
            if matches!(need, Need::Scope(_)) {
                let held = bodies.begin(caller.tenant());
                request = request.map(|body| Counted::body(body, held, patience.body));
            }
            request.extensions_mut().insert(caller);
            readable(next.run(request).await)
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
    match id {
        Some(id) => named(response, id),
        None => response,
    }
}

/// Tonic says INTERNAL of a message that is none, before anybody is asked: that is the client's fault.
fn readable(mut response: Response) -> Response {
    const UNREADABLE: [&str; 4] = [
        "failed to decode Protobuf message",
        "protocol error",
        "Unexpected EOF",
        "Error decompressing",
    ];
    let Some(status) = Status::from_header_map(response.headers()) else { return response };
    let what = status.message();
    if status.code() == Code::Internal && UNREADABLE.iter().any(|why| what.starts_with(why)) {
        let refusal = Refusal::Invalid(format!("the request is no message of its kind: {what}"));
        count(&refusal, refusal.code());
        response = Status::from(refusal).into_http();
    }
    response
}

/// A body that takes memory as it arrives, for as long as it is there, and must arrive in time.
struct Counted {
    parts: BodyDataStream,
    held: Reserved,
    wait: Duration,
    late: Pin<Box<Sleep>>,
}

impl Counted {
    fn body(body: Body, held: Reserved, wait: Duration) -> Body {
        let (parts, late) = (body.into_data_stream(), Box::pin(tokio::time::sleep(wait)));
        Body::from_stream(Self { parts, held, wait, late })
    }
}

impl Stream for Counted {
    type Item = Result<Bytes, BoxError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.late.as_mut().poll(cx).is_ready() {
            let late = Refused::TooSlow(self.wait);
            count(&late, Code::DeadlineExceeded);
            return Poll::Ready(Some(Err(Status::deadline_exceeded(late.to_string()).into())));
        }
        let part = ready!(Pin::new(&mut self.parts).poll_next(cx)?);
        if let Some(Err(refusal)) = part.as_ref().map(|part| self.held.grow(part.len())) {
            count(&refusal, refusal.code());
            return Poll::Ready(Some(Err(Status::from(refusal).into())));
        }
        Poll::Ready(part.map(Ok))
    }
}

/// Lets HTTP requests in, with their [`Caller`](super::Caller) and their whole body.
pub(crate) async fn guard_http(
    State(entrance): State<Entrance>,
    request: Request,
    next: Next,
) -> Response {
    let id = request_id(&request);
    let path = request.uri().path().to_owned();
    let mut response = match let_in(&entrance, request).await {
        Ok(request) => next.run(request).await,
        Err(refused) => refused.response(&path),
    };
    if response.status() == overloaded() {
        *response.status_mut() = entrance.overload_status;
    }
    named(response, id.unwrap_or_else(new_id))
}

async fn let_in(entrance: &Entrance, request: Request) -> Result<Request, Refused> {
    let path = request.uri().path();
    let need = scope::of_path(path);
    let mut caller = entrance.door.let_in(request.headers(), need)?;
    caller.server = server(&request);
    let (mut head, body) = request.into_parts();
    if !matches!(need, Need::Scope(_)) {
        // Nobody there reads a body, so none is waited for.
        head.extensions.insert(caller);
        return Ok(Request::from_parts(head, Body::empty()));
    }
    caller.request = head.headers.get(IDEMPOTENCY_KEY).map(idempotency_key).transpose()?;
    let length = head.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > MAX_BODY_BYTES as u64) {
        return Err(Refused::TooLarge);
    }
    let mut reserved = entrance.bodies.begin(caller.tenant());
    let wait = entrance.patience.body;
    let body = tokio::time::timeout(wait, whole(body, &mut reserved)).await;
    let body = body.map_err(|_| Refused::TooSlow(wait))??;
    head.extensions.insert(caller);
    // Whoever parses the body keeps it until that is done.
    head.extensions.insert(Arc::new(reserved));
    Ok(Request::from_parts(head, Body::from(body)))
}

/// All of a body. It takes memory as it arrives: who only says that much will come takes none.
async fn whole(body: Body, held: &mut Reserved) -> Result<Bytes, Refused> {
    let mut parts = body.into_data_stream();
    let mut all = Vec::new();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|_| Refused::BrokeOff)?;
        if all.len() + part.len() > MAX_BODY_BYTES {
            return Err(Refused::TooLarge);
        }
        held.grow(part.len()).map_err(|_| Refused::NoMemory)?;
        all.extend_from_slice(&part);
    }
    Ok(all.into())
}

fn idempotency_key(value: &HeaderValue) -> Result<Arc<str>, Refused> {
    let key = value.to_str().ok().filter(|_| is_name(value));
    key.map(Arc::from).ok_or(Refused::BadKey)
}

/// Why an HTTP request does not reach its handler.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    NotLetIn(#[from] NotLetIn),
    #[error("{IDEMPOTENCY_KEY} must be 1 to {MAX_NAME_BYTES} visible ASCII characters")]
    BadKey,
    #[error("the body has more than {MAX_BODY_BYTES} bytes")]
    TooLarge,
    #[error("the body did not arrive within {} s", .0.as_secs_f32())]
    TooSlow(Duration),
    #[error("the body broke off")]
    BrokeOff,
    #[error("{}", Refusal::NoMemory)]
    NoMemory,
}

impl Refused {
    /// In the form of the API that the path belongs to.
    fn response(self, path: &str) -> Response {
        let (status, grpc, code) = match self {
            Self::NotLetIn(NotLetIn::Unauthenticated) => {
                (StatusCode::UNAUTHORIZED, Code::Unauthenticated, "invalid_api_key")
            }
            Self::NotLetIn(NotLetIn::Forbidden { .. }) => {
                (StatusCode::FORBIDDEN, Code::PermissionDenied, "insufficient_permissions")
            }
            Self::BadKey => (StatusCode::BAD_REQUEST, Code::InvalidArgument, "invalid_request"),
            Self::TooLarge => {
                (StatusCode::PAYLOAD_TOO_LARGE, Code::InvalidArgument, "request_too_large")
            }
            Self::TooSlow(_) => {
                (StatusCode::REQUEST_TIMEOUT, Code::DeadlineExceeded, "request_timeout")
            }
            Self::BrokeOff => (StatusCode::BAD_REQUEST, Code::Cancelled, "unreadable_body"),
            Self::NoMemory => {
                count(&self, Code::Unavailable);
                return http::error_response(path, Refusal::NoMemory.into());
            }
        };
        count(&self, grpc);
        let error = ApiError::new(status, code, self.to_string());
        let mut response = http::error_response(path, error);
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

/// The client's own id for a request, if it is one that can be shown; others are replaced by one of ours.
fn request_id(request: &Request) -> Option<HeaderValue> {
    request.headers().get(REQUEST_ID).filter(|id| is_name(id)).cloned()
}

/// What the client calls this server.
fn server(request: &Request) -> Option<Authority> {
    let host = || request.headers().get(HOST)?.to_str().ok()?.parse().ok();
    request.uri().authority().cloned().or_else(host)
}

fn is_name(value: &HeaderValue) -> bool {
    let bytes = value.as_bytes();
    (1..=MAX_NAME_BYTES).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
}

fn new_id() -> HeaderValue {
    let id = format!("req_{:032x}", u128::from_ne_bytes(random()));
    HeaderValue::from_str(&id).expect("hexadecimal digits are a header's value")
}

/// Says in a response which request it answers.
fn named(mut response: Response, id: HeaderValue) -> Response {
    response.headers_mut().insert(REQUEST_ID, id);
    response
}
