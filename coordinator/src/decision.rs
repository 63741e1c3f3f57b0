//! What was compared when a request was placed, kept so that it can be explained.

use std::time::{Duration, Instant};

use baton_proto::ids::NodeId;

use crate::core::Timings;
use crate::placement::cost::Cost;

/// Most placements of a decision that are kept: the cheapest pairs and the cheapest single nodes.
pub const MOST_CONSIDERED: usize = 6;
/// Most nodes of a decision that are kept by name of those that were left out.
pub const MOST_LEFT_OUT: usize = 8;

/// One way to serve a request, and what it was thought to cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Considered {
    /// Who would compute the prompt; `None`: the decode node itself.
    pub prefill: Option<NodeId>,
    /// Who would generate the tokens.
    pub decode: NodeId,
    /// From whom a cached prefix would be fetched first, and its tokens.
    pub pull: Option<(NodeId, usize)>,
    /// Tokens cached on the node that would compute the prompt.
    pub cached: usize,
    /// In milliseconds.
    pub cost: Cost,
}

impl Considered {
    fn kind(&self) -> &'static str {
        if self.prefill.is_some() { "remote" } else { "local" }
    }
}

/// Why a node that serves a request's model was not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It takes nothing new.
    Draining,
    /// It failed several requests in a row, and rests.
    Failing,
    /// It failed this request before.
    FailedIt,
    /// Its longest sequence is shorter than the request may become.
    TooSmall,
    /// It has not enough free blocks, and another one has.
    Full,
}

impl Why {
    /// Its name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Failing => "failing",
            Self::FailedIt => "failed_it",
            Self::TooSmall => "too_small",
            Self::Full => "full",
        }
    }
}

/// How one attempt was placed, or refused a place.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// When.
    pub at: Instant,
    /// Tokens of prompt and output so far.
    pub tokens: usize,
    /// Prefill nodes that were compared.
    pub prefill_nodes: usize,
    /// Decode nodes that were compared.
    pub decode_nodes: usize,
    /// What was chosen, then the cheapest of what was not; at most [`MOST_CONSIDERED`]. None if no
    /// decode node could take it.
    pub considered: Vec<Considered>,
    /// Nodes that were not compared, and why; at most [`MOST_LEFT_OUT`].
    pub left_out: Vec<(NodeId, Why)>,
    /// How many more were not.
    pub more_left_out: usize,
    /// Joined nodes that serve other models.
    pub of_other_models: usize,
}

/// A part of the time that a request takes, which is predicted when it is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// In the queue of the node that computes the prompt.
    Queue,
    /// Computing the prompt.
    Prefill,
    /// From being placed to the first token.
    FirstToken,
    /// KV transfer after the first token.
    Transfer,
}

impl Term {
    /// Its name in the API and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Prefill => "prefill",
            Self::FirstToken => "first_token",
            Self::Transfer => "transfer",
        }
    }
}

/// What was predicted, beside what came of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Of what.
    pub term: Term,
    /// Predicted.
    pub predicted: Duration,
    /// What it took; `None`: that is not known, or not yet.
    pub took: Option<Duration>,
}

impl Decision {
    /// What was chosen.
    #[must_use]
    pub fn chosen(&self) -> Option<&Considered> {
        self.considered.first()
    }

    /// Why, in one line for people.
    #[must_use]
    pub fn reason(&self) -> String {
        let Some(chosen) = self.chosen() else { return "no node could take it".to_owned() };
        let percent = 100 * chosen.cached / self.tokens.max(1);
        let on = chosen.prefill.as_ref().unwrap_or(&chosen.decode);
        let other = self.considered.iter().find(|other| other.kind() != chosen.kind());
        let other = match other {
            None if self.prefill_nodes == 0 => "; no prefill node is free".to_owned(),
            // Of an embedding: nothing else is compared.
            None => String::new(),
            Some(other) => format!("; {} would be {:.1} ms", other.kind(), other.cost.total()),
        };
        let (kind, total) = (chosen.kind(), chosen.cost.total());
        format!("{kind}: {total:.1} ms, {percent}% cached on {on}{other}")
    }

