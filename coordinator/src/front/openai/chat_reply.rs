//! Chat completions, whole and in parts.

use axum::response::sse::Event;
use baton_proto::wire::v1::{Finished, GenerateResponse};
use serde_json::{Value, json};

use super::error::ApiError;
use super::gather::{Gathered, finish_reason, stop_reason};
use super::logprobs;
use super::reply::Answering;
use super::stream::{Events, data};
use crate::front::tools::{OutputReader, Piece};

const CHUNK: &str = "chat.completion.chunk";

/// The answer to a client that does not stream.
pub(super) fn completion(
    answering: &Answering,
    gathered: Vec<Gathered>,
    reader: &OutputReader,
) -> Value {
    let choices = gathered.into_iter().zip(0..);
    let choices = choices.map(|(choice, index)| {
        let answer = reader.clone().read(&choice.text);
        let calls = answer.calls().zip(0..).map(|(call, at)| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": answering.call_id(index, at), "type": "function", "function": function})
        });
        let calls: Vec<_> = calls.collect();
        let mut json = json!({
            "index": index,
            "message": {"role": "assistant", "content": answer.text(), "refusal": null},
            "logprobs": null,
            "finish_reason": finish_reason_with(!calls.is_empty(), &choice.finished),
            "stop_reason": stop_reason(&choice.finished),
        });
        if !calls.is_empty() {
            answering.span.called_tools(index);
            if json["message"]["content"] == "" {
                json["message"]["content"] = Value::Null;
            }
            json["message"]["tool_calls"] = calls.into();
        }
        if !choice.logprobs.is_empty() {
            json["logprobs"] = logprobs::chat(&choice.logprobs, &answering.model.tokenizer);
        }
        if answering.reply.return_token_ids {
            json["token_ids"] = choice.token_ids.into();
        }
        json
    });
    let mut whole = answering.envelope("chat.completion", choices.collect());
    whole["usage"] = answering.tally.json();
    if answering.reply.return_token_ids {
        whole["prompt_token_ids"] = answering.prompts[0].as_slice().into();
    }
    whole
}

/// Why a completion ended, in which there may be calls of tools.
fn finish_reason_with(calls: bool, finished: &Finished) -> &'static str {
    match finish_reason(finished) {
        "stop" if calls => "tool_calls",
        reason => reason,
    }
}

/// The answer to a client that streams.
pub(super) struct ChatEvents {
    answering: Answering,
    /// Of each completion, whether its role was told.
    begun: Vec<bool>,
    /// Of each completion.
    readers: Vec<OutputReader>,
    unfinished: u32,
}

impl ChatEvents {
    pub(super) fn new(answering: Answering, choices: u32, reader: &OutputReader) -> Self {
        let (begun, readers) =
            (vec![false; choices as usize], vec![reader.clone(); choices as usize]);
        Self { answering, begun, readers, unfinished: choices }
    }

    fn chunk(&self, index: u32, delta: Value) -> Value {
        let choice =
            json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        self.answering.chunk(CHUNK, choice)
    }

    /// The first part of a completion.
    fn beginning(&self, index: u32) -> Value {
        let mut chunk = self.chunk(index, json!({"role": "assistant", "content": ""}));
        if self.answering.reply.return_token_ids {
            chunk["prompt_token_ids"] = self.answering.prompts[0].as_slice().into();
        }
        chunk
    }

    /// Further parts, if the message has anything that the client asked for.
    fn parts(&mut self, message: &GenerateResponse) -> Vec<Value> {
        let reader = self.readers.get_mut(message.choice as usize);
        let pieces = reader.map(|reader| reader.take(message)).unwrap_or_default();
        let reply = self.answering.reply;
        let counted = reply.return_token_ids || reply.continuous_usage;
        let tokens = counted && !message.token_ids.is_empty();
        let deltas = pieces.into_iter().filter_map(|piece| self.delta(message.choice, piece));
        let mut parts: Vec<_> = deltas.map(|delta| self.chunk(message.choice, delta)).collect();
        if parts.is_empty() && (tokens || !message.logprobs.is_empty()) {
            parts.push(self.chunk(message.choice, json!({"content": ""})));
        }
        if let Some(chunk) = parts.first_mut() {
            let choice = &mut chunk["choices"][0];
            if !message.logprobs.is_empty() {
                choice["logprobs"] =
                    logprobs::chat(&message.logprobs, &self.answering.model.tokenizer);
            }
            if reply.return_token_ids {
                choice["token_ids"] = message.token_ids.as_slice().into();
            }
        }
        parts
    }

    fn delta(&self, choice: u32, piece: Piece) -> Option<Value> {
        let call = match piece {
            Piece::Text(text) => return Some(json!({"content": text})),
            Piece::Call { index, name } => json!({
                "index": index,
                "id": self.answering.call_id(choice, index),
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }),
            Piece::Arguments { index, text } => {
                json!({"index": index, "function": {"arguments": text}})
            }
            // The client has seen all of it that can be seen as a call.
            Piece::Broken { .. } => return None,
        };
        Some(json!({"tool_calls": [call]}))
    }

    fn calls(&self, choice: u32) -> bool {
        self.readers.get(choice as usize).is_some_and(|reader| reader.calls() > 0)
    }
}

impl Events for ChatEvents {
    fn message(&mut self, message: GenerateResponse) -> Vec<Event> {
        self.answering.tally.take(&message);
        let mut chunks = Vec::new();
        let begun = self.begun.get_mut(message.choice as usize);
        if begun.is_some_and(|begun| !std::mem::replace(begun, true)) {
            chunks.push(self.beginning(message.choice));
        }
        chunks.extend(self.parts(&message));
        if let Some(finished) = &message.finished {
            self.unfinished -= 1;
            if self.calls(message.choice) {
                self.answering.span.called_tools(message.choice);
            }
            let mut chunk = self.chunk(message.choice, json!({}));
            chunk["choices"][0]["finish_reason"] =
                finish_reason_with(self.calls(message.choice), finished).into();
            chunk["choices"][0]["stop_reason"] = stop_reason(finished);
            chunks.push(chunk);
        }
        chunks.iter().map(data).collect()
    }

    fn end(&mut self) -> Option<Vec<Event>> {
        let usage = self.answering.usage_chunk(CHUNK);
        let done = Event::default().data("[DONE]");
        let last = usage.iter().map(data).chain([done]).collect();
        (self.unfinished == 0).then_some(last)
    }

    fn failure(&self, error: &ApiError) -> Event {
        data(&error.body())
    }
}
