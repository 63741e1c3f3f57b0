//! Text completions, whole and in parts.

use axum::response::sse::Event;
use baton_proto::wire::v1::{GenerateResponse, TokenLogprobs};
use serde_json::{Value, json};

use super::error::ApiError;
use super::gather::{Gathered, finish_reason, stop_reason};
use super::logprobs::TextLogprobs;
use super::reply::Answering;
use super::stream::{Events, data};

const OBJECT: &str = "text_completion";

/// What completions consist of.
pub(super) struct Form {
    /// Completions of each prompt.
    pub(super) per_prompt: u32,
    /// The prompts' texts, where they begin those of their completions.
    pub(super) echo: Option<Vec<String>>,
    pub(super) logprobs: bool,
    /// Nothing was to be generated, and one token had to be.
    pub(super) prompt_only: bool,
}

impl Form {
    /// Takes away what the client did not ask for.
    pub(super) fn trim(&self, message: &mut GenerateResponse) {
        if self.prompt_only {
            message.text.clear();
            message.token_ids.clear();
            message.logprobs.clear();
        }
    }

    fn prompt_of(&self, choice: usize) -> usize {
        choice / self.per_prompt as usize
    }

    fn prompt_text(&self, choice: usize) -> &str {
        self.echo.as_ref().map_or("", |texts| &texts[self.prompt_of(choice)])
    }
}

/// The answer to a client that does not stream.
pub(super) fn completion(answering: &Answering, form: &Form, gathered: Vec<Gathered>) -> Value {
    let choices = gathered.into_iter().enumerate().map(|(index, choice)| {
        let mut logprobs = TextLogprobs::default();
        add_prompt(&mut logprobs, answering, form.prompt_of(index), &choice.prompt_logprobs);
        logprobs.add(&choice.logprobs, &answering.model.tokenizer);
        let mut json = json!({
            "index": index,
            "text": format!("{}{}", form.prompt_text(index), choice.text),
            "logprobs": form.logprobs.then(|| logprobs.part()),
            "finish_reason": finish_reason(&choice.finished),
            "stop_reason": stop_reason(&choice.finished),
        });
        if answering.reply.return_token_ids {
            json["prompt_token_ids"] = answering.prompts[form.prompt_of(index)].as_slice().into();
            json["token_ids"] = choice.token_ids.into();
        }
        json
    });
    let mut whole = answering.envelope(OBJECT, choices.collect());
    whole["usage"] = answering.tally.json();
    whole
}

/// Adds what is known of a prompt's tokens, if anything is. The first one has no probability.
fn add_prompt(
    logprobs: &mut TextLogprobs,
    answering: &Answering,
    prompt: usize,
    tokens: &[TokenLogprobs],
) {
    if let Some((first, others)) = tokens.split_first() {
        debug_assert_eq!(first.token_id, answering.prompts[prompt][0]);
        logprobs.first(first.token_id, &answering.model.tokenizer);
        logprobs.add(others, &answering.model.tokenizer);
    }
}

/// The answer to a client that streams.
pub(super) struct TextEvents {
    answering: Answering,
    form: Form,
    choices: Vec<Choice>,
    unfinished: usize,
}

#[derive(Default)]
struct Choice {
    /// The prompt was told, where it is to be.
    begun: bool,
    /// What came before the prompt's log-probabilities, which are to be told first.
    held: Vec<GenerateResponse>,
    logprobs: TextLogprobs,
}

impl TextEvents {
    pub(super) fn new(answering: Answering, form: Form) -> Self {
        let unfinished = answering.prompts.len() * form.per_prompt as usize;
        let choices = std::iter::repeat_with(Choice::default).take(unfinished).collect();
        Self { answering, form, choices, unfinished }
    }

    fn chunk(&self, index: usize, text: &str, logprobs: Value) -> Value {
        let choice =
            json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null});
        self.answering.chunk(OBJECT, choice)
    }

    /// The first part of a completion, if it has one of its own: what there is of the prompt.
    fn beginning(&mut self, index: usize, message: &GenerateResponse) -> Option<Value> {
        let (prompt, ids) = (self.form.prompt_of(index), self.answering.reply.return_token_ids);
        if self.form.echo.is_none() && !ids {
            return None;
        }
        let logprobs = &mut self.choices[index].logprobs;
        add_prompt(logprobs, &self.answering, prompt, &message.prompt_logprobs);
        let part = if message.prompt_logprobs.is_empty() { Value::Null } else { logprobs.part() };
        let mut chunk = self.chunk(index, self.form.prompt_text(index), part);
        if ids {
            let choice = &mut chunk["choices"][0];
            choice["prompt_token_ids"] = self.answering.prompts[prompt].as_slice().into();
            choice["token_ids"] = json!([]);
        }
        Some(chunk)
    }

    /// A further part, if the message has anything that the client asked for.
    fn part(&mut self, index: usize, message: &GenerateResponse) -> Option<Value> {
        let reply = self.answering.reply;
        let counted = reply.return_token_ids || reply.continuous_usage;
        let tokens = counted && !message.token_ids.is_empty();
        if message.text.is_empty() && message.logprobs.is_empty() && !tokens {
            return None;
        }
        let logprobs = &mut self.choices[index].logprobs;
        logprobs.add(&message.logprobs, &self.answering.model.tokenizer);
        let part = if message.logprobs.is_empty() { Value::Null } else { logprobs.part() };
        let mut chunk = self.chunk(index, &message.text, part);
        if reply.return_token_ids {
            chunk["choices"][0]["token_ids"] = message.token_ids.as_slice().into();
        }
        Some(chunk)
    }

    /// The parts of a completion that has not begun yet, once it may.
    fn begin(&mut self, index: usize, message: &GenerateResponse) -> Option<Vec<Value>> {
        let told_first = self.form.echo.is_some() && self.form.logprobs;
        if told_first && message.prompt_logprobs.is_empty() && message.finished.is_none() {
            return None;
        }
        self.choices[index].begun = true;
        let mut chunks: Vec<_> = self.beginning(index, message).into_iter().collect();
        for held in std::mem::take(&mut self.choices[index].held) {
            chunks.extend(self.part(index, &held));
        }
        Some(chunks)
    }
}

impl Events for TextEvents {
    fn message(&mut self, mut message: GenerateResponse) -> Vec<Event> {
        self.form.trim(&mut message);
        self.answering.tally.take(&message);
        let index = message.choice as usize;
        let mut chunks = Vec::new();
        if !self.choices[index].begun {
            let Some(first) = self.begin(index, &message) else {
                self.choices[index].held.push(message);
                return Vec::new();
            };
            chunks = first;
        }
        chunks.extend(self.part(index, &message));
        if let Some(finished) = &message.finished {
            self.unfinished -= 1;
            let mut chunk = self.chunk(index, "", Value::Null);
            chunk["choices"][0]["finish_reason"] = finish_reason(finished).into();
            chunk["choices"][0]["stop_reason"] = stop_reason(finished);
            chunks.push(chunk);
        }
        chunks.iter().map(data).collect()
    }

    fn end(&mut self) -> Option<Vec<Event>> {
        let usage = self.answering.usage_chunk(OBJECT);
        let done = Event::default().data("[DONE]");
        let last = usage.iter().map(data).chain([done]).collect();
        (self.unfinished == 0).then_some(last)
    }

    fn failure(&self, error: &ApiError) -> Event {
        data(&error.body())
    }
}
