//! Tools of a request, and how its outputs are read.

use baton_proto::wire::v1::GenerateRequest;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use crate::front::Front;
use crate::front::refusal::Refusal;
use crate::front::tools::OutputReader;
use crate::front::tools::definition::{self, Tool};
use crate::front::tools::request::{ToolChoice, ToolRequest};

/// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
pub(crate) fn take(fields: &mut Fields) -> Result<Option<ToolRequest>, ApiError> {
    take_as(fields, definition::nested, |choice| {
        let function = choice.object("function")?;
        let mut function = function.ok_or_else(|| ApiError::missing("tool_choice.function"))?;
        let name = function.required("name")?;
        function.finish()?;
        Ok(name)
    })
}

/// The same of an API that describes a tool, and names a chosen one, in its own way.
pub(crate) fn take_as(
    fields: &mut Fields,
    tool: impl Fn(&Value, &str) -> Result<Tool, Refusal>,
    chosen: impl Fn(&mut Fields) -> Result<String, ApiError>,
) -> Result<Option<ToolRequest>, ApiError> {
    let list = fields.take("tools").unwrap_or_else(|| json!([]));
    let tools = definition::tools(&list, "tools", tool)?;
    let choice = match fields.take("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => ToolChoice::of_word(&word)?,
        Some(value) => {
            let mut choice = Fields::new("tool_choice", value)?;
            choice.only("type", &[json!("function")])?;
            let name = chosen(&mut choice)?;
            choice.finish()?;
            ToolChoice::Named(name)
        }
    };
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    Ok(ToolRequest::new(tools, choice, parallel)?)
}

/// Lets the model call tools, and says how to read each output of the request.
pub(crate) async fn apply(
    front: &Front,
    request: &mut GenerateRequest,
    tools: Option<&ToolRequest>,
) -> Result<OutputReader, Refusal> {
    let Some(tools) = tools else {
        return Ok(OutputReader::default());
    };
    let (model, _) = front.model_for(request).await?;
    // An alias could mean another model the next time.
    request.model = model.name.clone();
    tools.apply(request, &model)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Option<ToolRequest>, ApiError> {
        let mut fields = Fields::new("", body).unwrap();
        let tools = take(&mut fields)?;
        fields.finish()?;
        Ok(tools)
    }

    #[test]
    fn what_is_wrong_is_named() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        for (body, param) in [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [{"type": "code_interpreter"}]}), "tools[0].type"),
            (
                json!({"tools": [{"type": "function", "function": {"name": ""}}]}),
                "tools[0].function.name",
            ),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": tools, "tool_choice": "any"}), "tool_choice"),
            (json!({"tools": tools, "tool_choice": 1}), "tool_choice"),
            (json!({"tools": tools, "tool_choice": {"type": "allowed_tools"}}), "tool_choice.type"),
            (json!({"tools": tools, "tool_choice": {"type": "function"}}), "tool_choice.function"),
            (
                json!({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice",
            ),
            (json!({"tools": tools, "parallel_tool_calls": "no"}), "parallel_tool_calls"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
        }
        assert_eq!(read(json!({})).unwrap(), None);
        assert_eq!(read(json!({"tools": [], "tool_choice": "auto"})).unwrap(), None);
        assert!(read(json!({"tools": tools, "tool_choice": "none"})).unwrap().is_some());
    }
}
