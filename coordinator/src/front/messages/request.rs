//! The parameters of a request.

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{Chat, GenerateRequest, Sampling};
use serde_json::{Map, Value, json};

use super::content;
use crate::front::openai::body::Asked;
use crate::front::openai::error::ApiError;
use crate::front::openai::fields::Fields;
use crate::front::refusal::Refusal;
use crate::front::tools::definition::{self, Tool};
use crate::front::tools::request::{ToolChoice, ToolRequest};

/// What a client asks for.
#[derive(Debug)]
pub(super) struct MessagesRequest {
    pub(super) request: GenerateRequest,
    pub(super) stream: bool,
    pub(super) tools: Option<ToolRequest>,
}

/// The same without what only matters to an answer.
#[derive(Debug)]
pub(super) struct ToCount {
    pub(super) request: GenerateRequest,
    pub(super) tools: Option<ToolRequest>,
}

impl Asked for MessagesRequest {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let max_tokens = fields.count("max_tokens", 1, u32::MAX)?;
        let max_tokens = Some(max_tokens.ok_or_else(|| ApiError::missing("max_tokens"))?);
        let sampling = Sampling {
            max_tokens,
            temperature: fields.f32("temperature")?,
            top_p: fields.f32("top_p")?,
            top_k: fields.count("top_k", 0, u32::MAX)?,
            stop: stops(&mut fields)?,
            ..Sampling::default()
        };
        let stream = fields.bool("stream")?.unwrap_or(false);
        // A label of the client's.
        fields.take("metadata");
        fields.only("service_tier", &[json!("auto"), json!("standard_only")])?;
        let ToCount { request, tools } = ToCount::parse(fields)?;
        let request = GenerateRequest { sampling: Some(sampling), ..request };
        Ok(Self { request, stream, tools })
    }
}

impl Asked for ToCount {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.required("model")?;
        let messages = content::take(&mut fields)?;
        let tools = tools(&mut fields)?;
        fields.only("thinking", &[json!({"type": "disabled"})])?;
        fields.finish()?;
        // As if it had written so far itself.
        let goes_on = messages.last().is_some_and(|message| message.role == "assistant");
        let continue_final_message = Some(goes_on);
        let input = Some(Input::Chat(Chat { messages, continue_final_message, ..Chat::default() }));
        let request = GenerateRequest { model, input, ..GenerateRequest::default() };
        Ok(Self { request, tools })
    }
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let list = fields.list("stop_sequences")?.unwrap_or_default();
    let text = |value: &Value| {
        let wrong = || ApiError::value("stop_sequences", value, "a list of strings");
        value.as_str().map(str::to_owned).ok_or_else(wrong)
    };
    list.iter().map(text).collect()
}

fn tools(fields: &mut Fields) -> Result<Option<ToolRequest>, ApiError> {
    let list = fields.take("tools").unwrap_or_else(|| json!([]));
    let tools = definition::tools(&list, "tools", custom_tool)?;
    let (choice, parallel) = match fields.object("tool_choice")? {
        None => (ToolChoice::Auto, true),
        Some(choice) => tool_choice(choice)?,
    };
    Ok(ToolRequest::new(tools, choice, parallel)?)
}

fn tool_choice(mut choice: Fields) -> Result<(ToolChoice, bool), ApiError> {
    let kind = choice.string("type")?;
    let parallel = !choice.bool("disable_parallel_tool_use")?.unwrap_or(false);
    let named = match kind.as_deref() {
        Some("auto") => ToolChoice::Auto,
        Some("none") => ToolChoice::None,
        Some("any") => ToolChoice::Required,
        Some("tool") => ToolChoice::Named(choice.required("name")?),
        other => {
            let limit = "auto, any, tool or none";
            return Err(ApiError::value("tool_choice.type", other.unwrap_or("missing"), limit));
        }
    };
    choice.finish()?;
    Ok((named, parallel))
}

/// A tool as Anthropic describes it.
fn custom_tool(entry: &Value, field: &str) -> Result<Tool, Refusal> {
    let refuse = |what: String| Refusal::wrong(field, what);
    let Value::Object(entry) = entry else {
        return Err(refuse(format!("{field} is no object")));
    };
    let mut function = Map::new();
    for (key, value) in entry {
        match key.as_str() {
            "name" | "description" => drop(function.insert(key.clone(), value.clone())),
            "input_schema" => drop(function.insert("parameters".to_owned(), value.clone())),
            "type" if value.is_null() || value == "custom" => {}
            // A hint where caching pays; here it always does.
            "cache_control" => {}
            _ => return Err(refuse(format!("{field}.{key:.40} is not supported"))),
        }
    }
    if !entry.contains_key("input_schema") {
        return Err(refuse(format!("{field}.input_schema is missing")));
    }
    Tool::new(&function, field)
}
