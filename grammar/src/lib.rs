//! Structured output: which tokens may follow, so that a text obeys a [`Grammar`].
//!
//! The coordinator compiles grammars to refuse bad ones; nodes compile them to [guide](Guide)
//! sequences. Both read the tokenizer's vocabulary alone, and the work is llguidance's.
//!
//! [`Grammar`]: baton_proto::grammar::Grammar

mod compile;
mod expressions;
mod guide;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use compile::{GrammarError, Grammars};
pub use guide::{Ends, Guide, TokenMask};
pub use vocabulary::{Vocabulary, VocabularyError};
