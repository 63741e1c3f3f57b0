//! One completion of a request: from the core's updates to the messages of the stream.

use baton_proto::ids::RequestId;
use baton_proto::message::{Logprobs, NodeFinish};
use baton_proto::wire::v1::{
    FinishReason, Finished, GenerateResponse, Placement, TokenLogprob, TokenLogprobs, Usage,
};

use super::explain;
use super::models::ServedModel;
use super::prepare::Prepared;
use super::stop::StopMatcher;
use super::text::Detokenizer;
use crate::core::{OutputToken, RequestError, Summary, Update};

/// Makes text of tokens and looks for stop strings; decides, and does nothing.
pub(crate) struct Choice {
    index: u32,
    id: RequestId,
    /// Name of the model that answers.
    model: String,
    first_prompt_token: u32,
    min_tokens: u32,
    /// What ends the output is part of the text.
    include_stop: bool,
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    /// Text of one token; a field for its memory.
    piece: String,
    /// Tokens given to the client.
    emitted: u32,
    /// The stop string that was found; what comes after it is not for the client.
    stopped: Option<String>,
}

/// What follows from an update.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    /// Nothing.
    Nothing,
    /// A message for the client.
    Send(GenerateResponse),
    /// The same, and the core is to stop: the completion is whole.
    Stop(GenerateResponse),
    /// The last message.
    Last(GenerateResponse),
    /// The request failed.
    Fail(RequestError),
}

impl Choice {
    /// Completion number `index` of a request. A prompt is not empty.
    pub(crate) fn new(index: u32, id: RequestId, model: &ServedModel, prepared: &Prepared) -> Self {
        let Prepared { tokens, sampling, stops, include_stop, skip_special, .. } = prepared;
        Self {
            index,
            id,
            model: model.name.clone(),
            first_prompt_token: tokens[0],
            min_tokens: sampling.min_tokens,
            include_stop: *include_stop,
            detokenizer: Detokenizer::new(model.tokenizer.clone(), tokens, *skip_special),
            matcher: StopMatcher::new(stops.clone()),
            piece: String::new(),
            emitted: 0,
            stopped: None,
        }
    }

    /// Takes the core's next update.
    pub(crate) fn take(&mut self, update: Update) -> Step {
        match update {
            Update::Tokens(_) if self.stopped.is_some() => Step::Nothing,
            Update::Tokens(tokens) => self.take_tokens(tokens),
            Update::PromptLogprobs(tokens) => Step::Send(self.prompt_logprobs(tokens)),
            Update::Embedding(_) => Step::Nothing,
            Update::Done(summary) => Step::Last(self.last(&summary)),
            Update::Failed(error) => Step::Fail(error),
        }
    }

    fn take_tokens(&mut self, tokens: Vec<OutputToken>) -> Step {
        let mut response = self.response();
        for OutputToken { token, logprobs, finish } in tokens {
            self.emitted += 1;
            response.token_ids.push(token);
            response.logprobs.extend(logprobs.map(|logprobs| token_logprobs(token, logprobs)));
            self.piece.clear();
            // A token that ends the sequence is no text, unless that was asked for.
            if self.include_stop || matches!(finish, None | Some(NodeFinish::Length)) {
                self.detokenizer.push(token, &mut self.piece);
            }
            if finish.is_some() {
                self.detokenizer.finish(&mut self.piece);
            }
            let may_stop = self.emitted >= self.min_tokens;
            if let Some(found) = self.matcher.push(&self.piece, may_stop, &mut response.text) {
                let stop = self.matcher.stops()[found.stop].clone();
                if self.include_stop {
                    response.text.push_str(&stop);
                }
                self.stopped = Some(stop);
                return Step::Stop(response);
            }
            if finish.is_some() {
                self.matcher.finish(&mut response.text);
            }
        }
        Step::Send(response)
    }

    fn prompt_logprobs(&self, tokens: Vec<(u32, Logprobs)>) -> GenerateResponse {
        let first = TokenLogprobs { token_id: self.first_prompt_token, ..Default::default() };
        let others = tokens.into_iter().map(|(token, logprobs)| token_logprobs(token, logprobs));
        GenerateResponse {
            prompt_logprobs: std::iter::once(first).chain(others).collect(),
            ..self.response()
        }
    }

    fn last(&mut self, summary: &Summary) -> GenerateResponse {
        let stop_string = self.stopped.take();
        let (reason, stop_token_id) = match (&stop_string, summary.finish) {
            (Some(_), _) | (None, Some(NodeFinish::EndOfSequence)) => (FinishReason::Stop, None),
            (None, Some(NodeFinish::StopToken(token))) => (FinishReason::Stop, Some(token)),
            (None, Some(NodeFinish::Length)) => (FinishReason::Length, None),
            (None, None) => (FinishReason::Unspecified, None),
        };
        let finished = Finished {
            reason: reason.into(),
            stop_string,
            stop_token_id,
            usage: Some(Usage {
                prompt_tokens: summary.usage.prompt_tokens,
                cached_tokens: summary.usage.cached_tokens,
                // The core may have seen tokens that came after a stop string.
                completion_tokens: self.emitted,
            }),
            timings: Some(explain::timings(&summary.timings)),
            placement: Some(placement(summary)),
            model: self.model.clone(),
        };
        GenerateResponse { finished: Some(finished), ..self.response() }
    }

    fn response(&self) -> GenerateResponse {
        GenerateResponse {
            request_id: self.id.to_string(),
            choice: self.index,
            ..GenerateResponse::default()
        }
    }
}

fn token_logprobs(token: u32, logprobs: Logprobs) -> TokenLogprobs {
    let top = logprobs.top.into_iter();
    TokenLogprobs {
        token_id: token,
        logprob: logprobs.logprob,
        top: top.map(|(token_id, logprob)| TokenLogprob { token_id, logprob }).collect(),
    }
}

/// Without a prefill node the decode node computed the prompt itself.
fn placement(summary: &Summary) -> Placement {
    let place = &summary.placement;
    Placement {
        prefill_node: place.prefill.as_ref().map(ToString::to_string).unwrap_or_default(),
        decode_node: place.decode.to_string(),
        reason: place.reason.clone(),
        attempts: place.attempts,
    }
}
