//! What a request has used so far.

use baton_proto::wire::v1::GenerateResponse;
use serde_json::{Value, json};

/// Counts tokens of all completions of a request.
#[derive(Debug)]
pub(crate) struct Tally {
    /// Completions of one prompt: its tokens count once.
    per_prompt: u32,
    prompt_tokens: usize,
    cached_tokens: u32,
    completion_tokens: usize,
}

impl Tally {
    /// Of `prompts`, each with so many completions.
    pub(crate) fn new(prompts: &[Vec<u32>], per_prompt: u32) -> Self {
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        Self { per_prompt, prompt_tokens, cached_tokens: 0, completion_tokens: 0 }
    }

    pub(crate) fn take(&mut self, message: &GenerateResponse) {
        self.completion_tokens += message.token_ids.len();
        let usage = message.finished.as_ref().and_then(|finished| finished.usage);
        if let (Some(usage), 0) = (usage, message.choice % self.per_prompt) {
            self.cached_tokens += usage.cached_tokens;
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::v1::{Finished, Usage};

    use super::*;

    #[test]
    fn a_prompt_with_several_completions_counts_once() {
        let mut tally = Tally::new(&[vec![1; 5], vec![1; 7]], 2);
        for choice in 0..4 {
            let usage = Usage { cached_tokens: 3, ..Usage::default() };
            let finished = Finished { usage: Some(usage), ..Finished::default() };
            let response = GenerateResponse { choice, ..GenerateResponse::default() };
            tally.take(&GenerateResponse { token_ids: vec![1, 2], ..response.clone() });
            tally.take(&GenerateResponse { finished: Some(finished), ..response });
        }
        let json = tally.json();
        assert_eq!((&json["prompt_tokens"], &json["completion_tokens"]), (&json!(12), &json!(8)));
        assert_eq!(json["total_tokens"], 20);
        assert_eq!(json["prompt_tokens_details"]["cached_tokens"], 6);
    }
}
