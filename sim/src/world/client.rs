//! A client: what it asks, what it hears, and whether that is right.

use std::time::{Duration, Instant};

use baton_coordinator::core::{RequestError, SubmitError, Update};
use baton_coordinator::placement::Standing;
use baton_proto::embedding::Pooling;
use baton_proto::message::NodeFinish;
use baton_proto::sampling::SamplingParams;

use super::memory::{HIDDEN_SIZE, Oracle};

/// What a client does of its own accord.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Plan {
    /// It waits for the end.
    Stay,
    /// It goes away at some time.
    LeaveAfter(Duration),
    /// It goes away once it has so many tokens.
    LeaveAt(usize),
    /// It has what it wanted once it has so many tokens.
    SatisfiedAt(usize),
}

/// What a client asks.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: SamplingParams,
    /// It wants an embedding, and no tokens.
    pub(crate) embed: Option<Pooling>,
    pub(crate) standing: Standing,
    pub(crate) deadline: Option<Duration>,
    pub(crate) plan: Plan,
}

/// How it ended for a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// With all its tokens.
    Complete,
    /// With as many as it wanted.
    Satisfied,
    /// It went away.
    Left,
    /// Its deadline passed.
    Late,
}

/// See the module's description.
pub(crate) struct Client {
    pub(crate) question: Question,
    pub(crate) expected: Vec<u32>,
    expected_embedding: Vec<f32>,
    pub(crate) asked: Instant,
    /// Submissions so far, each with an id of its own.
    pub(crate) submissions: u32,
    /// Who has the current one.
    pub(crate) coordinator: Option<usize>,
    pub(crate) tokens: Vec<u32>,
    heard_logprobs: bool,
    heard_embedding: bool,
    /// It has told the coordinator that it wants no more.
    pub(crate) leaving: bool,
    pub(crate) ended: Option<Ended>,
    pub(crate) first_token: Option<Duration>,
    pub(crate) last_token: Option<Duration>,
    /// Fetched from another node for its prompt.
    pub(crate) pulled_tokens: u32,
    pub(crate) summary: Option<baton_coordinator::core::Summary>,
}

/// What a client does after news.
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Reaction {
    /// It waits.
    None,
    /// It goes away.
    Leave,
    /// It has what it wanted.
    Satisfied,
    /// It asks again, perhaps another coordinator.
    AskAgain,
}

impl Client {
    /// A client that has not asked yet. `oracle` has seen nothing; a sequence has at most
    /// `max_model_len` tokens.
    pub(crate) fn new(
        question: Question,
        mut oracle: Oracle,
        max_model_len: usize,
        now: Instant,
    ) -> Self {
        let expected_embedding = embedding(&question, &mut oracle);
        let (mut expected, sampling) = (Vec::new(), &question.sampling);
        loop {
            let token = oracle.next();
            oracle.push(token);
            expected.push(token);
            let length = question.prompt.len() + expected.len();
            let stops = expected.len() > sampling.min_tokens as usize
                && sampling.eos_token_ids.contains(&token);
            let full = expected.len() >= sampling.max_tokens as usize || length >= max_model_len;
            if stops || full {
                break;
            }
        }
        Self {
            question,
            expected,
            expected_embedding,
            asked: now,
            submissions: 0,
            coordinator: None,
            tokens: Vec::new(),
            heard_logprobs: false,
            heard_embedding: false,
            leaving: false,
            ended: None,
            first_token: None,
            last_token: None,
            pulled_tokens: 0,
            summary: None,
        }
    }

    /// It asks, once more perhaps: what it has heard before is void.
    pub(crate) fn ask(&mut self, coordinator: usize) {
        self.submissions += 1;
        self.coordinator = Some(coordinator);
        self.tokens.clear();
        (self.heard_logprobs, self.heard_embedding, self.first_token) = (false, false, None);
    }

    /// The request was not accepted.
    pub(crate) fn refused(&mut self, error: &SubmitError) -> Reaction {
        self.coordinator = None;
        match error {
            SubmitError::NoNodes(_)
            | SubmitError::Overloaded { .. }
            | SubmitError::UnknownModel(_)
            | SubmitError::ShuttingDown => Reaction::AskAgain,
            SubmitError::TooLate { .. } if self.question.deadline.is_some() => {
                self.end(Ended::Late)
            }
            SubmitError::TooLate { .. } => Reaction::AskAgain,
            error => panic!("a request that should be fine was refused: {error}"),
        }
    }

    /// The coordinator is gone, and with it the request.
    pub(crate) fn abandoned(&mut self) -> Reaction {
        self.coordinator = None;
        if self.leaving {
            self.ended = Some(Ended::Left);
            return Reaction::None;
        }
        Reaction::AskAgain
    }

