//! Whole answers, and what their parts have in common.

use baton_proto::wire::v1::{FinishReason, Finished, GenerateResponse};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::front::inference::Started;
use crate::front::refusal::Refusal;
use crate::front::tools::{Answer, Part};
use crate::front::trace::CallSpan;

/// A request that is being answered.
pub(super) struct Answering {
    /// Under which operators find the request.
    id: String,
    model: String,
    prompt_tokens: usize,
    pub(super) span: CallSpan,
}

impl Answering {
    /// Of a started request; beside it, its messages.
    pub(super) fn new(
        started: Started,
    ) -> (Self, mpsc::Receiver<Result<GenerateResponse, Refusal>>) {
        let Started { model, id, prompts, messages, span } = started;
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        (Self { id: id.to_string(), model: model.name.clone(), prompt_tokens, span }, messages)
    }

    /// The id of a call.
    pub(super) fn call_id(&self, index: u32) -> String {
        format!("toolu_{}{index:02x}", self.id)
    }

    /// A message of which nothing is known but how long the prompt is.
    pub(super) fn beginning(&self) -> Value {
        let finished = Finished::default();
        let mut message = self.envelope(Vec::new(), Value::Null, &finished);
        message["usage"]["input_tokens"] = self.prompt_tokens.into();
        message
    }

    /// The whole message.
    pub(super) fn message(&self, answer: &Answer, finished: &Finished) -> Value {
        let mut calls = 0;
        let block = |part: &Part| match part {
            Part::Text(text) => json!({"type": "text", "text": text}),
            Part::Call(call) => {
                let id = self.call_id(calls);
                calls += 1;
                // The parser takes texts for JSON that Rust does not, such as half a surrogate pair.
                let input = serde_json::from_str(&call.arguments);
                let input = input.unwrap_or_else(|_| Value::from(call.arguments.as_str()));
                json!({"type": "tool_use", "id": id, "name": call.name, "input": input})
            }
        };
        let content = answer.parts.iter().map(block).collect();
        if calls > 0 {
            self.span.called_tools(0);
        }
        self.envelope(content, stop_reason(finished, calls > 0).into(), finished)
    }

    fn envelope(&self, content: Vec<Value>, stop_reason: Value, finished: &Finished) -> Value {
        json!({
            "id": format!("msg_{}", self.id),
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence(finished, &stop_reason),
            "usage": usage(finished),
        })
    }
}

/// Why a message ended, in Anthropic's words.
pub(super) fn stop_reason(finished: &Finished, calls: bool) -> &'static str {
    match finished.reason() {
        FinishReason::Length => "max_tokens",
        _ if calls => "tool_use",
        _ if finished.stop_string.is_some() => "stop_sequence",
        FinishReason::Stop | FinishReason::Unspecified => "end_turn",
    }
}

/// The text that ended the message, if that is the reason.
pub(super) fn stop_sequence(finished: &Finished, reason: &Value) -> Value {
    match &finished.stop_string {
        Some(text) if reason == "stop_sequence" => text.as_str().into(),
        _ => Value::Null,
    }
}

/// Tokens that were read from a cache do not count as input here.
pub(super) fn usage(finished: &Finished) -> Value {
    let usage = finished.usage.unwrap_or_default();
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}
