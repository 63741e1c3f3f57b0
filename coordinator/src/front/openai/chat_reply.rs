//! Chat completions, whole and in parts.

use axum::response::sse::Event;
use baton_proto::wire::v1::GenerateResponse;
use serde_json::{Value, json};

use super::error::ApiError;
use super::gather::{Gathered, finish_reason, stop_reason};
use super::logprobs;
use super::reply::Answering;
use super::stream::{Events, data};

const CHUNK: &str = "chat.completion.chunk";

/// The answer to a client that does not stream.
pub(super) fn completion(answering: &Answering, gathered: Vec<Gathered>) -> Value {
    let choices = gathered.into_iter().enumerate();
    let choices = choices.map(|(index, choice)| {
        let mut json = json!({
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": null},
            "logprobs": null,
            "finish_reason": finish_reason(&choice.finished),
            "stop_reason": stop_reason(&choice.finished),
        });
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

/// The answer to a client that streams.
pub(super) struct ChatEvents {
    answering: Answering,
    /// Of each completion, whether its role was told.
    begun: Vec<bool>,
    unfinished: u32,
}

impl ChatEvents {
    pub(super) fn new(answering: Answering, choices: u32) -> Self {
        Self { answering, begun: vec![false; choices as usize], unfinished: choices }
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

    /// A further part, if the message has anything that the client asked for.
    fn part(&self, message: &GenerateResponse) -> Option<Value> {
        let reply = self.answering.reply;
        let counted = reply.return_token_ids || reply.continuous_usage;
        let tokens = counted && !message.token_ids.is_empty();
        if message.text.is_empty() && message.logprobs.is_empty() && !tokens {
            return None;
        }
        let mut chunk = self.chunk(message.choice, json!({"content": message.text}));
        let choice = &mut chunk["choices"][0];
        if !message.logprobs.is_empty() {
            choice["logprobs"] = logprobs::chat(&message.logprobs, &self.answering.model.tokenizer);
        }
        if reply.return_token_ids {
            choice["token_ids"] = message.token_ids.as_slice().into();
        }
        Some(chunk)
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
        chunks.extend(self.part(&message));
        if let Some(finished) = &message.finished {
            self.unfinished -= 1;
            let mut chunk = self.chunk(message.choice, json!({}));
            chunk["choices"][0]["finish_reason"] = finish_reason(finished).into();
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
