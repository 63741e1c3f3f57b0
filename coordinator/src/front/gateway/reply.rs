//! From the messages of a request to what a gateway reads: chunks as they come, or each completion at its end.

use baton_proto::wire::engine::generate_complete::MatchedStop;
use baton_proto::wire::engine::generate_response::Response;
use baton_proto::wire::engine::{
    GenerateComplete, GenerateResponse, GenerateStreamChunk, InputLogProbs, InputTokenLogProb,
    OutputLogProbs, TopLogProbs,
};
use baton_proto::wire::v1;

use crate::front::openai::gather::finish_reason;

/// A request that is being answered.
#[derive(Debug)]
pub(super) struct Reply {
    prompt: Vec<u32>,
    /// Chunks are sent, and their tokens not again.
    stream: bool,
    /// What is known of each completion.
    completions: Vec<GenerateComplete>,
}

impl Reply {
    /// To a prompt, with so many completions.
    pub(super) fn new(prompt: Vec<u32>, completions: u32, stream: bool) -> Self {
        let prompt_tokens = prompt.len() as u32;
        let completion =
            |index| GenerateComplete { index, prompt_tokens, ..GenerateComplete::default() };
        Self { prompt, stream, completions: (0..completions).map(completion).collect() }
    }

    /// What follows from the next message.
    pub(super) fn take(&mut self, message: v1::GenerateResponse) -> Option<GenerateResponse> {
        let completion = &mut self.completions[message.choice as usize];
        let input_logprobs = input_logprobs(&self.prompt, &message.prompt_logprobs);
        let response = match message.finished {
            Some(finished) => Response::Complete(complete(std::mem::take(completion), finished)),
            None if self.stream => Response::Chunk(GenerateStreamChunk {
                prompt_tokens: completion.prompt_tokens,
                completion_tokens: message.token_ids.len() as u32,
                output_logprobs: output_logprobs(&message.logprobs),
                input_logprobs,
                index: message.choice,
                token_ids: message.token_ids,
                cached_tokens: 0,
            }),
            None => {
                completion.output_ids.extend(message.token_ids);
                if let Some(logprobs) = output_logprobs(&message.logprobs) {
                    append(completion.output_logprobs.get_or_insert_default(), logprobs);
                }
                completion.input_logprobs = completion.input_logprobs.take().or(input_logprobs);
                return None;
            }
        };
        Some(GenerateResponse { response: Some(response) })
    }
}

fn complete(gathered: GenerateComplete, finished: v1::Finished) -> GenerateComplete {
    let usage = finished.usage.unwrap_or_default();
    let finish_reason = finish_reason(&finished).to_owned();
    let string = finished.stop_string.map(MatchedStop::MatchedStopStr);
    GenerateComplete {
        finish_reason,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.cached_tokens,
        matched_stop: string.or(finished.stop_token_id.map(MatchedStop::MatchedTokenId)),
        ..gathered
    }
}

fn output_logprobs(tokens: &[v1::TokenLogprobs]) -> Option<OutputLogProbs> {
    (!tokens.is_empty()).then(|| OutputLogProbs {
        token_logprobs: tokens.iter().map(|token| token.logprob).collect(),
        token_ids: tokens.iter().map(|token| token.token_id).collect(),
        top_logprobs: tokens.iter().map(top).collect(),
    })
}

fn append(all: &mut OutputLogProbs, more: OutputLogProbs) {
    all.token_logprobs.extend(more.token_logprobs);
    all.token_ids.extend(more.token_ids);
    all.top_logprobs.extend(more.top_logprobs);
}

/// The first token has none.
fn input_logprobs(prompt: &[u32], tokens: &[v1::TokenLogprobs]) -> Option<InputLogProbs> {
    let value = |(at, token): (usize, &v1::TokenLogprobs)| InputTokenLogProb {
        value: (at > 0).then_some(token.logprob),
    };
    (!tokens.is_empty()).then(|| InputLogProbs {
        token_logprobs: tokens.iter().enumerate().map(value).collect(),
        token_ids: prompt.to_vec(),
        top_logprobs: tokens.iter().map(top).collect(),
    })
}

fn top(token: &v1::TokenLogprobs) -> TopLogProbs {
    TopLogProbs {
        values: token.top.iter().map(|other| other.logprob).collect(),
        token_ids: token.top.iter().map(|other| other.token_id).collect(),
    }
}
