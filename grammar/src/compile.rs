//! [`Grammars`]: from a grammar to a [`Guide`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use baton_proto::grammar::Grammar;
use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::expressions;
use crate::guide::Guide;
use crate::vocabulary::Vocabulary;

/// Compiled grammars that are kept.
const MAX_KEPT: usize = 64;
/// What of a compiled grammar's lexer is built as texts need it: about 1 KiB each.
const MAX_LEXER_STATES: usize = 50_000;
/// Symbols of a grammar's productions; the largest JSON schemas in use have 200,000.
const MAX_GRAMMAR_SYMBOLS: usize = 250_000;
/// Between the parts of a JSON document. Bounded, or a weak model might never end one.
const JSON_BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,32}";
/// JSON Schema's extension for llguidance's own options.
const OPTIONS: &str = "x-guidance";

/// A grammar cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is malformed, uses what there is no support for, or is too large: it would fail anywhere.
    #[error("{0}")]
    Unusable(String),
    /// The text has left it, or it has become too complex on the way.
    #[error("the output cannot follow its grammar: {0}")]
    Lost(String),
}

/// Compiles grammars for one vocabulary, and keeps the last ones.
pub struct Grammars {
    factory: ParserFactory,
    /// Words of a mask.
    words: usize,
    /// Fresh ones, used last at the end.
    kept: Mutex<VecDeque<(Arc<Grammar>, Matcher)>>,
}

impl Grammars {
    /// For a model of `vocab_size` tokens; what the vocabulary lacks of them is never text.
    #[must_use]
    pub fn new(vocabulary: &Vocabulary, vocab_size: usize) -> Self {
        let mut bytes = vocabulary.bytes().to_vec();
        bytes.resize(vocab_size, Vec::new());
        // Where a text may end is said by each request's own tokens.
        let info = TokRxInfo::new(vocab_size as u32, INVALID_TOKEN);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &bytes)));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices);
        let mut factory = factory.expect("the slices are regular expressions");
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: MAX_LEXER_STATES,
            max_grammar_size: MAX_GRAMMAR_SYMBOLS,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Self { factory, words: vocab_size.div_ceil(32), kept: Mutex::default() }
    }

    /// A guide for a text that has not begun. Takes milliseconds if the grammar is not kept.
    ///
    /// # Errors
    /// If the grammar is malformed, too large or too complex, or asks for what is not supported.
    pub fn guide(&self, grammar: &Arc<Grammar>) -> Result<Guide, GrammarError> {
        if let Some(matcher) = self.kept(grammar) {
            return Ok(Guide::new(matcher, self.words));
        }
        let unusable = |error: String| GrammarError::Unusable(error);
        let top = top_level(grammar).map_err(unusable)?;
        let mut matcher = Matcher::new(self.factory.create_parser(top));
        if let Some(error) = matcher.get_error() {
            return Err(unusable(first_lines(&error)));
        }
        // They say what would not be followed.
        if let Some(warning) = matcher.grammar_warnings().into_iter().next() {
            return Err(unusable(first_lines(&warning)));
        }
        // One that nothing can follow is found out here, and what it takes is taken here.
        if let Err(error) = matcher.clone().compute_mask()
            && !matcher.is_accepting().unwrap_or(false)
        {
            return Err(unusable(format!(
                "nothing can follow it: {}",
                first_lines(&error.to_string())
            )));
        }
        self.keep(grammar, &matcher);
        Ok(Guide::new(matcher, self.words))
    }

    /// Whether a guide is at hand.
    #[must_use]
    pub fn keeps(&self, grammar: &Grammar) -> bool {
        self.lock().iter().any(|(kept, _)| **kept == *grammar)
    }

    /// Lets the next guide be compiled afresh: what sequences share of this grammar has grown too
    /// large.
    pub fn forget(&self, grammar: &Grammar) {
        self.lock().retain(|(kept, _)| **kept != *grammar);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(Arc<Grammar>, Matcher)>> {
        // Every change is complete before anything can panic.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self, grammar: &Grammar) -> Option<Matcher> {
        let mut kept = self.lock();
        let at = kept.iter().position(|(kept, _)| **kept == *grammar)?;
        let entry = kept.remove(at)?;
        let matcher = entry.1.clone();
        kept.push_back(entry);
        Some(matcher)
    }

    fn keep(&self, grammar: &Arc<Grammar>, matcher: &Matcher) {
        let mut kept = self.lock();
        // Another thread may have compiled it meanwhile.
        kept.retain(|(kept, _)| kept != grammar);
        if kept.len() == MAX_KEPT {
            kept.pop_front();
        }
        kept.push_back((grammar.clone(), matcher.clone()));
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("kept", &self.lock().len()).finish_non_exhaustive()
    }
}

fn top_level(grammar: &Grammar) -> Result<TopLevelGrammar, String> {
    Ok(match grammar {
        Grammar::JsonSchema(schema) => {
            let schema = serde_json::from_str(schema);
            json_schema(schema.map_err(|error| format!("the schema is no JSON: {error}"))?)?
        }
        Grammar::JsonObject => json_schema(json!({"type": "object"}))?,
        Grammar::Regex(regex) => {
            expressions::check(regex)?;
            TopLevelGrammar::from_regex(regex)
        }
        Grammar::Choice(texts) => {
            let quoted: Vec<_> = texts.iter().map(|text| json!(text).to_string()).collect();
            TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
        }
        Grammar::Lark(lark) => {
            expressions::check(lark)?;
            TopLevelGrammar::from_lark(lark.clone())
        }
    })
}

/// A schema may set `x-guidance` itself; that it is not lenient then is what makes every document
/// valid.
fn json_schema(mut schema: Value) -> Result<TopLevelGrammar, String> {
    expressions::check_patterns(&schema)?;
    if let Value::Object(fields) = &mut schema {
        let options = fields.entry(OPTIONS).or_insert(json!({"whitespace_pattern": JSON_BLANKS}));
        for option in ["lenient", "coerce_one_of"] {
            if options[option] == Value::Bool(true) {
                return Err(format!("{OPTIONS}.{option} is not supported"));
            }
        }
    }
    Ok(TopLevelGrammar::from_grammar(GrammarWithLexer::from_json_schema(schema)))
}

/// What of an error is worth a client's while.
fn first_lines(error: &str) -> String {
    let error = error.split("<non-verbose/>").next().unwrap_or_default().trim();
    if error.starts_with("panic:") {
        return "it is not supported".to_owned();
    }
    error.chars().take(1000).collect()
}
