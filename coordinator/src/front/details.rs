//! What a gRPC status says beside its message: `google.rpc` details, as AIP-193 recommends.

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::models::UnknownModel;
use super::refusal::Refusal;
use crate::core::SubmitError;

/// Whose reasons those in `google.rpc.ErrorInfo` are.
const DOMAIN: &str = "baton";

/// The status that says why. When to come back is in the metadata `retry-after-ms` as well.
pub(super) fn status(refusal: &Refusal) -> Status {
    let mut metadata = MetadataMap::new();
    if let Some(wait) = refusal.retry_after() {
        metadata.insert("retry-after-ms", MetadataValue::from(wait.as_millis() as u64));
    }
    let (code, what) = (refusal.code(), refusal.to_string());
    Status::with_error_details_and_metadata(code, what, details(refusal), metadata)
}

fn details(refusal: &Refusal) -> ErrorDetails {
    let mut details = ErrorDetails::new();
    let what = refusal.to_string();
    match refusal {
        Refusal::Submit(SubmitError::PromptTooLong { tokens, limit }) => {
            let numbers = [("max", limit), ("got", tokens)];
            let numbers = numbers.map(|(name, value)| (name.to_owned(), value.to_string()));
            details.set_error_info("CONTEXT_LENGTH_EXCEEDED", DOMAIN, numbers);
        }
        Refusal::Model(UnknownModel::NotServed { name, .. }) => {
            details.set_resource_info("model", name, "", &*what);
        }
        Refusal::Quota(exceeded) => {
            details.add_quota_failure_violation(exceeded.subject(), &*what);
        }
        _ => {}
    }
    if let Some(field) = wrong_field(refusal).filter(|_| refusal.code() == Code::InvalidArgument) {
        details.add_bad_request_violation(field, what);
    }
    if let Some(wait) = refusal.retry_after() {
        details.set_retry_info(Some(wait));
    }
    details
}

fn wrong_field(refusal: &Refusal) -> Option<&str> {
    match refusal {
        Refusal::Field { field, .. } => Some(field),
        Refusal::Model(_) => Some("model"),
        Refusal::Submit(SubmitError::PromptTooLong { .. } | SubmitError::EmptyPrompt) => {
            Some("prompt")
        }
        Refusal::Submit(SubmitError::UnknownToken { .. }) => Some("token_ids"),
        _ => None,
    }
}
