//! From an HTTP request's body to its parameters.

use std::sync::Arc;

use axum::body::to_bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use crate::front::door::Reserved;

/// Most bytes of a request: two million token ids.
pub(crate) const MAX_BODY_BYTES: usize = 16 << 20;
/// How deep objects and lists may be nested: tools and JSON schemas are the deepest.
pub(crate) const MAX_JSON_DEPTH: usize = 64;
/// Most values of all kinds that a request may have: each takes far more memory than its text.
const MAX_JSON_VALUES: usize = 2 << 20;
/// A longer body is read where it holds up nobody else.
const LONG_BODY_BYTES: usize = 64 << 10;

/// What a JSON body asks for.
pub(crate) struct Body<T>(pub(crate) T);

/// What the parameters of a body ask for.
pub(crate) trait Asked: Sized + Send + 'static {
    /// Reads them.
    fn parse(fields: Fields) -> Result<Self, ApiError>;
}

impl Asked for Fields {
    fn parse(fields: Fields) -> Result<Self, ApiError> {
        Ok(fields)
    }
}

impl<S: Send + Sync, T: Asked> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(mut request: Request, _: &S) -> Result<Self, ApiError> {
        check_headers(request.headers())?;
        // The door has read all of the body; its memory is taken until it is parsed.
        let reserved = request.extensions_mut().remove::<Arc<Reserved>>();
        let bytes = to_bytes(request.into_body(), MAX_BODY_BYTES).await.map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, "unreadable_body", error.to_string())
        })?;
        let long = bytes.len() > LONG_BODY_BYTES;
        let read = move || {
            let asked = parse(&bytes).and_then(T::parse);
            drop((bytes, reserved));
            asked
        };
        let asked = match long {
            true => tokio::task::spawn_blocking(read).await,
            false => Ok(read()),
        };
        asked.map_err(|_| ApiError::internal("the body's reader stopped"))?.map(Self)
    }
}

/// What is known before the body was read.
fn check_headers(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let given = given.unwrap_or_default();
    let media_type = given.split(';').next().unwrap_or_default().trim();
    if media_type.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let what = format!("content-type is {given:?}; it must be application/json");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", what))
}

/// Reads a body.
pub(crate) fn parse(bytes: &[u8]) -> Result<Fields, ApiError> {
    let bad = |what: String| ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", what);
    let (depth, values) = extent(bytes);
    if depth > MAX_JSON_DEPTH {
        return Err(bad(format!("the body is nested more than {MAX_JSON_DEPTH} deep")));
    }
    if values > MAX_JSON_VALUES {
        return Err(bad(format!("the body has more than {MAX_JSON_VALUES} values")));
    }
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| bad(format!("the body is no valid JSON: {error}")))?;
    Fields::new("", value)
}

/// How deep JSON is nested, and how many values it has at most.
fn extent(bytes: &[u8]) -> (usize, usize) {
    let (mut depth, mut deepest, mut values) = (0_usize, 0, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
                values += 1;
            }
            b',' => values += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    (deepest, values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_in_json_is_shown_by_line_and_column() {
        for (body, said) in [
            ("", "line 1 column 0"),
            ("{\"a\": 1,\n \"b\" 2}", "line 2 column 6"),
            ("{\"a\": 1} x", "line 1 column 10"),
            ("{\"a\": 1e999}", "number out of range"),
            ("{'a': 1}", "line 1 column 2"),
            ("[1, 2]", "the body is [1,2]; it must be an object"),
            ("\"{}\"", "it must be an object"),
        ] {
            let error = parse(body.as_bytes()).unwrap_err();
            assert!(error.message.contains(said), "{body:?}: {}", error.message);
        }
        assert_eq!(parse(b"{\"a\": \"\xff\"}").unwrap_err().code, "invalid_json");
    }

    #[test]
    fn depth_is_bounded_and_strings_have_none() {
        let nested = |depth: usize| {
            let (open, close) = ("[".repeat(depth - 1), "]".repeat(depth - 1));
            format!("{{\"a\": {open}{close}}}")
        };
        assert!(parse(nested(MAX_JSON_DEPTH).as_bytes()).is_ok());
        let error = parse(nested(MAX_JSON_DEPTH + 1).as_bytes()).unwrap_err();
        assert!(error.message.contains("nested more than 64 deep"), "{}", error.message);
        assert!(parse(nested(1 << 20).as_bytes()).is_err());
        let brackets = format!("{{\"a\": \"\\\"{}\"}}", "[{".repeat(500));
        assert!(parse(brackets.as_bytes()).is_ok());
    }

    #[test]
    fn values_are_bounded_as_each_takes_far_more_memory_than_its_text() {
        let list = |values: usize| format!("{{\"a\": [{}0]}}", "0,".repeat(values - 1));
        assert!(parse(list(1000).as_bytes()).is_ok());
        let error = parse(list(MAX_JSON_VALUES + 1).as_bytes()).err().unwrap();
        assert!(error.message.contains("more than 2097152 values"), "{}", error.message);
        let text = format!("{{\"a\": \"{}\"}}", ",".repeat(MAX_JSON_VALUES + 1));
        assert!(parse(text.as_bytes()).is_ok());
    }

    #[test]
    fn only_json_is_read() {
        let headers = |name: header::HeaderName, value: &str| {
            check_headers(&HeaderMap::from_iter([(name, value.parse().unwrap())]))
        };
        assert!(headers(header::CONTENT_TYPE, "Application/JSON; charset=utf-8").is_ok());
        for wrong in ["text/plain", "application/jsonp", ""] {
            let error = headers(header::CONTENT_TYPE, wrong).unwrap_err();
            assert_eq!(error.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
        }
    }
}
