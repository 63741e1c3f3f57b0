//! Validated sampling parameters, as nodes use them.

use std::sync::Arc;

use crate::grammar::Grammar;

/// Most alternatives that log-probabilities may be asked for.
pub const MAX_LOGPROBS: u32 = 20;
/// Most entries of a logit bias.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most stop token ids, end-of-sequence tokens not counted.
pub const MAX_STOP_TOKENS: usize = 64;

/// How the next token is chosen. Complete and in range once [`SamplingParams::check`] accepts it.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; up to 2.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens that together reach this probability; in (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest one; in [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; above 0.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens seen in the output; -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens; -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Fixes the outcome: the same request gives the same tokens anywhere.
    pub seed: u64,
    /// Most output tokens, over all attempts; at least 1.
    pub max_tokens: u32,
    /// No stop token and no end of sequence before this many output tokens.
    pub min_tokens: u32,
    /// Tokens that end the sequence; empty when the request ignores them.
    pub eos_token_ids: Vec<u32>,
    /// Further tokens that end the sequence.
    pub stop_token_ids: Vec<u32>,
    /// Log-probabilities of output tokens with this many alternatives.
    pub logprobs: Option<u32>,
    /// The same for the prompt; the prefix cache is then not read.
    pub prompt_logprobs: Option<u32>,
    /// What the output has to follow. Its end is an end-of-sequence token, of which there is at
    /// least one. Where nothing else may follow, `min_tokens` does not keep it from ending.
    pub grammar: Option<Arc<Grammar>>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            eos_token_ids: Vec::new(),
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
        }
    }
}

/// A sampling parameter is out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}; it must be {limit}")]
pub struct InvalidSampling {
    /// The field's name in the API.
    pub field: &'static str,
    /// What was given.
    pub value: String,
    /// What is allowed.
    pub limit: String,
}

impl SamplingParams {
    /// Checks every field; `vocab_size` bounds the token ids.
    pub fn check(&self, vocab_size: u32) -> Result<(), InvalidSampling> {
        let number = |field, value: f32, fine: bool, limit: &str| {
            if fine && value.is_finite() {
                return Ok(());
            }
            Err(InvalidSampling { field, value: value.to_string(), limit: limit.to_owned() })
        };
        let t = self.temperature;
        number("temperature", t, (0.0..=2.0).contains(&t), "from 0 to 2")?;
        let p = self.top_p;
        number("top_p", p, p > 0.0 && p <= 1.0, "above 0 and at most 1")?;
        number("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1")?;
        let r = self.repetition_penalty;
        number("repetition_penalty", r, r > 0.0, "above 0")?;
        for (field, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            number(field, value, (-2.0..=2.0).contains(&value), "from -2 to 2")?;
        }
        self.check_counts()?;
        self.check_grammar()?;
        self.check_tokens(vocab_size)
    }

    fn check_grammar(&self) -> Result<(), InvalidSampling> {
        let Some(grammar) = &self.grammar else { return Ok(()) };
        if self.eos_token_ids.is_empty() {
            let limit = "absent where no token ends a sequence".to_owned();
            let value = "given".to_owned();
            return Err(InvalidSampling { field: "structured_output", value, limit });
        }
        grammar.check()
    }

