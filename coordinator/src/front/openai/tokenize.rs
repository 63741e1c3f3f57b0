//! `/tokenize` and `/detokenize`, as vLLM has them.

use axum::extract::State;
use axum::response::Json;
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{DetokenizeRequest, GenerateRequest};
use serde_json::{Value, json};

use super::body::Body;
use super::error::ApiError;
use super::fields::Fields;
use super::messages;
use super::tools;
use crate::front::Front;
use crate::front::refusal::Refusal;

/// Token ids of a text or a conversation.
pub(super) async fn tokenize(
    State(front): State<Front>,
    Body(mut fields): Body<Fields>,
) -> Result<Json<Value>, ApiError> {
    let model = fields.string("model")?.unwrap_or_default();
    let prompt = fields.string("prompt")?;
    let chat = prompt.is_none();
    let (input, tools) = match prompt {
        Some(text) => (Input::Prompt(text), None),
        None => {
            let chat = messages::conversation(&mut fields)?;
            (Input::Chat(chat), tools::take(&mut fields)?)
        }
    };
    let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(!chat);
    let strings = fields.bool("return_token_strs")?.unwrap_or(false);
    fields.finish()?;
    let mut request = GenerateRequest { model, input: Some(input), ..GenerateRequest::default() };
    tools::apply(&front, &mut request, tools.as_ref()).await?;
    let (model, info, tokens) = front.tokenize(request, add_special_tokens).await?;
    let write = move || {
        let bytes = |id| model.tokenizer.token_bytes(id);
        let text = |&id: &u32| String::from_utf8_lossy(&bytes(id)).into_owned();
        let strings = strings.then(|| tokens.iter().map(text).collect::<Vec<_>>());
        Json(json!({
            "count": tokens.len(),
            "max_model_len": info.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }))
    };
    Ok(front.computing.run(0, write).await?)
}

/// The text of token ids, special tokens included.
pub(super) async fn detokenize(
    State(front): State<Front>,
    Body(mut fields): Body<Fields>,
) -> Result<Json<Value>, ApiError> {
    let request = DetokenizeRequest {
        model: fields.string("model")?.unwrap_or_default(),
        token_ids: fields.token_ids("tokens")?,
        skip_special_tokens: Some(false),
    };
    fields.finish()?;
    let answer = front.text_of(request).await.map_err(|refusal| match refusal {
        Refusal::Field { field, message } if field == "token_ids" => {
            ApiError::invalid("tokens", message.replace(&field, "tokens"))
        }
        refusal => refusal.into(),
    })?;
    Ok(Json(json!({ "prompt": answer.text })))
}
