//! [`Vocabulary`]: the bytes that each token of a `tokenizer.json` stands for.

use serde_json::Value;

/// The longest token that a text may have; the trie's nodes cannot count further.
const MAX_TOKEN_BYTES: usize = 1000;

/// A tokenizer whose tokens' bytes cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// The file is no JSON.
    #[error("tokenizer.json: {0}")]
    Json(String),
    /// It lacks a part.
    #[error("tokenizer.json: {0} is missing or malformed")]
    Malformed(&'static str),
    /// It is of a kind whose tokens are not sequences of bytes.
    #[error("tokenizer.json: the decoder is neither ByteLevel nor one of sentencepiece's")]
    Unsupported,
}

/// By token: the bytes that it adds to a text; none for special tokens, which are no text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    bytes: Vec<Vec<u8>>,
}

/// How the text of a token is written in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// Each character stands for a byte (GPT-2).
    ByteLevel,
    /// As it is, but for `▁`, a blank, and `<0x0A>`, a byte (sentencepiece).
    Sentencepiece,
}

impl Vocabulary {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If the bytes of its tokens cannot be told.
    pub fn parse(tokenizer_json: &str) -> Result<Self, VocabularyError> {
        let file: Value = serde_json::from_str(tokenizer_json)
            .map_err(|error| VocabularyError::Json(error.to_string()))?;
        let spelling = spelling(&file["decoder"]).ok_or(VocabularyError::Unsupported)?;
        let mut vocabulary = Self { bytes: Vec::new() };
        for (token, id) in tokens(&file["model"]["vocab"])? {
            let bytes = match spelling {
                // A token that is no bytes is never sampled as text.
                Spelling::ByteLevel => byte_level(token).unwrap_or_default(),
                Spelling::Sentencepiece => sentencepiece(token),
            };
            vocabulary.set(id, bytes);
        }
        // They are in the vocabulary too, or not; what is said here counts.
        for added in file["added_tokens"].as_array().into_iter().flatten() {
            let malformed = VocabularyError::Malformed("added_tokens");
            let (id, content) = (id(&added["id"]), added["content"].as_str());
            let (Some(id), Some(content)) = (id, content) else { return Err(malformed) };
            let special = added["special"] == Value::Bool(true);
            vocabulary.set(id, if special { Vec::new() } else { content.as_bytes().to_vec() });
        }
        Ok(vocabulary)
    }

    /// The bytes of every token, by id.
    #[must_use]
    pub fn bytes(&self) -> &[Vec<u8>] {
        &self.bytes
    }

    fn set(&mut self, id: usize, bytes: Vec<u8>) {
        if self.bytes.len() <= id {
            self.bytes.resize(id + 1, Vec::new());
        }
        self.bytes[id] = if bytes.len() > MAX_TOKEN_BYTES { Vec::new() } else { bytes };
    }
}

/// A token id, of a vocabulary that is not absurdly large.
fn id(value: &Value) -> Option<usize> {
    value.as_u64().filter(|id| *id < 1 << 22).map(|id| id as usize)
}

/// `{"token": id}`, or of Unigram models `[["token", score]]`.
fn tokens(vocab: &Value) -> Result<Vec<(&str, usize)>, VocabularyError> {
    let tokens: Option<Vec<_>> = match vocab {
        Value::Object(tokens) => {
            tokens.iter().map(|(token, value)| Some((token.as_str(), id(value)?))).collect()
        }
        Value::Array(tokens) => {
            let tokens = tokens.iter().enumerate();
            tokens.map(|(id, entry)| Some((entry.get(0)?.as_str()?, id))).collect()
        }
        _ => None,
    };
    tokens.ok_or(VocabularyError::Malformed("model.vocab"))
}

fn spelling(decoder: &Value) -> Option<Spelling> {
    match decoder["type"].as_str()? {
        "ByteLevel" => Some(Spelling::ByteLevel),
        "ByteFallback" | "Metaspace" => Some(Spelling::Sentencepiece),
        "Sequence" => decoder["decoders"].as_array()?.iter().find_map(spelling),
        _ => None,
    }
}

fn sentencepiece(token: &str) -> Vec<u8> {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match hex.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace('▁', " ").into_bytes(),
    }
}

/// None if a character stands for no byte.
fn byte_level(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

/// The byte that a character stands for in GPT-2's vocabulary: printable ones of Latin-1 for
/// themselves, and from U+0100 on the others in their order.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(character) {
        code @ 0..=0xff => Some(code as u8).filter(|byte| printable(*byte)),
        code => (0..=0xff).filter(|byte| !printable(*byte)).nth(code as usize - 0x100),
    }
}
