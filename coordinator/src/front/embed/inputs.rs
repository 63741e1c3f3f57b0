//! What a request for embeddings asks for, and whether it may.

use std::sync::Arc;

use baton_proto::embedding::Pooling;
use baton_proto::wire::v1;
use baton_proto::wire::v1::embed_input::Input;
use baton_proto::wire::v1::{EmbedInput, EmbedRequest};

use crate::core::{ModelInfo, SubmitError};
use crate::front::models::ServedModel;
use crate::front::refusal::Refusal;

/// Most inputs of a request, as in OpenAI's API.
pub(crate) const MAX_INPUTS: usize = 2048;
/// Most numbers of a response, as a short request could have a very long one: 16 MiB, and some 50
/// as JSON.
const MAX_NUMBERS: usize = 4 << 20;

/// The pooling of a request whose numbers are fine.
pub(super) fn check(request: &EmbedRequest) -> Result<Pooling, Refusal> {
    let count = request.inputs.len();
    if !(1..=MAX_INPUTS).contains(&count) {
        let what = format!("there are {count} inputs; there must be from 1 to {MAX_INPUTS}");
        return Err(Refusal::wrong("inputs", what));
    }
    if request.deadline_ms == Some(0) {
        return Err(Refusal::field("deadline_ms", 0, "at least 1"));
    }
    match v1::Pooling::try_from(request.pooling) {
        Ok(v1::Pooling::Unspecified) => Ok(Pooling::default()),
        Ok(v1::Pooling::Last) => Ok(Pooling::Last),
        Ok(v1::Pooling::Mean) => Ok(Pooling::Mean),
        Err(_) => Err(Refusal::field("pooling", request.pooling, "last or mean")),
    }
}

/// Whether the vectors of so many inputs may be one response.
pub(super) fn check_size(inputs: usize, hidden_size: usize) -> Result<(), Refusal> {
    let most = MAX_NUMBERS / hidden_size.max(1);
    if inputs <= most {
        return Ok(());
    }
    let limit = format!("at most {most}, as this model's vectors have {hidden_size} numbers");
    Err(Refusal::wrong("inputs", format!("there are {inputs} inputs; there must be {limit}")))
}

/// Bytes of text that an input is made of.
pub(super) fn text_bytes(input: &EmbedInput) -> usize {
    match &input.input {
        Some(Input::Text(text)) => text.len(),
        Some(Input::TokenIds(_)) | None => 0,
    }
}

/// The tokens of input number `at`.
pub(super) fn tokens(
    at: usize,
    input: EmbedInput,
    model: &ServedModel,
    info: &ModelInfo,
) -> Result<Arc<[u32]>, Refusal> {
    let wrong = |what: String| Refusal::wrong(&format!("inputs[{at}]"), what);
    let tokens = match input.input {
        Some(Input::Text(text)) if !text.is_empty() => model.tokenizer.encode(&text, true)?,
        Some(Input::TokenIds(ids)) if !ids.ids.is_empty() => ids.ids,
        _ => return Err(wrong(format!("input {at} is empty"))),
    };
    if let Some(id) = tokens.iter().find(|&&id| id >= info.vocab_size) {
        let limit = format!("below the vocabulary size ({})", info.vocab_size);
        return Err(wrong(format!("an id in input {at} is {id}; it must be {limit}")));
    }
    let limit = (info.max_model_len as usize).saturating_sub(1);
    match tokens.len() {
        0 => Err(SubmitError::EmptyPrompt.into()),
        tokens if tokens > limit => Err(SubmitError::PromptTooLong { tokens, limit }.into()),
        _ => Ok(tokens.into()),
    }
}
