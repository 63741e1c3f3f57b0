//! What all parts of an answer have in common.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use baton_proto::wire::v1::GenerateResponse;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::sampling::Reply;
use super::usage::Tally;
use crate::front::inference::Started;
use crate::front::models::ServedModel;
use crate::front::refusal::Refusal;
use crate::front::trace::CallSpan;

/// A request that is being answered.
pub(crate) struct Answering {
    id: String,
    created: u64,
    pub(crate) model: Arc<ServedModel>,
    /// Token ids of each prompt.
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) reply: Reply,
    pub(crate) tally: Tally,
    pub(crate) span: CallSpan,
}

impl Answering {
    /// Of a started request with so many completions of each prompt; beside it, its messages.
    pub(crate) fn new(
        kind: &str,
        started: Started,
        reply: Reply,
        per_prompt: u32,
    ) -> (Self, mpsc::Receiver<Result<GenerateResponse, Refusal>>) {
        let Started { model, id, prompts, messages, span } = started;
        span.streams(reply.stream);
        let tally = Tally::new(&prompts, per_prompt);
        // Operators find the request by the part after the dash.
        let id = format!("{kind}-{id}");
        (Self { id, created: unix_now(), model, prompts, reply, tally, span }, messages)
    }

    /// The id of a call of a tool, at most 40 characters as OpenAI's.
    pub(crate) fn call_id(&self, choice: u32, index: u32) -> String {
        let request = self.id.split_once('-').map_or("", |(_, request)| request);
        format!("call_{request}{choice:x}{index:02x}")
    }

    /// The answer, or one part of it: `object` says which.
    pub(crate) fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        })
    }

    /// One part of a stream.
    pub(crate) fn chunk(&self, object: &str, choice: Value) -> Value {
        let mut chunk = self.envelope(object, json!([choice]));
        if self.reply.continuous_usage {
            chunk["usage"] = self.tally.json();
        } else if self.reply.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// The part of a stream that only says what was used, if it was asked for.
    pub(crate) fn usage_chunk(&self, object: &str) -> Option<Value> {
        self.reply.include_usage.then(|| {
            let mut chunk = self.envelope(object, json!([]));
            chunk["usage"] = self.tally.json();
            chunk
        })
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
