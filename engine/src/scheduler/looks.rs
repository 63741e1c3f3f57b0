//! What a [`Scheduler`] is asked, which changes nothing.

use std::time::Instant;

use baton_proto::hash::BlockHash;
use baton_proto::ids::TransferId;
use baton_proto::message::BlockCounts;

use super::{PlannedChunk, Scheduler};
use crate::events::Kind;
use crate::sequence::{Phase, Sequence};

impl Scheduler {
    /// All that the prefix cache holds.
    #[must_use]
    pub fn cached_hashes(&self) -> Vec<BlockHash> {
        self.cache.snapshot()
    }

    /// Whether anything of a job is still here: the sequence, or a lease of its blocks.
    #[must_use]
    pub fn knows(&self, id: TransferId) -> bool {
        self.holds(id) || self.leases.contains_key(&id)
    }

    /// Whether the job's end has been told while its lease is still out.
    #[must_use]
    pub fn end_told(&self, id: TransferId) -> bool {
        let lease = self.leases.get(&id);
        !self.holds(id) && lease.is_some_and(|lease| !lease.ended)
    }

    fn holds(&self, id: TransferId) -> bool {
        self.numbers.contains_key(&id) || self.fetches.contains_key(&id)
    }

    /// The sequence of a planned chunk.
    ///
    /// # Panics
    /// If it is over.
    #[must_use]
    pub fn sequence(&self, chunk: &PlannedChunk) -> &Sequence {
        &self.sequences[&chunk.number]
    }

    /// Whether the sequence of a planned chunk is over.
    #[must_use]
    pub fn is_over(&self, chunk: &PlannedChunk) -> bool {
        !self.sequences.contains_key(&chunk.number)
    }

    /// When the next sequence fails if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Sequences not admitted, held ones included.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len() + self.held.len()
    }

    /// Blocks that they will need.
    #[must_use]
    pub fn waiting_blocks(&self) -> usize {
        let waiting = self.waiting.iter().chain(&self.held);
        let blocks =
            |number| self.sequences[number].tokens.len().div_ceil(self.limits.block_tokens);
        waiting.map(blocks).sum()
    }

    /// Sequences admitted.
    #[must_use]
    pub fn admitted(&self) -> usize {
        self.running.len() + self.importing.len()
    }

    /// Whether the next step has sequences that generate.
    #[must_use]
    pub fn decodes(&self) -> bool {
        self.running.iter().any(|number| self.sequences[number].decoding())
    }

    /// Tokens of prompts that are to be computed here.
    #[must_use]
    pub fn queued_tokens(&self) -> usize {
        let queued = |s: &&Sequence| s.kind != Kind::Import && s.computed < s.admitted_tokens;
        let waits = self.sequences.values().filter(queued);
        waits.map(|s| s.admitted_tokens - s.computed).sum()
    }

    /// Blocks by state.
    #[must_use]
    pub fn blocks(&self) -> BlockCounts {
        self.cache.counts()
    }

    /// Derives what is kept redundantly and compares. For tests and for idle moments.
    ///
    /// # Panics
    /// If the scheduler contradicts itself.
    pub fn check(&self) {
        self.cache.check();
        assert_eq!(self.numbers.len(), self.sequences.len());
        let queued = self.waiting() + self.admitted();
        assert_eq!(queued, self.sequences.len(), "a sequence is in exactly one queue");
        assert!(self.admitted() <= self.limits.max_sequences);
        assert!(self.fetches.keys().all(|id| !self.numbers.contains_key(id)));
        for (number, sequence) in &self.sequences {
            let queue = match sequence.phase {
                Phase::Waiting if self.held.contains(number) => &self.held,
                Phase::Waiting => &self.waiting,
                Phase::Importing => &self.importing,
                Phase::Running => &self.running,
            };
            assert!(queue.contains(number), "the phase names the queue");
            assert!(sequence.computed <= sequence.planned && sequence.planned <= sequence.length());
            let flies = sequence.in_flight() || sequence.pending > 0;
            assert!(!flies || sequence.phase == Phase::Running && !self.flights.is_empty());
            let blocks = sequence.length().div_ceil(self.limits.block_tokens);
            match sequence.phase {
                Phase::Waiting => assert!(sequence.blocks.is_empty()),
                _ => assert!((blocks - 1..=blocks).contains(&sequence.blocks.len())),
            }
        }
        let idle = self.flights.is_empty() && self.sequences.is_empty();
        if idle && self.fetches.is_empty() && self.leases.is_empty() {
            let BlockCounts { active, leased, .. } = self.blocks();
            assert_eq!((active, leased), (0, 0), "nothing is left of ended sequences");
        }
    }
}
