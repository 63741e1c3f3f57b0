//! Sequences with a grammar: a token is sampled for one only when it is known which may follow.
//!
//! The scheduler says which masks are [wanted](Scheduler::masks_wanted) and is told those that were
//! [found](Scheduler::mask_found). A mask depends on every token before it, so nothing is sampled
//! for such a sequence while its last token is in flight; the rest of its prompt is computed
//! meanwhile.

use std::sync::Arc;

use baton_grammar::{GrammarError, Guide, TokenMask};
use baton_proto::grammar::Grammar;
use baton_proto::message::Retry;

use super::Scheduler;
use crate::sequence::Phase;

/// A mask that a sequence lacks.
#[derive(Debug)]
pub struct MaskWanted {
    /// The sequence's number in order of arrival.
    pub number: u64,
    /// What it has to follow.
    pub grammar: Arc<Grammar>,
    /// How far it has followed it; `None` before its first mask.
    pub guide: Option<Guide>,
    /// Output tokens that the guide has not seen.
    pub tokens: Vec<u32>,
    /// End-of-sequence tokens.
    pub eos: Vec<u32>,
    /// Further tokens that end it.
    pub stop: Vec<u32>,
    /// It should not end yet.
    pub early: bool,
}

/// What came of a [`MaskWanted`].
#[derive(Debug)]
pub struct MaskFound {
    /// The sequence's number.
    pub number: u64,
    /// The guide with all tokens seen, and what may follow them.
    pub outcome: Result<(Guide, TokenMask), GrammarError>,
}

/// Where a sequence is in its grammar.
#[derive(Debug, Default)]
pub struct Following {
    /// `None` before the first mask, and while one is computed.
    guide: Option<Guide>,
    /// Output tokens that it has seen, or will have with the mask that is computed.
    seen: usize,
    /// What may follow the output, once that is known.
    mask: Option<TokenMask>,
    /// A mask was found: the next one takes microseconds, not as long as a grammar to compile.
    compiled: bool,
}

impl Following {
    /// What may follow the output, if that is known.
    #[must_use]
    pub fn mask(&self) -> Option<&TokenMask> {
        self.mask.as_ref()
    }

    /// The output is a token longer.
    pub fn moved_on(&mut self) {
        self.mask = None;
    }
}

impl Scheduler {
    /// Masks to compute, each told once.
    #[must_use]
    pub fn masks_wanted(&mut self) -> Vec<MaskWanted> {
        let unguided = std::mem::take(&mut self.unguided);
        self.guiding.extend(&unguided);
        unguided.into_iter().filter_map(|number| self.mask_wanted(number)).collect()
    }

    fn mask_wanted(&mut self, number: u64) -> Option<MaskWanted> {
        let sequence = self.sequences.get_mut(&number)?;
        let output = &sequence.tokens[sequence.prompt_tokens..];
        let (sampling, following) = (&sequence.sampling, sequence.following.as_mut()?);
        let tokens = output[following.seen..].to_vec();
        following.seen = output.len();
        Some(MaskWanted {
            number,
            grammar: sampling.grammar.clone()?,
            guide: following.guide.take(),
            tokens,
            eos: sampling.eos_token_ids.clone(),
            stop: sampling.stop_token_ids.clone(),
            early: output.len() < sampling.min_tokens as usize,
        })
    }

    /// A mask was computed. Without effect if its sequence is over.
    pub fn mask_found(&mut self, found: MaskFound) {
        let MaskFound { number, outcome } = found;
        if !self.guiding.remove(&number) {
            return;
        }
        let sequence = self.sequences.get_mut(&number).expect("who is over is not guided");
        let output = sequence.output().len();
        let following = sequence.following.as_mut().expect("only who has a grammar is guided");
        match outcome {
            Ok((guide, mask)) => {
                following.guide = Some(guide);
                following.compiled = true;
                if following.seen == output {
                    following.mask = Some(mask);
                } else {
                    // An import's first token came meanwhile.
                    self.unguided.insert(number);
                }
            }
            Err(error) => {
                let retry = match error {
                    GrammarError::Unusable(_) => Retry::Never,
                    GrammarError::Lost(_) => Retry::OtherNode,
                };
                self.fail(number, error.to_string(), retry);
            }
        }
    }

    /// Masks that are being computed, without which running sequences miss the next step.
    #[must_use]
    pub fn masks_awaited(&self) -> usize {
        let awaited = |number: &&u64| {
            let sequence = &self.sequences[number];
            let compiled = sequence.following.as_ref().is_some_and(|f| f.compiled);
            compiled && sequence.phase == Phase::Running && sequence.decoding()
        };
        self.guiding.iter().filter(awaited).count()
    }

    /// A sequence's output is a token longer.
    pub(super) fn lacks_mask(&mut self, number: u64) {
        let sequence = self.sequences.get_mut(&number).expect("only present ones grow");
        let Some(following) = &mut sequence.following else { return };
        following.moved_on();
        if !self.guiding.contains(&number) {
            self.unguided.insert(number);
        }
    }

    /// Running ahead would leave behind more of the sequences that generate than it takes along:
    /// the next step is better made when their tokens, and masks, are known.
    pub(super) fn leaves_most_behind(&self) -> bool {
        let max_model_len = self.limits.max_model_len;
        let (mut behind, mut along) = (0, 0);
        for sequence in self.running.iter().map(|number| &self.sequences[number]) {
            if sequence.decoding() && !sequence.ends_in_flight(max_model_len) {
                let waits = sequence.following.is_some() && sequence.pending > 0;
                if waits { behind += 1 } else { along += 1 }
            }
        }
        !self.flights.is_empty() && behind > along
    }
}
