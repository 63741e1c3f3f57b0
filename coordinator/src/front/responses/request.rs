//! The parameters of a request.

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{Chat, GenerateRequest, Sampling};
use serde_json::{Map, Value, json};

use super::input;
use crate::front::openai::body::Asked;
use crate::front::openai::error::ApiError;
use crate::front::openai::fields::Fields;
use crate::front::openai::tools;
use crate::front::refusal::Refusal;
use crate::front::tools::definition::Tool;
use crate::front::tools::request::ToolRequest;

/// Labels that clients put on requests; they mean nothing to the answer.
const LABELS: [&str; 3] = ["user", "safety_identifier", "prompt_cache_key"];
/// What a response repeats of its request.
const REPEATED: [(&str, Value); 8] = [
    ("instructions", Value::Null),
    ("max_output_tokens", Value::Null),
    ("metadata", Value::Null),
    ("parallel_tool_calls", Value::Bool(true)),
    ("temperature", Value::Null),
    ("tool_choice", Value::Null),
    ("tools", Value::Null),
    ("top_p", Value::Null),
];

/// What a client asks for.
#[derive(Debug)]
pub(super) struct ResponsesRequest {
    pub(super) request: GenerateRequest,
    pub(super) stream: bool,
    pub(super) tools: Option<ToolRequest>,
    /// What the response repeats.
    pub(super) said: Map<String, Value>,
}

impl Asked for ResponsesRequest {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let said = said(&mut fields);
        let messages = input::take(&mut fields)?;
        let sampling = Sampling {
            max_tokens: fields.count("max_output_tokens", 1, u32::MAX)?,
            temperature: fields.f32("temperature")?,
            top_p: fields.f32("top_p")?,
            ..Sampling::default()
        };
        let request = GenerateRequest {
            model: fields.string("model")?.unwrap_or_default(),
            input: Some(Input::Chat(Chat { messages, ..Chat::default() })),
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        let stream = fields.bool("stream")?.unwrap_or(false);
        let tools = tools::take_as(&mut fields, flat, |choice| choice.required("name"))?;
        refuse_what_is_not_served(&mut fields)?;
        fields.finish()?;
        Ok(Self { request, stream, tools, said })
    }
}

fn said(fields: &mut Fields) -> Map<String, Value> {
    let repeated = REPEATED.into_iter();
    repeated
        .map(|(key, unset)| (key.to_owned(), fields.peek(key).cloned().unwrap_or(unset)))
        .collect()
}

/// Takes parameters of which only the values that change nothing can be served.
fn refuse_what_is_not_served(fields: &mut Fields) -> Result<(), ApiError> {
    for label in LABELS {
        fields.take(label);
    }
    fields.take("metadata");
    // By default OpenAI stores; a client finds out by `store` in the response.
    fields.only("store", &[json!(false)])?;
    fields.only("background", &[json!(false)])?;
    fields.only("include", &[json!([])])?;
    fields.only("truncation", &[json!("disabled")])?;
    fields.only("service_tier", &[json!("auto"), json!("default")])?;
    fields.only("top_logprobs", &[json!(0)])?;
    fields.only("reasoning", &[json!({})])?;
    fields.only("stream_options", &[json!({}), json!({"include_obfuscation": false})])?;
    if let Some(mut text) = fields.object("text")? {
        text.only("format", &[json!({"type": "text"})])?;
        text.finish()?;
    }
    Ok(())
}

/// A tool that is an entry `{"type": "function", "name": …}`.
fn flat(entry: &Value, field: &str) -> Result<Tool, Refusal> {
    let Value::Object(entry) = entry else {
        return Err(Refusal::wrong(field, format!("{field} is no object")));
    };
    if entry.get("type") != Some(&json!("function")) {
        let field = format!("{field}.type");
        let what = format!("{field} is not supported but as \"function\"");
        return Err(Refusal::wrong(&field, what));
    }
    let mut function = entry.clone();
    function.shift_remove("type");
    Tool::new(&function, field)
}
