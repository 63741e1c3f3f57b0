//! `/v1/chat/completions`.

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Json, Response};
use baton_proto::wire::v1::GenerateRequest;
use baton_proto::wire::v1::generate_request::Input;
use serde_json::json;
use tokio::time::Instant;

use super::body::{Asked, Body};
use super::chat_reply::{ChatEvents, completion};
use super::error::ApiError;
use super::fields::Fields;
use super::gather::gather;
use super::messages;
use super::reply::Answering;
use super::sampling::{self, MAX_LOGPROBS, Reply};
use super::stream::stream;
use super::tools;
use crate::front::Front;
use crate::front::door::Caller;
use crate::front::tools::request::ToolRequest;

/// Answers a conversation.
pub(super) async fn create(
    State(front): State<Front>,
    Extension(caller): Extension<Caller>,
    Body(asked): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let ChatRequest { mut request, reply, tools } = asked;
    let choices = request.n.unwrap_or(1);
    let reader = tools::apply(&front, &mut request, tools.as_ref()).await?;
    let started = front.start(&caller, vec![request], None, arrived).await.map_err(|refusal| {
        let mut error = ApiError::from(refusal);
        if error.param.as_deref() == Some("prompt") {
            error.param = Some("messages".to_owned());
        }
        error
    })?;
    let (mut answering, mut messages) = Answering::new("chatcmpl", started, reply, choices);
    if reply.stream {
        return stream(messages, ChatEvents::new(answering, choices, &reader)).await;
    }
    let tally = &mut answering.tally;
    let gathered = gather(&mut messages, choices as usize, |message| tally.take(message)).await?;
    Ok(Json(completion(&answering, gathered, &reader)).into_response())
}

/// What a client asks for.
#[derive(Debug, PartialEq)]
pub(crate) struct ChatRequest {
    pub(crate) request: GenerateRequest,
    pub(crate) reply: Reply,
    pub(crate) tools: Option<ToolRequest>,
}

impl Asked for ChatRequest {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let (mut request, reply) = sampling::take(&mut fields)?;
        let sampling = request.sampling.get_or_insert_default();
        sampling.max_tokens = sampling::max_tokens(&mut fields)?;
        sampling.logprobs = logprobs(&mut fields)?;
        request.input = Some(Input::Chat(messages::conversation(&mut fields)?));
        let tools = tools::take(&mut fields)?;
        fields.only("add_special_tokens", &[json!(false)])?;
        fields.only("echo", &[json!(false)])?;
        fields.only("modalities", &[json!(["text"])])?;
        fields.finish()?;
        Ok(Self { request, reply, tools })
    }
}

/// `logprobs` says whether, `top_logprobs` how many alternatives.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, MAX_LOGPROBS)?;
    match top {
        Some(1..) if !wanted => {
            Err(ApiError::invalid("top_logprobs", "top_logprobs are only for logprobs = true"))
        }
        _ => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::v1::{Chat, ChatMessage};
    use serde_json::Value;

    use super::*;

    fn parse(more: Value) -> Result<ChatRequest, ApiError> {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ChatRequest::parse(Fields::new("", body).unwrap())
    }

    #[test]
    fn a_conversation_becomes_the_one_request() {
        let more = json!({"max_completion_tokens": 9, "logprobs": true, "top_logprobs": 2,
            "add_generation_prompt": false, "response_format": {"type": "text"}});
        let request = parse(more).unwrap().request;
        let (role, content) = ("user".to_owned(), "Hi".to_owned());
        let messages = vec![ChatMessage { role, content, ..ChatMessage::default() }];
        let chat = Chat { messages, add_generation_prompt: Some(false), ..Chat::default() };
        assert_eq!(request.input, Some(Input::Chat(chat)));
        let sampling = request.sampling.unwrap();
        assert_eq!((sampling.max_tokens, sampling.logprobs), (Some(9), Some(2)));
    }

    #[test]
    fn alternatives_are_for_logprobs() {
        let logprobs = |more| parse(more).map(|chat| chat.request.sampling.unwrap().logprobs);
        assert_eq!(logprobs(json!({"logprobs": true})).unwrap(), Some(0));
        assert_eq!(logprobs(json!({"logprobs": false, "top_logprobs": 0})).unwrap(), None);
        for wrong in [json!({"top_logprobs": 2}), json!({"logprobs": true, "top_logprobs": 21})] {
            assert_eq!(logprobs(wrong).unwrap_err().param.as_deref(), Some("top_logprobs"));
        }
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        for (more, param) in [
            (json!({"chat_template": "{{ x }}"}), "chat_template"),
            (json!({"functions": []}), "functions"),
            (json!({"modalities": ["audio"]}), "modalities"),
            (json!({"prompt": "x"}), "prompt"),
        ] {
            let error = parse(more).unwrap_err();
            assert_eq!(
                (error.param.as_deref(), error.code),
                (Some(param), "unsupported_parameter")
            );
        }
    }
}
