//! Answers as streams of events.

use axum::response::sse::Event;
use baton_proto::wire::v1::GenerateResponse;
use serde_json::{Value, json};

use super::error;
use super::reply::{Answering, stop_reason, stop_sequence, usage};
use crate::front::openai::error::ApiError;
use crate::front::openai::stream::{Events, named};
use crate::front::tools::{OutputReader, Piece};

/// Makes events of a request's messages.
pub(super) struct MessageEvents {
    answering: Answering,
    reader: OutputReader,
    begun: bool,
    /// The block that is being told.
    open: Option<Block>,
    /// Number of the next block.
    index: u32,
    finished: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Block {
    Text,
    Call,
}

impl MessageEvents {
    pub(super) fn new(answering: Answering, reader: OutputReader) -> Self {
        Self { answering, reader, begun: false, open: None, index: 0, finished: false }
    }

    fn piece(&mut self, piece: Piece, out: &mut Vec<Value>) {
        match piece {
            Piece::Text(text) => {
                if self.open != Some(Block::Text) {
                    self.open(Block::Text, json!({"type": "text", "text": ""}), out);
                }
                out.push(self.delta(json!({"type": "text_delta", "text": text})));
            }
            Piece::Call { index, name } => {
                let id = self.answering.call_id(index);
                let block = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                self.open(Block::Call, block, out);
            }
            Piece::Arguments { text, .. } => {
                out.push(self.delta(json!({"type": "input_json_delta", "partial_json": text})));
            }
            Piece::Broken { .. } => self.close(out),
        }
    }

    fn open(&mut self, kind: Block, block: Value, out: &mut Vec<Value>) {
        self.close(out);
        let index = self.index;
        out.push(json!({"type": "content_block_start", "index": index, "content_block": block}));
        self.open = Some(kind);
    }

    fn delta(&self, delta: Value) -> Value {
        json!({"type": "content_block_delta", "index": self.index, "delta": delta})
    }

    fn close(&mut self, out: &mut Vec<Value>) {
        if self.open.take().is_some() {
            out.push(json!({"type": "content_block_stop", "index": self.index}));
            self.index += 1;
        }
    }

    fn events(&mut self, message: &GenerateResponse) -> Vec<Value> {
        let mut out = Vec::new();
        if !std::mem::replace(&mut self.begun, true) {
            out.push(json!({"type": "message_start", "message": self.answering.beginning()}));
        }
        for piece in self.reader.take(message) {
            self.piece(piece, &mut out);
        }
        if let Some(finished) = &message.finished {
            self.close(&mut out);
            let calls = self.reader.calls() > 0;
            if calls {
                self.answering.span.called_tools(0);
            }
            let reason = Value::from(stop_reason(finished, calls));
            let stop_sequence = stop_sequence(finished, &reason);
            let delta = json!({"stop_reason": reason, "stop_sequence": stop_sequence});
            out.push(json!({"type": "message_delta", "delta": delta, "usage": usage(finished)}));
            self.finished = true;
        }
        out
    }
}

impl Events for MessageEvents {
    fn message(&mut self, message: GenerateResponse) -> Vec<Event> {
        self.events(&message).iter().map(named).collect()
    }

    fn end(&mut self) -> Option<Vec<Event>> {
        self.finished.then(|| vec![named(&json!({"type": "message_stop"}))])
    }

    fn failure(&self, error: &ApiError) -> Event {
        named(&error::body(error))
    }
}
