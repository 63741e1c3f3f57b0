//! Responses as streams of events.

use axum::response::sse::Event;
use baton_proto::wire::v1::GenerateResponse;
use serde_json::{Value, json};

use super::reply::{Answering, status, text_part};
use crate::front::openai::error::ApiError;
use crate::front::openai::stream::{Events, named};
use crate::front::tools::{OutputReader, Piece};

/// Makes events of a request's messages.
pub(super) struct ResponseEvents {
    answering: Answering,
    reader: OutputReader,
    /// Events that were told.
    told: u64,
    begun: bool,
    /// Items that are whole.
    output: Vec<Value>,
    /// The item that is being told.
    open: Option<Item>,
    finished: bool,
}

enum Item {
    Text { text: String },
    Call { name: String, arguments: String },
}

impl ResponseEvents {
    pub(super) fn new(answering: Answering, reader: OutputReader) -> Self {
        let output = Vec::new();
        Self { answering, reader, told: 0, begun: false, output, open: None, finished: false }
    }

    fn begin(&mut self, out: &mut Vec<Value>) {
        for kind in ["response.created", "response.in_progress"] {
            let response = self.answering.response(Vec::new(), None);
            out.push(json!({"type": kind, "response": response}));
        }
    }

    fn piece(&mut self, piece: Piece, out: &mut Vec<Value>) {
        match piece {
            Piece::Text(text) => {
                if !matches!(self.open, Some(Item::Text { .. })) {
                    self.close("completed", out);
                    self.open(Item::Text { text: String::new() }, out);
                }
                out.push(self.about_item("response.output_text.delta", |event| {
                    event["content_index"] = 0.into();
                    event["delta"] = text.as_str().into();
                    event["logprobs"] = json!([]);
                }));
                if let Some(Item::Text { text: before }) = &mut self.open {
                    before.push_str(&text);
                }
            }
            Piece::Call { name, .. } => {
                self.close("completed", out);
                self.open(Item::Call { name, arguments: String::new() }, out);
            }
            Piece::Arguments { text, .. } => {
                out.push(self.about_item("response.function_call_arguments.delta", |event| {
                    event["delta"] = text.as_str().into();
                }));
                if let Some(Item::Call { arguments, .. }) = &mut self.open {
                    arguments.push_str(&text);
                }
            }
            Piece::Broken { .. } => self.close("incomplete", out),
        }
    }

    fn open(&mut self, item: Item, out: &mut Vec<Value>) {
        let is_text = matches!(item, Item::Text { .. });
        self.open = Some(item);
        let item = match &self.open {
            // Its part comes with an event of its own.
            Some(Item::Text { .. }) => {
                self.answering.text_item(self.output.len(), None, "in_progress")
            }
            _ => self.item("in_progress"),
        };
        out.push(json!({
            "type": "response.output_item.added",
            "output_index": self.output.len(),
            "item": item,
        }));
        if is_text {
            out.push(self.about_item("response.content_part.added", |event| {
                event["content_index"] = 0.into();
                event["part"] = text_part("");
            }));
        }
    }

    fn close(&mut self, status: &str, out: &mut Vec<Value>) {
        match &self.open {
            None => return,
            Some(Item::Text { text }) => {
                out.push(self.about_item("response.output_text.done", |event| {
                    event["content_index"] = 0.into();
                    event["text"] = text.as_str().into();
                    event["logprobs"] = json!([]);
                }));
                out.push(self.about_item("response.content_part.done", |event| {
                    event["content_index"] = 0.into();
                    event["part"] = text_part(text);
                }));
            }
            Some(Item::Call { name, arguments }) => {
                out.push(self.about_item("response.function_call_arguments.done", |event| {
                    event["name"] = name.as_str().into();
                    event["arguments"] = arguments.as_str().into();
                }));
            }
        }
        let item = self.item(status);
        out.push(json!({
            "type": "response.output_item.done",
            "output_index": self.output.len(),
            "item": item,
        }));
        self.output.push(item);
        self.open = None;
    }

    /// The item that is being told.
    fn item(&self, status: &str) -> Value {
        let index = self.output.len();
        match &self.open {
            Some(Item::Call { name, arguments }) => {
                self.answering.call_item(index, name, arguments, status)
            }
            Some(Item::Text { text }) => self.answering.text_item(index, Some(text), status),
            None => Value::Null,
        }
    }

    /// An event about the item that is being told.
    fn about_item(&self, kind: &str, complete: impl FnOnce(&mut Value)) -> Value {
        let index = self.output.len();
        let id = match self.open {
            Some(Item::Call { .. }) => self.answering.item_id("fc", index),
            _ => self.answering.item_id("msg", index),
        };
        let mut event = json!({"type": kind, "item_id": id, "output_index": index});
        complete(&mut event);
        event
    }

    fn events(&mut self, message: &GenerateResponse) -> Vec<Value> {
        let mut out = Vec::new();
        if !std::mem::replace(&mut self.begun, true) {
            self.begin(&mut out);
        }
        for piece in self.reader.take(message) {
            self.piece(piece, &mut out);
        }
        if let Some(finished) = &message.finished {
            if self.reader.calls() > 0 {
                self.answering.span.called_tools(0);
            }
            let status = status(finished);
            self.close(status, &mut out);
            let response = self.answering.response(self.output.clone(), Some(finished));
            out.push(json!({"type": format!("response.{status}"), "response": response}));
            self.finished = true;
        }
        for event in &mut out {
            event["sequence_number"] = self.told.into();
            self.told += 1;
        }
        out
    }
}

impl Events for ResponseEvents {
    fn message(&mut self, message: GenerateResponse) -> Vec<Event> {
        self.events(&message).iter().map(named).collect()
    }

    fn end(&mut self) -> Option<Vec<Event>> {
        self.finished.then(Vec::new)
    }

    fn failure(&self, error: &ApiError) -> Event {
        let mut event = json!({
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": self.told,
        });
        // Without this, clients of OpenAI go on as if nothing had happened.
        event["error"] = error.body()["error"].take();
        named(&event)
    }
}
