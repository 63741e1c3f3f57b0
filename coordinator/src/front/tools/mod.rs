//! Calls of tools in a model's output.
//!
//! A model that was trained to call tools writes a call as text, in the format that its chat
//! template teaches. Parsers find such calls while the text comes; pure, like
//! [`super::stop::StopMatcher`].

pub(crate) mod definition;
pub(crate) mod request;

mod answer;
mod call;
mod json;
mod parser;
mod reader;

pub(crate) use reader::OutputReader;

pub use answer::{Answer, Part, ToolCall};
pub use parser::{Piece, ToolParser};

/// How a model writes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them, with text around
    /// them: Hermes, Qwen 2.5 and Qwen 3.
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole output, several with `;` between them, or
    /// anywhere behind `<|python_tag|>`: Llama 3.1 to 3.3.
    Llama3,
}

impl ToolFormat {
    /// The format that a chat template teaches; `None` if it teaches none that is known here.
    #[must_use]
    pub fn of_template(source: &str) -> Option<Self> {
        let has = |text: &str| source.contains(text);
        // Qwen 3 Coder writes XML between the marks that Hermes writes JSON between.
        if has(Self::Hermes.mark()) && !has("<function=") {
            Some(Self::Hermes)
        } else if has("ipython") && has("\"parameters\"") {
            Some(Self::Llama3)
        } else {
            None
        }
    }

    /// What a call begins with, if it is marked.
    #[must_use]
    pub fn mark(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama3 => "<|python_tag|>",
        }
    }

    /// What a call ends with.
    #[must_use]
    pub fn end_mark(self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some("</tool_call>"),
            Self::Llama3 => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::fixtures::golden_text;

    #[test]
    fn knows_the_format_by_the_template() {
        for set in golden_text("templates.json").as_array().unwrap() {
            let expected = match set["name"].as_str().unwrap() {
                "qwen3" | "hermes" => Some(ToolFormat::Hermes),
                "llama3" | "llama31" => Some(ToolFormat::Llama3),
                _ => None,
            };
            let found = ToolFormat::of_template(set["template"].as_str().unwrap());
            assert_eq!(found, expected, "{}", set["name"]);
        }
        assert_eq!(ToolFormat::of_template("<tool_call>\n<function={{ f }}>"), None);
    }
}
