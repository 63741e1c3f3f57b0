//! Between text and token ids.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::models::ModelFileError;
use super::pieces::Pieces;

/// A model's tokenizer, as its `tokenizer.json` describes it.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens that are no text: ends of turns and the like.
    special: HashSet<u32>,
    /// Between single tokens and bytes.
    pieces: Pieces,
}

/// The text cannot be tokenized.
#[derive(Debug, thiserror::Error)]
#[error("the text cannot be tokenized: {0}")]
pub struct EncodeError(String);

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn load(path: &Path) -> Result<Self, ModelFileError> {
        let fail = |e: tokenizers::Error| ModelFileError::new(path, e);
        let mut inner = tokenizers::Tokenizer::from_file(path).map_err(fail)?;
        // Both are settings of training; a prompt is neither cut nor filled up.
        inner.with_truncation(None).map_err(fail)?;
        inner.with_padding(None);
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special);
        let special = special.map(|(&id, _)| id).collect();
        let pieces = Pieces::new(&inner);
        Ok(Self { inner, special, pieces })
    }

    /// Token ids of a text. `add_special_tokens` puts around it what the model expects around a
    /// plain prompt, mostly a token for the beginning; a chat template has done so itself.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, EncodeError> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|e| EncodeError(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Whether a text is one special token.
    #[must_use]
    pub fn is_special(&self, text: &str) -> bool {
        self.inner.token_to_id(text).is_some_and(|id| self.special.contains(&id))
    }

    /// Whether every token id means the same to both.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        self.inner.get_vocab(true) == other.inner.get_vocab(true)
    }

    /// The bytes that a token stands for, whatever its neighbours; of a special token, its name.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.pieces.bytes(id, &self.inner)
    }

    /// The text of token ids, special tokens left out. Bytes that are no UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.text(ids, true)
    }

    /// The same with special tokens.
    #[must_use]
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        self.text(ids, false)
    }

    fn text(&self, ids: &[u32], skip_special: bool) -> String {
        // A decoder made of regular expressions can fail; such a token has no text.
        self.inner.decode(ids, skip_special).unwrap_or_default()
    }
}

/// Turns the tokens of one output into text as they come. A token's text depends on its
/// neighbours (a character may be cut between tokens, a leading space may belong to the token),
/// so tokens are decoded together with the settled ones before them, and what ends in an
/// incomplete character waits for the next token.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Special tokens have no text, and none of them is in the window.
    skip_special: bool,
    /// A window over the sequence: settled tokens, then those that wait.
    window: Vec<u32>,
    /// How many tokens of the window have settled.
    settled: usize,
}

/// So many tokens of the prompt give the first output token its neighbours.
const PROMPT_TOKENS: usize = 6;
/// A prompt's window is made longer by this many tokens to begin with a whole character.
const MAX_EXTRA_PROMPT_TOKENS: usize = 8;
/// More tokens than these are no incomplete character but nonsense, which must not wait for ever.
const MAX_WAITING_TOKENS: usize = 12;

