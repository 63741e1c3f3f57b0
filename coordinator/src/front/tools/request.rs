//! What a request says about tools, and what follows from it for the model and its output.

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::{GenerateRequest, StructuredOutput, structured_output};
use serde_json::{Value, json};

use super::definition::Tool;
use super::{OutputReader, ToolFormat, ToolParser};
use crate::front::models::ServedModel;
use crate::front::refusal::Refusal;

/// Whether a model calls tools, and which.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ToolChoice {
    /// As it thinks fit.
    Auto,
    /// Not at all.
    None,
    /// One of them.
    Required,
    /// The one of this name.
    Named(String),
}

impl ToolChoice {
    /// By OpenAI's word for it.
    pub(crate) fn of_word(word: &str) -> Result<Self, Refusal> {
        match word {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            "required" => Ok(Self::Required),
            _ => Err(Refusal::field("tool_choice", word, "auto, none, required or a function")),
        }
    }
}

/// The tools of a request; at least one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ToolRequest {
    tools: Vec<Tool>,
    choice: ToolChoice,
    /// Several calls in one answer are welcome.
    parallel: bool,
}

impl ToolRequest {
    /// `None` if there are no tools.
    pub(crate) fn new(
        tools: Vec<Tool>,
        choice: ToolChoice,
        parallel: bool,
    ) -> Result<Option<Self>, Refusal> {
        let wrong = |what: String| Refusal::wrong("tool_choice", format!("tool_choice {what}"));
        match &choice {
            ToolChoice::Auto | ToolChoice::None => {}
            ToolChoice::Required if tools.is_empty() => {
                return Err(wrong("wants a call, but there are no tools".to_owned()));
            }
            ToolChoice::Named(name) if tools.iter().all(|tool| tool.name != *name) => {
                return Err(wrong(format!("names {name:.80?}, which is none of the tools")));
            }
            ToolChoice::Required | ToolChoice::Named(_) => {}
        }
        Ok((!tools.is_empty()).then_some(Self { tools, choice, parallel }))
    }

    /// Tells the model of the tools, lets it call them as was asked for, and says how to read its
    /// output.
    pub(crate) fn apply(
        &self,
        request: &mut GenerateRequest,
        model: &ServedModel,
    ) -> Result<OutputReader, Refusal> {
        match &self.choice {
            ToolChoice::None => Ok(OutputReader::default()),
            ToolChoice::Auto => self.offer(request, model),
            ToolChoice::Required => self.force(&self.tools, request, model),
            ToolChoice::Named(name) => {
                let named = self.tools.iter().filter(|tool| tool.name == *name);
                self.force(&named.cloned().collect::<Vec<_>>(), request, model)
            }
        }
    }

    /// The model decides.
    fn offer(
        &self,
        request: &mut GenerateRequest,
        model: &ServedModel,
    ) -> Result<OutputReader, Refusal> {
        let format = model.chat.as_ref().and_then(|template| template.tool_format());
        let Some(format) = format else {
            let what = format!(
                "tools are not supported with model {:?} but with tool_choice = none, required or a \
                 tool: its chat template teaches no known way to call them",
                model.name
            );
            return Err(Refusal::wrong("tools", what));
        };
        if let Some(at) = self.tools.iter().position(|tool| tool.strict) {
            let field = format!("tools[{at}].strict");
            let what =
                format!("{field} is not supported but with tool_choice = required or a tool");
            return Err(Refusal::wrong(&field, what));
        }
        if request.structured_output.is_some() {
            return Err(with_structured_output());
        }
        self.tell(request);
        let sampling = request.sampling.get_or_insert_default();
        if let (false, Some(end)) = (self.parallel, format.end_mark()) {
            sampling.stop.push(end.to_owned());
        }
        if model.tokenizer.is_special(format.mark()) {
            sampling.skip_special_tokens.get_or_insert(false);
        }
        let most_calls = if self.parallel { u32::MAX } else { 1 };
        Ok(OutputReader::new(ToolParser::new(format, self.names(), most_calls)))
    }

    /// The output has to be a call of one of `tools`.
    fn force(
        &self,
        tools: &[Tool],
        request: &mut GenerateRequest,
        model: &ServedModel,
    ) -> Result<OutputReader, Refusal> {
        if request.structured_output.is_some() {
            return Err(with_structured_output());
        }
        let template = model.chat.as_ref();
        if template.is_some_and(|template| template.knows_tools()) {
            self.tell(request);
        }
        // The word that the model knows for it.
        let arguments = match template.and_then(|template| template.tool_format()) {
            Some(ToolFormat::Llama3) => "parameters",
            Some(ToolFormat::Hermes) | None => "arguments",
        };
        let schema = call_schema(tools, arguments).to_string();
        let kind = Some(structured_output::Kind::JsonSchema(schema));
        request.structured_output = Some(StructuredOutput { kind });
        // The whole output is one call without a mark.
        Ok(OutputReader::new(ToolParser::new(ToolFormat::Llama3, self.names(), 1)))
    }

    fn tell(&self, request: &mut GenerateRequest) {
        if let Some(Input::Chat(chat)) = &mut request.input {
            let list: Vec<_> = self.tools.iter().map(Tool::described).collect();
            chat.tools = Some(Value::from(list).to_string());
        }
    }

    fn names(&self) -> Vec<String> {
        self.tools.iter().map(|tool| tool.name.clone()).collect()
    }
}

fn with_structured_output() -> Refusal {
    let what = "tools are not supported together with another form that the output has to have";
    Refusal::wrong("tools", what)
}

/// Schema of a call of one of `tools`.
fn call_schema(tools: &[Tool], arguments: &str) -> Value {
    let call = |(index, tool): (usize, &Tool)| {
        let mut parameters = tool.parameters.clone().unwrap_or_else(
            || json!({"type": "object", "properties": {}, "additionalProperties": false}),
        );
        move_references(&mut parameters, &format!("#/anyOf/{index}/properties/{arguments}"));
        json!({
            "type": "object",
            "properties": {"name": {"const": tool.name}, arguments: parameters},
            "required": ["name", arguments],
            "additionalProperties": false,
        })
    };
    json!({"anyOf": tools.iter().enumerate().map(call).collect::<Vec<_>>()})
}

/// References to places within a schema, which is now a part of another one.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(text) if key == "$ref" => {
                        if let Some(pointer) = text.strip_prefix('#') {
                            *text = format!("{place}{pointer}");
                        }
                    }
                    value => move_references(value, place),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| move_references(value, place)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::tools::definition;

    #[test]
    fn a_forced_call_keeps_what_a_schema_refers_to() {
        let parameters = json!({
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A"}, "all": {"$ref": "#"}},
            "$defs": {"A": {"type": "integer"}},
        });
        let list = json!([
            {"type": "function", "function": {"name": "f"}},
            {"type": "function", "function": {"name": "g", "parameters": parameters}},
        ]);
        let tools = definition::tools(&list, "tools", definition::nested).unwrap();
        let schema = call_schema(&tools, "arguments");
        let properties = schema.pointer("/anyOf/1/properties/arguments/properties").unwrap();
        for (property, meant) in [("a", json!({"type": "integer"})), ("all", Value::Null)] {
            let reference = properties[property]["$ref"].as_str().unwrap();
            let found = schema.pointer(reference.strip_prefix('#').unwrap()).unwrap();
            assert!(meant.is_null() || *found == meant, "{reference}");
        }
        let call = &schema["anyOf"][0];
        assert_eq!(call["properties"]["name"], json!({"const": "f"}));
        assert_eq!(call["required"], json!(["name", "arguments"]));
    }
}
