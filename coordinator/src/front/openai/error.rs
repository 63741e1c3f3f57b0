//! Errors as OpenAI's clients read them: a status, a JSON body, and whether to try again.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use serde_json::{Value, json};

use crate::core::{RETRY_AFTER, RequestError, SubmitError};
use crate::front::models::UnknownModel;
use crate::front::names::NameError;
use crate::front::refusal::Refusal;

/// Most characters of what a client sent that an error repeats.
const MAX_QUOTED: usize = 80;

/// What a request got instead of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// For programs that tell kinds of errors apart.
    pub(crate) code: &'static str,
    /// The parameter that is wrong.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
    retry: Retry,
}

/// Clients repeat what ended with a status of 500 or more unless they are told otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Retry {
    /// As the client thinks fit.
    Unsaid,
    /// What was computed would be computed again, or the outcome would be the same.
    Never,
    After(Duration),
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into(), retry: Retry::Unsaid }
    }

    fn bad(code: &'static str, param: &str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, code, message);
        Self { param: Some(quoted(param)), ..error }
    }

    /// A parameter has a wrong value; the message names it.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::bad("invalid_value", param, message)
    }

    /// `param is value; it must be limit`.
    pub(crate) fn value(param: &str, value: impl std::fmt::Display, limit: &str) -> Self {
        let value = quoted(&value.to_string());
        Self::invalid(param, format!("{param} is {value}; it must be {limit}"))
    }

    /// A parameter that must be there is not.
    pub(crate) fn missing(param: &str) -> Self {
        Self::bad("missing_required_parameter", param, format!("{param} is missing"))
    }

    /// A parameter that nobody knows, or that cannot be served.
    pub(crate) fn unsupported(param: &str, why: &str) -> Self {
        let param = quoted(param);
        Self::bad("unsupported_parameter", &param, format!("{param} is not supported{why}"))
    }

    /// The process is at fault.
    pub(crate) fn internal(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message).never_again()
    }

    /// The same error of a request of which something was computed already.
    fn never_again(self) -> Self {
        Self { retry: Retry::Never, ..self }
    }

    fn after(self, wait: Duration) -> Self {
        Self { retry: Retry::After(wait), ..self }
    }

    /// The kind of error, as OpenAI calls it.
    pub(crate) fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            504 => "timeout_error",
            529 => "overloaded_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The response's body, and the event of a stream that fails.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.retry {
            Retry::Unsaid => {}
            Retry::Never => {
                headers.insert("x-should-retry", HeaderValue::from_static("false"));
            }
            Retry::After(wait) => {
                let seconds = wait.as_secs_f64().ceil() as u64;
                headers.insert(header::RETRY_AFTER, seconds.into());
                headers.insert("retry-after-ms", (wait.as_millis() as u64).into());
                headers.insert("x-should-retry", HeaderValue::from_static("true"));
            }
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let retry_after = refusal.retry_after();
        let unavailable = |message| {
            Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message).after(RETRY_AFTER)
        };
        match refusal {
            Refusal::Field { field, .. } => Self::invalid(&parameter(&field), message),
            Refusal::Invalid(_) => Self::new(StatusCode::BAD_REQUEST, "invalid_request", message),
            Refusal::Model(UnknownModel::Ambiguous { .. }) => {
                Self::bad("missing_required_parameter", "model", message)
            }
            Refusal::Model(UnknownModel::NotServed { .. }) => Self::no_model(message),
            Refusal::NoMemory => unavailable(message),
            Refusal::Late | Refusal::Failed { error: RequestError::DeadlineExceeded, .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message).never_again()
            }
            Refusal::Quota(exceeded) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message)
                    .after(exceeded.retry_after)
            }
            // The one that runs may be that of a connection which the client has lost: it ends when that is noticed.
            Refusal::Name(NameError::Running(_)) => {
                Self::new(StatusCode::CONFLICT, "duplicate_request", message).after(RETRY_AFTER)
            }
            Refusal::Name(NameError::Full) => {
                Self::new(overloaded(), "overloaded", message).after(RETRY_AFTER)
            }
            Refusal::SlowClient => Self::new(client_closed(), "slow_client", message),
            Refusal::Internal => Self::internal(&message),
            Refusal::Submit(error) => match error {
                SubmitError::UnknownModel(_)
                | SubmitError::NoNodes(_)
                | SubmitError::ShuttingDown => unavailable(message),
                SubmitError::Overloaded { .. } | SubmitError::TooLate { .. } => {
                    Self::new(overloaded(), "overloaded", message)
                        .after(retry_after.unwrap_or(RETRY_AFTER))
                }
                SubmitError::PromptTooLong { .. } => {
                    Self::bad("context_length_exceeded", "prompt", message)
                }
                SubmitError::EmptyPrompt | SubmitError::UnknownToken { .. } => {
                    Self::invalid("prompt", message)
                }
                SubmitError::DuplicateId(_) => Self::internal(&message),
            },
            Refusal::Failed { error, emitted } => match error {
                RequestError::Cancelled => Self::new(client_closed(), "cancelled", message),
                RequestError::NoNodes { .. } | RequestError::ShuttingDown if emitted == 0 => {
                    unavailable(message)
                }
                // The client would pay twice; or it may be the request that broke its nodes.
                RequestError::NoNodes { .. }
                | RequestError::ShuttingDown
                | RequestError::Exhausted { .. } => unavailable(message).never_again(),
                // No node could ever serve it.
                _ => Self::new(StatusCode::BAD_REQUEST, "cannot_be_served", message),
            },
        }
    }
}

impl ApiError {
    /// 404 for a name that is not served.
    pub(crate) fn no_model(message: String) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, "model_not_found", message);
        Self { param: Some("model".to_owned()), ..error }
    }
}

/// Not registered, but what Anthropic and NVIDIA's front end say. The guard of the port replaces it where
/// another one is configured.
pub(crate) fn overloaded() -> StatusCode {
    StatusCode::from_u16(529).expect("it has three digits")
}

/// nginx's status for a request whose client left.
fn client_closed() -> StatusCode {
    StatusCode::from_u16(499).expect("it has three digits")
}

/// What the HTTP API calls a field of `GenerateRequest`.
fn parameter(field: &str) -> String {
    match field {
        "token_ids" => "prompt".to_owned(),
        "chat" => "messages".to_owned(),
        "structured_output" => "response_format".to_owned(),
        "prompt_logprobs" => "logprobs".to_owned(),
        "include_stop_string" => "include_stop_str_in_output".to_owned(),
        field => match field.strip_prefix("chat.") {
            Some(kwargs) if kwargs.starts_with("template_kwargs") => format!("chat_{kwargs}"),
            Some(field) => field.to_owned(),
            None => field.to_owned(),
        },
    }
}

fn quoted(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