    /// What came of it, if this is the decision of a request's last attempt. `held`: from the request's
    /// arrival to that attempt's start. Nothing if an earlier attempt gave the first token: its times
    /// are of other nodes.
    #[must_use]
    pub fn outcomes(&self, times: &Timings, held: Duration) -> Vec<Outcome> {
        let Some(chosen) = self.chosen() else { return Vec::new() };
        let has_token = !times.first_token.is_zero();
        if has_token && times.first_token < held {
            return Vec::new();
        }
        let outcome = |term, ms: f64, took: Duration, known: bool| {
            let predicted = Duration::try_from_secs_f64(ms.max(0.0) / 1e3).unwrap_or(Duration::MAX);
            Outcome { term, predicted, took: known.then_some(took) }
        };
        let since = |time: Duration| time.saturating_sub(held);
        let cost = &chosen.cost;
        let started = has_token || (!times.queue.is_zero() && times.queue >= held);
        let mut outcomes = vec![
            outcome(Term::Queue, cost.queue, since(times.queue), started),
            outcome(Term::Prefill, cost.prefill, times.prefill, has_token),
            outcome(Term::FirstToken, cost.first_token(), since(times.first_token), has_token),
        ];
        if chosen.prefill.is_some() {
            let sent = times.transfer_bytes > 0;
            outcomes.push(outcome(Term::Transfer, cost.transfer, times.transfer_exposed, sent));
        }
        outcomes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::node;

    fn decision() -> Decision {
        let cost = Cost { queue: 2.0, pull: 1.0, prefill: 10.0, transfer: 3.0, ..Cost::default() };
        let (prefill, decode) = (Some(node("p")), node("d"));
        let considered = Considered { prefill, decode, pull: None, cached: 0, cost };
        Decision {
            at: Instant::now(),
            tokens: 5,
            prefill_nodes: 1,
            decode_nodes: 1,
            considered: vec![considered],
            left_out: Vec::new(),
            more_left_out: 0,
            of_other_models: 0,
        }
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const TIMES: Timings = Timings {
        queue: ms(105),
        place: Duration::ZERO,
        prefill: ms(8),
        transfer_hidden: ms(6),
        transfer_exposed: ms(4),
        first_token: ms(120),
        total: ms(500),
        transfer_bytes: 1,
    };

    #[test]
    fn waiting_here_is_no_part_of_what_was_predicted() {
        let outcomes = decision().outcomes(&TIMES, ms(100));
        let of = |outcome: &Outcome| (outcome.term, outcome.predicted, outcome.took);
        let wanted = [
            (Term::Queue, ms(2), Some(ms(5))),
            (Term::Prefill, ms(10), Some(ms(8))),
            (Term::FirstToken, ms(13), Some(ms(20))),
            (Term::Transfer, ms(3), Some(ms(4))),
        ];
        assert_eq!(outcomes.iter().map(of).collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn what_is_not_known_is_not_zero() {
        let nothing = decision().outcomes(&Timings::default(), ms(100));
        assert_eq!(nothing.len(), 4);
        assert!(nothing.iter().all(|outcome| outcome.took.is_none()), "{nothing:?}");
        let times = Timings { queue: ms(105), ..Timings::default() };
        let queued = decision().outcomes(&times, ms(100));
        assert_eq!(queued.iter().filter(|outcome| outcome.took.is_some()).count(), 1);
    }

    #[test]
    fn an_attempt_after_the_first_token_has_no_outcome() {
        assert!(decision().outcomes(&TIMES, ms(300)).is_empty());
    }

    #[test]
    fn without_a_node_there_is_a_reason_and_no_outcome() {
        let none = Decision { considered: Vec::new(), ..decision() };
        assert_eq!(none.reason(), "no node could take it");
        assert!(none.outcomes(&TIMES, ms(0)).is_empty());
    }
}
