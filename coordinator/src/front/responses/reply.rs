//! Whole responses, and what their parts have in common.

use baton_proto::wire::v1::{FinishReason, Finished, GenerateResponse};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use crate::front::inference::Started;
use crate::front::openai::unix_now;
use crate::front::refusal::Refusal;
use crate::front::tools::{Answer, Part};
use crate::front::trace::CallSpan;

/// A request that is being answered.
pub(super) struct Answering {
    /// Under which operators find the request.
    id: String,
    created: u64,
    model: String,
    /// What the response repeats of the request.
    said: Map<String, Value>,
    pub(super) span: CallSpan,
}

impl Answering {
    /// Of a started request; beside it, its messages.
    pub(super) fn new(
        started: Started,
        said: Map<String, Value>,
    ) -> (Self, mpsc::Receiver<Result<GenerateResponse, Refusal>>) {
        let Started { model, id, messages, span, .. } = started;
        let (id, model) = (id.to_string(), model.name.clone());
        (Self { id, created: unix_now(), model, said, span }, messages)
    }

    /// The id of an item: `msg` for a text, `fc` for a call.
    pub(super) fn item_id(&self, kind: &str, index: usize) -> String {
        format!("{kind}_{}_{index}", self.id)
    }

    /// The item of a text. `index` counts the items of the output.
    pub(super) fn text_item(&self, index: usize, text: Option<&str>, status: &str) -> Value {
        let content: Vec<_> = text.map(text_part).into_iter().collect();
        json!({
            "id": self.item_id("msg", index),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        })
    }

    /// The item of a call.
    pub(super) fn call_item(
        &self,
        index: usize,
        name: &str,
        arguments: &str,
        status: &str,
    ) -> Value {
        json!({
            "id": self.item_id("fc", index),
            "type": "function_call",
            "status": status,
            "call_id": format!("call_{}{index:02x}", self.id),
            "name": name,
            "arguments": arguments,
        })
    }

    /// The items of a whole answer.
    pub(super) fn output(&self, answer: &Answer, finished: &Finished) -> Vec<Value> {
        if answer.calls().next().is_some() {
            self.span.called_tools(0);
        }
        let last = answer.parts.len().saturating_sub(1);
        let item = |(index, part): (usize, &Part)| match part {
            Part::Text(text) => {
                let status = if index == last { status(finished) } else { "completed" };
                self.text_item(index, Some(text), status)
            }
            Part::Call(call) => self.call_item(index, &call.name, &call.arguments, "completed"),
        };
        answer.parts.iter().enumerate().map(item).collect()
    }

    /// The response; without `finished`, while it is made.
    pub(super) fn response(&self, output: Vec<Value>, finished: Option<&Finished>) -> Value {
        let status = finished.map_or("in_progress", status);
        let incomplete = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        let mut response = json!({
            "id": format!("resp_{}", self.id),
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": output,
            "previous_response_id": null,
            "reasoning": {"effort": null, "summary": null},
            "store": false,
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "usage": finished.map(usage),
        });
        let said = self.said.iter().map(|(key, value)| {
            let value = match (key.as_str(), value) {
                ("metadata", Value::Null) => json!({}),
                ("tools", Value::Null) => json!([]),
                ("tool_choice", Value::Null) => json!("auto"),
                (_, value) => value.clone(),
            };
            (key.clone(), value)
        });
        response.as_object_mut().expect("it is written as one above").extend(said);
        response
    }
}

/// The content of a text's item.
pub(super) fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

/// How a response ended.
pub(super) fn status(finished: &Finished) -> &'static str {
    match finished.reason() {
        FinishReason::Length => "incomplete",
        FinishReason::Stop | FinishReason::Unspecified => "completed",
    }
}

fn usage(finished: &Finished) -> Value {
    let usage = finished.usage.unwrap_or_default();
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