impl Detokenizer {
    /// Begins after `prompt`.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], skip_special: bool) -> Self {
        let text = prompt.iter().rev().filter(|id| !tokenizer.special.contains(id));
        let mut window: Vec<u32> =
            text.take(PROMPT_TOKENS + MAX_EXTRA_PROMPT_TOKENS).copied().collect();
        window.reverse();
        let most = window.len().saturating_sub(PROMPT_TOKENS);
        let whole = |&skip: &usize| !tokenizer.decode(&window[skip..]).starts_with('\u{fffd}');
        let skip = (0..=most).rev().find(whole).unwrap_or(most);
        window.drain(..skip);
        Self { settled: window.len(), tokenizer, skip_special, window }
    }

    /// Takes the next token and appends the text that it completes.
    pub fn push(&mut self, token: u32, out: &mut String) {
        if self.skip_special && self.tokenizer.special.contains(&token) {
            return;
        }
        self.window.push(token);
        let text = self.text(&self.window);
        let waiting = self.window.len() - self.settled;
        if !text.ends_with('\u{fffd}') {
            self.settle(self.window.len(), out);
        } else if waiting > MAX_WAITING_TOKENS {
            self.settle(self.whole_tokens(&text), out);
        }
    }

    /// How many tokens of the window, which decodes to `text`, come before a character that may
    /// still be completed: its bytes are in the last three tokens.
    fn whole_tokens(&self, text: &str) -> usize {
        let characters = |tokens: &[u32]| self.text(tokens).chars().count();
        let (length, all) = (self.window.len(), text.chars().count());
        let cuts =
            |&at: &usize| characters(&self.window[..at]) + characters(&self.window[at..]) == all;
        (length - 3..length).find(cuts).unwrap_or(length)
    }

    /// Ends the output: what is still incomplete is appended as U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        self.settle(self.window.len(), out);
    }

    /// Appends the text of the window's first `tokens` tokens, as far as it is new.
    fn settle(&mut self, tokens: usize, out: &mut String) {
        let text = self.text(&self.window[..tokens]);
        let known = self.text(&self.window[..self.settled]);
        // By characters and not by bytes: nonsense that was settled may decode differently now.
        out.extend(text.chars().skip(known.chars().count()));
        self.window.drain(..self.settled);
        self.settled = tokens - self.settled;
    }

    fn text(&self, ids: &[u32]) -> String {
        self.tokenizer.text(ids, self.skip_special)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::front::fixtures::{self, golden_text};

    fn tokenizer() -> Arc<Tokenizer> {
        Arc::new(fixtures::tokenizer())
    }

    fn piecewise(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32]) -> String {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt, true);
        let mut out = String::new();
        for &id in ids {
            detokenizer.push(id, &mut out);
        }
        detokenizer.finish(&mut out);
        out
    }

    #[test]
    fn cuts_and_joins_text_as_transformers_does() {
        let tokenizer = tokenizer();
        for case in golden_text("tokenizer.json").as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
            let decoded = &case["decoded_without_special"];
            assert_eq!(&Value::from(tokenizer.decode(&ids)), decoded);
            assert_eq!(&Value::from(piecewise(&tokenizer, &[], &ids)), decoded);
        }
    }

    #[test]
    fn a_character_waits_until_it_is_whole() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("a🚚b", false).unwrap();
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &[], true);
        for &id in &ids {
            let mut out = String::new();
            detokenizer.push(id, &mut out);
            assert!(!out.contains('\u{fffd}'), "half a character was emitted: {out:?}");
        }
        let bytes_of_truck = &ids[1..ids.len() - 1];
        assert!(bytes_of_truck.len() > 1, "the demo tokenizer knows this character");
        // A prompt may end within a character, too, and its text begin within one.
        assert_eq!(piecewise(&tokenizer, &ids, &ids), "a🚚b");
        assert_eq!(piecewise(&tokenizer, bytes_of_truck, &ids), "a🚚b");
    }

    #[test]
    fn a_character_after_nonsense_is_whole() {
        let tokenizer = tokenizer();
        let truck = tokenizer.encode("🚚", false).unwrap();
        for nonsense in 0..30 {
            let mut ids = vec![truck[0]; nonsense];
            ids.extend(&truck);
            assert_eq!(
                piecewise(&tokenizer, &[], &ids),
                tokenizer.decode(&ids),
                "after {nonsense}"
            );
        }
    }

    #[test]
    fn nonsense_does_not_wait_for_ever() {
        let tokenizer = tokenizer();
        let first_byte = tokenizer.encode("🚚", false).unwrap()[0];
        let mut detokenizer = Detokenizer::new(tokenizer, &[], true);
        let mut out = String::new();
        for _ in 0..1000 {
            detokenizer.push(first_byte, &mut out);
            assert!(detokenizer.window.len() <= 2 * MAX_WAITING_TOKENS + 2);
        }
        assert!(out.chars().count() > 900);
    }

    proptest! {
        #[test]
        fn any_text_comes_back_piece_by_piece(prompt in "\\PC{0,12}", text in "\\PC{0,40}") {
            let tokenizer = tokenizer();
            let prompt = tokenizer.encode(&prompt, false).unwrap();
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(piecewise(&tokenizer, &prompt, &ids), tokenizer.decode(&ids));
        }
    }
}
