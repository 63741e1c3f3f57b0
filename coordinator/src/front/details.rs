//! What a gRPC status says beside its message: `google.rpc` details, as AIP-193 recommends.

use std::time::Duration;

use baton_proto::ids::NodeId;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::models::UnknownModel;
use super::refusal::Refusal;
use crate::core::{RETRY_AFTER, RequestError, SubmitError};
use crate::history::FindError;
use crate::orders::OrderError;

/// Whose reasons those in `google.rpc.ErrorInfo` are.
const DOMAIN: &str = "baton";

/// The status that says why.
pub(super) fn status(refusal: &Refusal) -> Status {
    with_retry(refusal.code(), refusal.to_string(), details(refusal), refusal.retry_after())
}

/// Why the request that an operator calls `id` is not found, or not to be cancelled.
pub(super) fn not_found(error: &FindError, id: &str) -> Status {
    let (what, mut details) = (error.to_string(), ErrorDetails::new());
    let code = match error {
        FindError::Unknown => {
            details.set_resource_info("request", id, "", &*what);
            Code::NotFound
        }
        FindError::Ambiguous => {
            details.add_bad_request_violation("request_id", &*what);
            Code::InvalidArgument
        }
        FindError::Ended(id) => {
            details.add_precondition_failure_violation("ENDED", id.to_string(), &*what);
            Code::FailedPrecondition
        }
        FindError::ShuttingDown => Code::Unavailable,
    };
    with_retry(code, what, details, (code == Code::Unavailable).then_some(RETRY_AFTER))
}

/// Why an order is not passed on.
pub(super) fn not_ordered(error: &OrderError) -> Status {
    let (what, mut details) = (error.to_string(), ErrorDetails::new());
    let code = match error {
        OrderError::Unknown { node, .. } => return no_node(node, what),
        OrderError::LastDecode { node, .. } => {
            details.add_precondition_failure_violation("LAST_DECODE", node.as_str(), &*what);
            Code::FailedPrecondition
        }
        OrderError::ShuttingDown => Code::Unavailable,
    };
    with_retry(code, what, details, (code == Code::Unavailable).then_some(RETRY_AFTER))
}

/// There is no such node, as `what` says.
pub(super) fn no_node(node: &NodeId, what: String) -> Status {
    let mut details = ErrorDetails::new();
    details.set_resource_info("node", node.as_str(), "", &*what);
    Status::with_error_details(Code::NotFound, what, details)
}

/// When to come back is in the metadata `retry-after-ms` as well.
fn with_retry(
    code: Code,
    what: String,
    mut details: ErrorDetails,
    after: Option<Duration>,
) -> Status {
    let mut metadata = MetadataMap::new();
    if let Some(wait) = after {
        metadata.insert("retry-after-ms", MetadataValue::from(wait.as_millis() as u64));
        details.set_retry_info(Some(wait));
    }
    Status::with_error_details_and_metadata(code, what, details, metadata)
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
        Refusal::Failed { error, emitted } if refusal.code() == Code::Aborted => {
            let reason = match error {
                RequestError::ShuttingDown => "SHUTTING_DOWN",
                _ => "NODE_LOST",
            };
            let emitted = [("tokens_emitted".to_owned(), emitted.to_string())];
            details.set_error_info(reason, DOMAIN, emitted);
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
