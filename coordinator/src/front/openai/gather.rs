//! A request's completions as a whole, for clients that do not stream.

use baton_proto::wire::v1::{FinishReason, Finished, GenerateResponse, TokenLogprobs};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::error::ApiError;
use crate::front::refusal::Refusal;

/// One whole completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Gathered {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    pub(crate) finished: Finished,
}

impl Gathered {
    fn add(&mut self, message: GenerateResponse) {
        self.text += &message.text;
        self.token_ids.extend(message.token_ids);
        self.logprobs.extend(message.logprobs);
        self.prompt_logprobs.extend(message.prompt_logprobs);
        if let Some(finished) = message.finished {
            self.finished = finished;
        }
    }
}

/// Waits for `choices` completions; `each` sees every message first.
pub(crate) async fn gather(
    messages: &mut mpsc::Receiver<Result<GenerateResponse, Refusal>>,
    choices: usize,
    mut each: impl FnMut(&mut GenerateResponse),
) -> Result<Vec<Gathered>, ApiError> {
    let mut gathered = vec![Gathered::default(); choices];
    let mut ended = 0;
    while let Some(message) = messages.recv().await {
        let mut message = message?;
        ended += usize::from(message.finished.is_some());
        each(&mut message);
        if let Some(choice) = gathered.get_mut(message.choice as usize) {
            choice.add(message);
        }
    }
    if ended == choices { Ok(gathered) } else { Err(ApiError::internal("a completion was lost")) }
}

/// Waits for the only completion.
pub(crate) async fn gather_one(
    messages: &mut mpsc::Receiver<Result<GenerateResponse, Refusal>>,
) -> Result<Gathered, ApiError> {
    let gathered = gather(messages, 1, |_| ()).await?.pop();
    gathered.ok_or_else(|| ApiError::internal("a completion was lost"))
}

/// Why a completion ended, in OpenAI's words.
pub(crate) fn finish_reason(finished: &Finished) -> &'static str {
    match finished.reason() {
        FinishReason::Length => "length",
        FinishReason::Stop | FinishReason::Unspecified => "stop",
    }
}

/// What ended a completion: a stop string, the id of a stop token, or null for neither.
pub(crate) fn stop_reason(finished: &Finished) -> Value {
    match (&finished.stop_string, finished.stop_token_id) {
        (Some(text), _) => json!(text),
        (None, Some(id)) => json!(id),
        (None, None) => Value::Null,
    }
}
