//! Why a request was refused or failed, and the gRPC status that says so.
//! The HTTP front says the same in its own way (`openai/error.rs`).

use std::time::Duration;

use baton_proto::sampling::InvalidSampling;
use tonic::{Code, Status};

use super::chat::ChatError;
use super::details;
use super::door::Exceeded;
use super::models::UnknownModel;
use super::names::NameError;
use super::text::EncodeError;
use crate::core::{RETRY_AFTER, RequestError, SubmitError};

/// A request was refused before anything was started, or it failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// A field is wrong.
    #[error("{message}")]
    Field {
        /// Its name in `GenerateRequest` or below it.
        field: String,
        /// Names it, its value and the limit.
        message: String,
    },
    /// The request is wrong, and not because of one field.
    #[error("{0}")]
    Invalid(String),
    /// The model is.
    #[error(transparent)]
    Model(#[from] UnknownModel),
    /// The core refuses.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The caller's quota does not allow it now.
    #[error(transparent)]
    Quota(#[from] Exceeded),
    /// Another request runs under its name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Bodies of other requests take all the memory that is for them.
    #[error("too many bodies of requests are being read; try again in {} s", RETRY_AFTER.as_secs())]
    NoMemory,
    /// The deadline passed before the request was placed.
    #[error("the request's deadline passed")]
    Late,
    /// The client does not take what is generated for it.
    #[error("the client took nothing for too long")]
    SlowClient,
    /// It was started and failed.
    #[error("{error}")]
    Failed {
        /// Why.
        error: RequestError,
        /// Tokens that the client was given before, of all completions.
        emitted: u64,
    },
    /// This process is at fault.
    #[error("an internal error; the coordinator's log has more")]
    Internal,
}

impl Refusal {
    /// It failed before the client was given anything.
    pub(crate) fn failed(error: RequestError) -> Self {
        Self::Failed { error, emitted: 0 }
    }

    /// `field is value; it must be limit`.
    pub(crate) fn field(field: &str, value: impl std::fmt::Display, limit: &str) -> Self {
        Self::wrong(field, format!("{field} is {value}; it must be {limit}"))
    }

    /// `field` is wrong; the message names it.
    pub(crate) fn wrong(field: &str, message: impl Into<String>) -> Self {
        Self::Field { field: field.to_owned(), message: message.into() }
    }

    /// What gRPC calls this.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Field { .. } | Self::Invalid(_) | Self::Model(UnknownModel::Ambiguous { .. }) => {
                Code::InvalidArgument
            }
            Self::Model(UnknownModel::NotServed { .. }) => Code::NotFound,
            Self::NoMemory => Code::Unavailable,
            Self::Late => Code::DeadlineExceeded,
            Self::Name(NameError::Running(_)) => Code::AlreadyExists,
            Self::Quota(_) | Self::SlowClient | Self::Name(NameError::Full) => {
                Code::ResourceExhausted
            }
            Self::Submit(error) => match error {
                // The front knows the model, so its nodes have only not joined yet.
                SubmitError::UnknownModel(_)
                | SubmitError::NoNodes(_)
                | SubmitError::ShuttingDown => Code::Unavailable,
                SubmitError::Overloaded { .. } | SubmitError::TooLate { .. } => {
                    Code::ResourceExhausted
                }
                SubmitError::PromptTooLong { .. }
                | SubmitError::EmptyPrompt
                | SubmitError::UnknownToken { .. } => Code::InvalidArgument,
                // Ids are drawn here, at random.
                SubmitError::DuplicateId(_) => Code::Internal,
            },
            Self::Failed { error, emitted } => match error {
                RequestError::DeadlineExceeded => Code::DeadlineExceeded,
                RequestError::Cancelled => Code::Cancelled,
                // It may be the request that broke its nodes.
                RequestError::Exhausted { .. } => Code::Aborted,
                RequestError::NoNodes { .. } | RequestError::ShuttingDown => match emitted {
                    0 => Code::Unavailable,
                    // Sent again, it would begin anew: who has its tokens must know of that.
                    _ => Code::Aborted,
                },
                RequestError::Rejected(_) => Code::FailedPrecondition,
            },
            Self::Internal => Code::Internal,
        }
    }

    /// When to come back, if coming back helps.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Submit(
                SubmitError::Overloaded { retry_after } | SubmitError::TooLate { retry_after },
            ) => Some(*retry_after),
            Self::Quota(exceeded) => Some(exceeded.retry_after),
            Self::Name(_) => Some(RETRY_AFTER),
            refusal if refusal.code() == Code::Unavailable => Some(RETRY_AFTER),
            _ => None,
        }
    }
}

impl From<InvalidSampling> for Refusal {
    fn from(error: InvalidSampling) -> Self {
        Self::wrong(error.field, error.to_string())
    }
}

impl From<ChatError> for Refusal {
    fn from(error: ChatError) -> Self {
        Self::wrong("chat.messages", error.to_string())
    }
}

impl From<EncodeError> for Refusal {
    fn from(error: EncodeError) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        details::status(&refusal)
    }
}