    fn check_counts(&self) -> Result<(), InvalidSampling> {
        let count = |field, value: u64, fine: bool, limit: String| {
            if fine {
                return Ok(());
            }
            Err(InvalidSampling { field, value: value.to_string(), limit })
        };
        count("max_tokens", self.max_tokens.into(), self.max_tokens > 0, "at least 1".into())?;
        let fine = self.min_tokens <= self.max_tokens;
        let limit = format!("at most max_tokens ({})", self.max_tokens);
        count("min_tokens", self.min_tokens.into(), fine, limit)?;
        for (field, value) in
            [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)]
        {
            let value = value.unwrap_or(0);
            let fine = value <= MAX_LOGPROBS;
            count(field, value.into(), fine, format!("at most {MAX_LOGPROBS}"))?;
        }
        let (length, most) = (self.logit_bias.len(), MAX_LOGIT_BIAS);
        count("logit_bias", length as u64, length <= most, format!("at most {most} entries"))?;
        let (length, most) = (self.stop_token_ids.len(), MAX_STOP_TOKENS);
        count("stop_token_ids", length as u64, length <= most, format!("at most {most} ids"))
    }

    fn check_tokens(&self, vocab_size: u32) -> Result<(), InvalidSampling> {
        let below = format!("token ids below the vocabulary size ({vocab_size})");
        let outside = |field, token: u32| {
            Err(InvalidSampling { field, value: token.to_string(), limit: below.clone() })
        };
        for &(token, bias) in &self.logit_bias {
            if token >= vocab_size {
                return outside("logit_bias", token);
            }
            if !(-100.0..=100.0).contains(&bias) {
                let limit = "from -100 to 100".to_owned();
                return Err(InvalidSampling {
                    field: "logit_bias",
                    value: format!("{bias} for token {token}"),
                    limit,
                });
            }
        }
        match self.stop_token_ids.iter().find(|&&token| token >= vocab_size) {
            Some(&token) => outside("stop_token_ids", token),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::MAX_GRAMMAR_BYTES;

    #[test]
    fn names_the_field_and_the_limit() {
        type Change = fn(&mut SamplingParams);
        let cases: [(Change, &str); 8] = [
            (|p| p.temperature = 2.5, "temperature is 2.5; it must be from 0 to 2"),
            (|p| p.temperature = f32::NAN, "temperature is NaN; it must be from 0 to 2"),
            (|p| p.top_p = 0.0, "top_p is 0; it must be above 0 and at most 1"),
            (
                |p| p.repetition_penalty = f32::INFINITY,
                "repetition_penalty is inf; it must be above 0",
            ),
            (|p| p.max_tokens = 0, "max_tokens is 0; it must be at least 1"),
            (|p| p.min_tokens = 17, "min_tokens is 17; it must be at most max_tokens (16)"),
            (|p| p.logprobs = Some(21), "logprobs is 21; it must be at most 20"),
            (
                |p| p.logit_bias = vec![(10, 1.0)],
                "logit_bias is 10; it must be token ids below the vocabulary size (10)",
            ),
        ];
        for (change, message) in cases {
            let mut params = SamplingParams::default();
            change(&mut params);
            assert_eq!(params.check(10).unwrap_err().to_string(), message);
        }
        SamplingParams::default().check(10).unwrap();
    }

    #[test]
    fn a_grammar_has_a_size_and_an_end() {
        let check = |grammar: Grammar, eos: &[u32]| {
            let (grammar, eos_token_ids) = (Some(Arc::new(grammar)), eos.to_vec());
            let params = SamplingParams { grammar, eos_token_ids, ..SamplingParams::default() };
            params.check(10).map_err(|error| error.to_string())
        };
        let refused = |grammar, message: &str| {
            assert_eq!(
                check(grammar, &[1]).unwrap_err(),
                format!("structured_output is {message}")
            );
        };
        let long = "x".repeat(MAX_GRAMMAR_BYTES + 1);
        let bytes = "65537 bytes long; it must be from 1 to 65536 bytes long";
        refused(Grammar::Regex(long.clone()), bytes);
        refused(Grammar::Choice(vec![long]), bytes);
        let none = "0 bytes long; it must be from 1 to 65536 bytes long";
        refused(Grammar::Lark(String::new()), none);
        refused(Grammar::Choice(vec![]), "a choice of 0; it must be a choice of 1 to 1024 texts");
        assert_eq!(check(Grammar::JsonSchema("{}".into()), &[1]), Ok(()));
        let endless =
            "structured_output is given; it must be absent where no token ends a sequence";
        assert_eq!(check(Grammar::JsonObject, &[]).unwrap_err(), endless);
    }
}
