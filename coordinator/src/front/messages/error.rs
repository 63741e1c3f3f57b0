//! Errors as Anthropic's clients read them.

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::front::openai::error::ApiError;

/// The same error with another body.
#[derive(Debug)]
pub(in crate::front) struct MessagesError(pub(in crate::front) ApiError);

impl<E: Into<ApiError>> From<E> for MessagesError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// The body, and the event of a stream that fails.
pub(super) fn body(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        529 => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message}})
}

impl IntoResponse for MessagesError {
    fn into_response(self) -> Response {
        let body = body(&self.0).to_string();
        // Status and headers are the same.
        let mut response = self.0.into_response();
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = Body::from(body);
        response
    }
}
