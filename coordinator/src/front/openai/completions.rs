//! `/v1/completions`.

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Json, Response};
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{GenerateRequest, GenerateResponse, TokenIds};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::body::{Asked, Body};
use super::completions_reply::{Form, TextEvents, completion};
use super::error::ApiError;
use super::fields::Fields;
use super::gather::gather;
use super::reply::Answering;
use super::sampling::{self, MAX_LOGPROBS, Reply, token_ids};
use super::stream::stream;
use crate::front::Front;
use crate::front::door::Caller;
use crate::front::refusal::Refusal;

/// Most completions of all prompts of a request.
const MAX_COMPLETIONS: usize = 256;

/// Continues texts.
pub(super) async fn create(
    State(front): State<Front>,
    Extension(caller): Extension<Caller>,
    Body(asked): Body<TextRequest>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let TextRequest { requests, per_prompt, reply, logprobs, echo, prompt_only } = asked;
    let choices = requests.len() * per_prompt as usize;
    let texts: Vec<_> = requests.iter().map(text_of).collect();
    let started = front.start(&caller, requests, None, arrived).await?;
    let (mut answering, mut messages) = Answering::new("cmpl", started, reply, per_prompt);
    let echo = if echo { Some(prompt_texts(&front, &answering, texts).await?) } else { None };
    let form = Form { per_prompt, echo, logprobs, prompt_only };
    if reply.stream {
        return stream(messages, TextEvents::new(answering, form)).await;
    }
    let each = |message: &mut GenerateResponse| {
        form.trim(message);
        answering.tally.take(message);
    };
    let gathered = gather(&mut messages, choices, each).await?;
    let with_prompts = form.echo.is_some();
    let write = move || Json(completion(&answering, &form, gathered)).into_response();
    // Log-probabilities of a long prompt are millions of values.
    if with_prompts { Ok(front.computing.run(0, write).await?) } else { Ok(write()) }
}

/// Each prompt's text: as it was given, or that of its token ids.
async fn prompt_texts(
    front: &Front,
    answering: &Answering,
    given: Vec<Option<String>>,
) -> Result<Vec<String>, Refusal> {
    let (model, prompts) = (answering.model.clone(), answering.prompts.clone());
    let text = move |(ids, given): (Vec<u32>, Option<String>)| {
        given.unwrap_or_else(|| model.tokenizer.decode_with_special(&ids))
    };
    front.computing.run(0, move || prompts.into_iter().zip(given).map(text).collect()).await
}

/// The text of a prompt, if it was given as text.
fn text_of(request: &GenerateRequest) -> Option<String> {
    match &request.input {
        Some(Input::Prompt(text)) => Some(text.clone()),
        _ => None,
    }
}

/// What a client asks for.
#[derive(Debug, PartialEq)]
pub(super) struct TextRequest {
    /// One for each prompt.
    requests: Vec<GenerateRequest>,
    /// Completions of each.
    per_prompt: u32,
    reply: Reply,
    logprobs: bool,
    /// The prompt is part of the text.
    echo: bool,
    /// Nothing else is.
    prompt_only: bool,
}

impl Asked for TextRequest {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let (mut request, reply) = sampling::take(&mut fields)?;
        let per_prompt = request.n.unwrap_or(1);
        let prompts = prompts(&mut fields, per_prompt as usize)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let sampling = request.sampling.get_or_insert_default();
        // Whoever wants only the prompt's log-probabilities says so.
        let least = u32::from(!echo);
        let max_tokens = fields.count("max_tokens", least, u32::MAX)?;
        let prompt_only = max_tokens == Some(0);
        sampling.max_tokens = Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS).max(1));
        sampling.logprobs = fields.count("logprobs", 0, MAX_LOGPROBS)?;
        sampling.prompt_logprobs = sampling.logprobs.filter(|_| echo);
        let logprobs = sampling.logprobs.is_some();
        fields.only("suffix", &[json!("")])?;
        fields.only("add_special_tokens", &[json!(true)])?;
        fields.finish()?;
        let with = |input| GenerateRequest { input: Some(input), ..request.clone() };
        let requests = prompts.into_iter().map(with).collect();
        Ok(Self { requests, per_prompt, reply, logprobs, echo, prompt_only })
    }
}

/// As in OpenAI's API.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// A text, a list of token ids, or a list of either.
fn prompts(fields: &mut Fields, per_prompt: usize) -> Result<Vec<Input>, ApiError> {
    let most = MAX_COMPLETIONS / per_prompt;
    several(fields, "prompt", most, &format!("at most {most} with n = {per_prompt}"))
}

