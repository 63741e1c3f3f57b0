//! The bytes of single tokens. A vocabulary does not hold them as they are: byte-level ones write
//! each byte as a printable character, those of SentencePiece a space as `▁` and a byte that is no
//! text as `<0x0A>`.

use std::collections::HashMap;

use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;

/// How a vocabulary writes bytes.
pub(super) struct Pieces {
    byte_level: bool,
    /// Tokens that were added to the vocabulary are written as they are.
    added: HashMap<u32, String>,
}

impl Pieces {
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        let is = |decoder: &DecoderWrapper| matches!(decoder, DecoderWrapper::ByteLevel(_));
        let byte_level = match tokenizer.get_decoder() {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders().iter().any(is),
            decoder => decoder.is_some_and(is),
        };
        let added = tokenizer.get_added_tokens_decoder().into_iter();
        Self { byte_level, added: added.map(|(id, token)| (id, token.content)).collect() }
    }

    /// Empty for an id without a token.
    pub(super) fn bytes(&self, id: u32, tokenizer: &Tokenizer) -> Vec<u8> {
        if let Some(text) = self.added.get(&id) {
            return text.clone().into_bytes();
        }
        let Some(piece) = tokenizer.id_to_token(id) else {
            return Vec::new();
        };
        if self.byte_level {
            return piece.chars().flat_map(byte_level).collect();
        }
        match piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
            Some(hex) if hex.len() == 2 => match u8::from_str_radix(hex, 16) {
                Ok(byte) => vec![byte],
                Err(_) => piece.into_bytes(),
            },
            _ => piece.replace('▁', " ").into_bytes(),
        }
    }
}

/// The byte that a character of a byte-level vocabulary stands for, as GPT-2 defined it: printable
/// ones of Latin-1 for themselves, and those from U+0100 for the others in turn.
fn byte_level(character: char) -> Vec<u8> {
    let code = character as u32;
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return character.to_string().into_bytes(),
    };
    vec![byte as u8]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front::fixtures::{self, golden_text};

    #[test]
    fn a_text_is_the_bytes_of_its_tokens() {
        let tokenizer = fixtures::tokenizer();
        for case in golden_text("tokenizer.json").as_array().unwrap() {
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
            let text = tokenizer.decode_with_special(&ids);
            assert_eq!(String::from_utf8_lossy(&bytes), text, "{ids:?}");
        }
    }

    #[test]
    fn every_byte_has_one_character() {
        let one = |code: u32| match byte_level(char::from_u32(code).unwrap())[..] {
            [byte] => Some(byte),
            _ => None,
        };
        let mut bytes: Vec<u8> =
            (0x21..0x200).filter(|&code| code != 0x7f).filter_map(one).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_level('Ġ'), byte_level('Ċ')), (b" ".to_vec(), b"\n".to_vec()));
    }
}
