//! Why a request was refused or failed, and the gRPC status that says so.

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use super::chat::ChatError;
use super::models::UnknownModel;
use super::text::EncodeError;
use crate::core::{RequestError, SubmitError};

/// A request was refused before anything was started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// A field is wrong; names it, its value and the limit.
    #[error("{0}")]
    Invalid(String),
    /// The model is.
    #[error(transparent)]
    Model(#[from] UnknownModel),
    /// The core refuses.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The deadline passed before the request was placed.
    #[error("the request's deadline passed")]
    Late,
}

impl Refusal {
    /// `field is value; it must be limit`.
    pub(crate) fn field(field: &str, value: impl std::fmt::Display, limit: &str) -> Self {
        Self::Invalid(format!("{field} is {value}; it must be {limit}"))
    }

    fn code(&self) -> Code {
        match self {
            Self::Invalid(_) | Self::Model(UnknownModel::Ambiguous { .. }) => Code::InvalidArgument,
            Self::Model(UnknownModel::NotServed { .. }) => Code::NotFound,
            Self::Late => Code::DeadlineExceeded,
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
        }
    }
}

impl From<ChatError> for Refusal {
    fn from(error: ChatError) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl From<EncodeError> for Refusal {
    fn from(error: EncodeError) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl From<Refusal> for Status {
    /// An overloaded coordinator says in `retry-after-ms` when to come back.
    fn from(refusal: Refusal) -> Self {
        let mut status = Self::new(refusal.code(), refusal.to_string());
        if let Refusal::Submit(
            SubmitError::Overloaded { retry_after } | SubmitError::TooLate { retry_after },
        ) = refusal
        {
            let wait = MetadataValue::from(retry_after.as_millis() as u64);
            status.metadata_mut().insert("retry-after-ms", wait);
        }
        status
    }
}

/// The status of a request that was started and failed.
pub(crate) fn failure(error: &RequestError) -> Status {
    let code = match error {
        RequestError::DeadlineExceeded => Code::DeadlineExceeded,
        RequestError::Cancelled => Code::Cancelled,
        RequestError::NoNodes { .. }
        | RequestError::Exhausted { .. }
        | RequestError::ShuttingDown => Code::Unavailable,
        RequestError::Rejected(_) => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}