/// The same as the parameter `name`; `limit` says how many they may be.
pub(super) fn several(
    fields: &mut Fields,
    name: &str,
    most: usize,
    limit: &str,
) -> Result<Vec<Input>, ApiError> {
    let value = fields.take(name).ok_or_else(|| ApiError::missing(name))?;
    let Value::Array(list) = value else {
        return Ok(vec![one_prompt(name, value)?]);
    };
    if list.is_empty() {
        return Err(ApiError::invalid(name, format!("{name} is empty")));
    }
    if list[0].is_number() {
        return Ok(vec![one_prompt(name, Value::Array(list))?]);
    }
    if list.len() > most {
        return Err(ApiError::value(name, format_args!("{} prompts", list.len()), limit));
    }
    let kind = list[0].is_string();
    let one = |(at, value): (usize, Value)| {
        let place = format!("{name}[{at}]");
        if value.is_string() != kind {
            let what = format!("{name} mixes texts and lists of token ids; send two requests");
            return Err(ApiError::invalid(&place, what));
        }
        one_prompt(&place, value)
    };
    list.into_iter().enumerate().map(one).collect()
}

fn one_prompt(name: &str, value: Value) -> Result<Input, ApiError> {
    match value {
        Value::String(text) if text.is_empty() => {
            Err(ApiError::invalid(name, format!("{name} is empty")))
        }
        Value::String(text) => Ok(Input::Prompt(text)),
        Value::Array(ids) if ids.is_empty() => {
            Err(ApiError::invalid(name, format!("{name} is empty")))
        }
        Value::Array(ids) => Ok(Input::TokenIds(TokenIds { ids: token_ids(name, &ids)? })),
        other => Err(ApiError::value(name, other, "a string, token ids, or a list of these")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<TextRequest, ApiError> {
        TextRequest::parse(Fields::new("", body).unwrap())
    }

    fn inputs(prompt: Value) -> Vec<Input> {
        let requests = parse(json!({"prompt": prompt})).unwrap().requests;
        requests.into_iter().map(|request| request.input.unwrap()).collect()
    }

    #[test]
    fn a_prompt_has_four_forms() {
        let text = |text: &str| Input::Prompt(text.to_owned());
        let ids = |ids: &[u32]| Input::TokenIds(TokenIds { ids: ids.to_vec() });
        assert_eq!(inputs(json!("a")), [text("a")]);
        assert_eq!(inputs(json!(["a", "b"])), [text("a"), text("b")]);
        assert_eq!(inputs(json!([1, 2])), [ids(&[1, 2])]);
        assert_eq!(inputs(json!([[1, 2], [3]])), [ids(&[1, 2]), ids(&[3])]);
    }

    #[test]
    fn a_wrong_prompt_is_named_with_its_place() {
        for (prompt, param) in [
            (Value::Null, "prompt"),
            (json!(""), "prompt"),
            (json!([]), "prompt"),
            (json!(5), "prompt"),
            (json!({"a": 1}), "prompt"),
            (json!([1, "a"]), "prompt"),
            (json!([1, -1]), "prompt"),
            (json!(["a", ""]), "prompt[1]"),
            (json!(["a", [1]]), "prompt[1]"),
            (json!([[1], "a"]), "prompt[1]"),
            (json!([[1], []]), "prompt[1]"),
            (json!([[1], [1.5]]), "prompt[1]"),
            (json!([null]), "prompt[0]"),
            (json!(vec!["a"; 257]), "prompt"),
        ] {
            let error = parse(json!({"prompt": prompt})).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{prompt}: {}", error.message);
        }
        let error = parse(json!({"prompt": vec!["a"; 129], "n": 2})).unwrap_err();
        assert_eq!(error.message, "prompt is 129 prompts; it must be at most 128 with n = 2");
    }

    #[test]
    fn echo_asks_for_the_prompts_logprobs() {
        let sampling = |body: Value| {
            let request = parse(body).unwrap();
            let sampling = request.requests[0].sampling.clone().unwrap();
            let logprobs = (sampling.logprobs, sampling.prompt_logprobs);
            (logprobs, sampling.max_tokens, request.prompt_only)
        };
        let echo = json!({"prompt": [1], "echo": true, "logprobs": 1, "max_tokens": 0});
        assert_eq!(sampling(echo), ((Some(1), Some(1)), Some(1), true));
        let plain = json!({"prompt": [1], "logprobs": 1});
        assert_eq!(sampling(plain), ((Some(1), None), Some(16), false));
        let nothing = parse(json!({"prompt": [1], "max_tokens": 0})).unwrap_err();
        assert_eq!(nothing.param.as_deref(), Some("max_tokens"));
    }
}
