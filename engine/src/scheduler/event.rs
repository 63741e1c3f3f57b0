//! What a [`Scheduler`](super::Scheduler) tells.

use std::time::Duration;

use baton_proto::ids::TransferId;
use baton_proto::message::{Logprobs, Retry, TokenEvent};

use crate::events::Kind;

/// What the scheduler has to tell, in order.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A job was admitted for the first time.
    Admitted {
        /// The job.
        id: TransferId,
        /// What is done with it.
        kind: Kind,
        /// Jobs with a transfer: the blocks that are leased until
        /// [`Scheduler::lease_returned`]; otherwise empty.
        lease: Vec<u32>,
        /// Leading blocks that were cached.
        cached_blocks: usize,
        /// Time since submission.
        queued: Duration,
    },
    /// Tokens of one step.
    Tokens(Vec<TokenEvent>),
    /// See [`EngineEvent::PromptLogprobs`](crate::EngineEvent::PromptLogprobs).
    PromptLogprobs {
        /// The job.
        id: TransferId,
        /// `(token, its log-probabilities)`.
        tokens: Vec<(u32, Logprobs)>,
    },
    /// See [`EngineEvent::Embedded`](crate::EngineEvent::Embedded).
    Embedded {
        /// The job.
        id: TransferId,
        /// The vector.
        values: Vec<f32>,
        /// Time spent computing the prompt.
        prefill: Duration,
    },
    /// The job ended without a result.
    Failed {
        /// The job.
        id: TransferId,
        /// For people.
        reason: String,
        /// Whether and where it is worth repeating.
        retry: Retry,
    },
    /// The job is over and its lease was returned.
    Ended {
        /// The job.
        id: TransferId,
    },
}
