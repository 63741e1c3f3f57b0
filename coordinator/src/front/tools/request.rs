//! What a request says about tools, and what follows from it for the model and its output.

use baton_proto::wire::v1::GenerateRequest;
use baton_proto::wire::v1::generate_request::Input;
use serde_json::Value;

use super::definition::Tool;
use super::{OutputReader, ToolParser};
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
            ToolChoice::Required | ToolChoice::Named(_) => {
                let what = "tool_choice is not supported but as \"auto\" or \"none\"";
                Err(Refusal::wrong("tool_choice", what))
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
                "tools are not supported with model {:?}: its chat template teaches no known way to \
                 call them",
                model.name
            );
            return Err(Refusal::wrong("tools", what));
        };
        if let Some(at) = self.tools.iter().position(|tool| tool.strict) {
            let field = format!("tools[{at}].strict");
            let what = format!("{field} is not supported but as false");
            return Err(Refusal::wrong(&field, what));
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