    /// News of the request.
    ///
    /// # Panics
    /// If they are wrong.
    pub(crate) fn hear(&mut self, update: Update, now: Instant) -> Reaction {
        assert_eq!(self.ended, None, "news after the end");
        let since = now - self.asked;
        match update {
            Update::Tokens(tokens) => {
                assert!(!tokens.is_empty(), "news without tokens");
                self.first_token.get_or_insert(since);
                self.last_token = Some(since);
                for output in tokens {
                    let at = self.tokens.len();
                    let expected = self.expected.get(at).copied();
                    assert_eq!(Some(output.token), expected, "output position {at}");
                    self.tokens.push(output.token);
                    let ends = self.tokens.len() == self.expected.len();
                    assert_eq!(output.finish.is_some(), ends, "the end at position {at}");
                }
                self.reaction()
            }
            Update::PromptLogprobs(logprobs) => {
                assert!(!std::mem::replace(&mut self.heard_logprobs, true), "logprobs twice");
                let tokens: Vec<u32> = logprobs.iter().map(|(token, _)| *token).collect();
                assert_eq!(tokens, self.question.prompt[1..], "log-probabilities of the prompt");
                Reaction::None
            }
            Update::Embedding(values) => {
                assert!(!std::mem::replace(&mut self.heard_embedding, true), "embedded twice");
                assert_eq!(values, self.expected_embedding, "the embedding of the prompt");
                Reaction::None
            }
            Update::Done(summary) if self.question.embed.is_some() => {
                assert!(self.heard_embedding && self.tokens.is_empty(), "an embedding, no tokens");
                self.summary = Some(summary);
                self.end(Ended::Complete)
            }
            Update::Done(summary) => {
                let complete = summary.finish.is_some();
                if complete {
                    assert_eq!(self.tokens, self.expected, "complete means all tokens");
                    let eos = &self.question.sampling.eos_token_ids;
                    let stopped = self.tokens.last().is_some_and(|token| eos.contains(token));
                    let by_eos = summary.finish == Some(NodeFinish::EndOfSequence);
                    assert!(stopped || !by_eos, "ended by a token that ends nothing");
                    let wanted = self.question.sampling.prompt_logprobs.is_some();
                    assert_eq!(self.heard_logprobs, wanted && self.question.prompt.len() > 1);
                } else {
                    assert!(self.leaving, "ended without a reason");
                }
                self.summary = Some(summary);
                self.end(if complete { Ended::Complete } else { Ended::Satisfied })
            }
            Update::Failed(error) => self.failed(&error, since),
        }
    }

    /// It has ended, and what it asked is of no use any more.
    pub(crate) fn forget(&mut self) {
        (self.question.prompt, self.expected, self.tokens) = Default::default();
    }

    fn failed(&mut self, error: &RequestError, since: Duration) -> Reaction {
        match error {
            RequestError::DeadlineExceeded => {
                let deadline = self.question.deadline.expect("a deadline passed that was not set");
                let early = Duration::from_millis(60);
                assert!(since + early >= deadline, "{deadline:?} passed after {since:?}");
                self.end(Ended::Late)
            }
            RequestError::Cancelled => {
                assert!(self.leaving, "cancelled by nobody");
                self.end(Ended::Left)
            }
            RequestError::NoNodes { .. }
            | RequestError::Exhausted { .. }
            | RequestError::ShuttingDown => self.abandoned(),
            error @ RequestError::Rejected(_) => panic!("rejected: {error}"),
        }
    }

    fn end(&mut self, ended: Ended) -> Reaction {
        self.ended = Some(ended);
        self.coordinator = None;
        Reaction::None
    }

    fn reaction(&mut self) -> Reaction {
        let have = self.tokens.len();
        match self.question.plan {
            Plan::LeaveAt(count) if have >= count && !self.leaving => Reaction::Leave,
            Plan::SatisfiedAt(count) if have >= count && !self.leaving => Reaction::Satisfied,
            _ => Reaction::None,
        }
    }
}

/// Shows the prompt to the oracle; what its embedding is, if one is wanted.
fn embedding(question: &Question, oracle: &mut Oracle) -> Vec<f32> {
    let mut sum = [0.0; HIDDEN_SIZE];
    for &token in &question.prompt {
        oracle.push(token);
        for (sum, value) in sum.iter_mut().zip(oracle.hidden()) {
            *sum += f64::from(value);
        }
    }
    match question.embed {
        None => Vec::new(),
        Some(Pooling::Last) => oracle.hidden().to_vec(),
        Some(Pooling::Mean) => {
            sum.iter().map(|sum| (sum / question.prompt.len() as f64) as f32).collect()
        }
    }
}
