//! Log-probabilities as the two endpoints show them.

use baton_proto::wire::v1::TokenLogprobs;
use serde_json::{Map, Value, json};

use crate::front::text::Tokenizer;

/// JSON has no minus infinity; OpenAI says this for a token that could not be.
const LEAST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(LEAST)
}

/// `logprobs` of a part of a chat completion.
pub(crate) fn chat(tokens: &[TokenLogprobs], tokenizer: &Tokenizer) -> Value {
    let one = |id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(id);
        json!({
            "token": String::from_utf8_lossy(&bytes),
            "logprob": finite(logprob),
            "bytes": bytes,
        })
    };
    let entry = |token: &TokenLogprobs| {
        let mut entry = one(token.token_id, token.logprob);
        let top = token.top.iter().map(|top| one(top.token_id, top.logprob));
        entry["top_logprobs"] = top.collect();
        entry
    };
    json!({"content": tokens.iter().map(entry).collect::<Vec<_>>(), "refusal": null})
}

/// `logprobs` of a text completion, which grow with it.
#[derive(Debug, Default)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
    /// Characters of all tokens so far, those of earlier parts too.
    characters: usize,
}

impl TextLogprobs {
    /// Adds a token without anything before it, which has no probability.
    pub(crate) fn first(&mut self, id: u32, tokenizer: &Tokenizer) {
        self.token(id, tokenizer);
        self.token_logprobs.push(None);
        self.top_logprobs.push(Value::Null);
    }

    pub(crate) fn add(&mut self, tokens: &[TokenLogprobs], tokenizer: &Tokenizer) {
        for token in tokens {
            self.token(token.token_id, tokenizer);
            self.token_logprobs.push(Some(finite(token.logprob)));
            // The token itself is among them, however unlikely it was.
            let itself = (token.token_id, token.logprob);
            let top = token.top.iter().map(|top| (top.token_id, top.logprob));
            let mut all = Map::new();
            for (id, logprob) in top.chain([itself]) {
                let name = name(&tokenizer.token_bytes(id));
                all.entry(name).or_insert_with(|| json!(finite(logprob)));
            }
            self.top_logprobs.push(Value::Object(all));
        }
    }

    fn token(&mut self, id: u32, tokenizer: &Tokenizer) {
        let bytes = tokenizer.token_bytes(id);
        self.text_offset.push(self.characters);
        // Every character begins with a byte that continues none.
        self.characters += bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
        self.tokens.push(name(&bytes));
    }

    /// What was added since the last call.
    pub(crate) fn part(&mut self) -> Value {
        let characters = self.characters;
        let part = std::mem::replace(self, Self { characters, ..Self::default() });
        json!({
            "tokens": part.tokens,
            "token_logprobs": part.token_logprobs,
            "top_logprobs": part.top_logprobs,
            "text_offset": part.text_offset,
        })
    }
}

/// A token as text; one that is a part of a character as OpenAI writes it, so that no two tokens
/// have one name.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
            format!("bytes:{}", hex.collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::v1::TokenLogprob;

    use super::*;
    use crate::front::fixtures;

    /// Each token with the one after it as its alternative.
    fn tokens(text: &str) -> (Tokenizer, Vec<TokenLogprobs>) {
        let tokenizer = fixtures::tokenizer();
        let ids = tokenizer.encode(text, false).unwrap();
        let token = |&id: &u32| TokenLogprobs {
            token_id: id,
            logprob: f32::NEG_INFINITY,
            top: vec![TokenLogprob { token_id: id + 1, logprob: -0.5 }],
        };
        let tokens = ids.iter().map(token).collect();
        (tokenizer, tokens)
    }

    #[test]
    fn bytes_of_a_cut_character_are_told() {
        let (tokenizer, tokens) = tokens("a🚚");
        let json = chat(&tokens, &tokenizer);
        let content = json["content"].as_array().unwrap();
        let bytes: Vec<u8> = content
            .iter()
            .flat_map(|entry| entry["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert_eq!(bytes, "a🚚".as_bytes());
        assert_eq!(content[0]["logprob"], -9999.0);
        assert_eq!(content[0]["top_logprobs"][0]["logprob"], -0.5);
    }

    #[test]
    fn offsets_count_characters_and_go_on_from_part_to_part() {
        let (tokenizer, tokens) = tokens("é🚚x");
        let mut logprobs = TextLogprobs::default();
        logprobs.first(tokens[0].token_id, &tokenizer);
        let first = logprobs.part();
        assert_eq!(
            (&first["token_logprobs"], &first["top_logprobs"]),
            (&json!([null]), &json!([null]))
        );
        logprobs.add(&tokens[1..], &tokenizer);
        let rest = logprobs.part();
        assert_eq!(rest["text_offset"].as_array().unwrap().last().unwrap(), 2);
        let names: Vec<_> = rest["tokens"].as_array().unwrap().iter().collect();
        let cut = names.iter().filter(|name| name.as_str().unwrap().starts_with("bytes:\\x"));
        assert!(cut.count() > 1, "{names:?}");
        for (name, top) in names.iter().zip(rest["top_logprobs"].as_array().unwrap()) {
            assert_eq!(top[name.as_str().unwrap()], -9999.0, "the token itself is in {top}");
        }
    }
}
