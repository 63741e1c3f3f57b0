//! [`Grammar`]: what an output has to follow.

use crate::sampling::InvalidSampling;

/// Most bytes of a grammar, all alternatives together.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;
/// Most alternatives of a choice.
pub const MAX_ALTERNATIVES: usize = 1024;

/// The texts that an output may be. In range once [`Grammar::check`] accepts it; whether it is one
/// at all, a compiler says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grammar {
    /// JSON that is valid under this schema.
    JsonSchema(String),
    /// A JSON object.
    JsonObject,
    /// What this regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// What a context-free grammar derives, in llguidance's variant of Lark's syntax.
    Lark(String),
}

impl Grammar {
    /// Checks its size.
    pub fn check(&self) -> Result<(), InvalidSampling> {
        let field = "structured_output";
        let wrong = |value: String, limit: String| Err(InvalidSampling { field, value, limit });
        let bytes = match self {
            Self::JsonObject => return Ok(()),
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(texts) if !(1..=MAX_ALTERNATIVES).contains(&texts.len()) => {
                let limit = format!("a choice of 1 to {MAX_ALTERNATIVES} texts");
                return wrong(format!("a choice of {}", texts.len()), limit);
            }
            Self::Choice(texts) => texts.iter().map(String::len).sum(),
        };
        if (1..=MAX_GRAMMAR_BYTES).contains(&bytes) {
            return Ok(());
        }
        wrong(format!("{bytes} bytes long"), format!("from 1 to {MAX_GRAMMAR_BYTES} bytes long"))
    }
}
