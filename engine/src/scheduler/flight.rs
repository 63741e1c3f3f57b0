//! Steps that were planned and have not ended.

use super::{Plan, Scheduler};
use crate::blocks::User;

/// A step that was planned and has not ended.
#[derive(Debug, Default)]
pub(super) struct Flight {
    /// Blocks that their sequences have given back, and which the step may still read or write.
    pub(super) blocks: Vec<u32>,
}

impl Scheduler {
    /// A plan is in flight from here on.
    pub(super) fn depart(&mut self, plan: &Plan) {
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let sequence = self.sequences.get_mut(&chunk.number).expect("planned ones are here");
            sequence.planned = chunk.end();
            sequence.pending += usize::from(chunk.samples);
            sequence.chunk = index;
        }
        if !plan.chunks.is_empty() {
            self.flights.push_back(Flight::default());
        }
    }

    /// The step of the oldest plan in flight was not computed, since all of its jobs were
    /// cancelled, of which the scheduler has to be told before it is asked for the next plan.
    ///
    /// # Panics
    /// If there is no plan in flight.
    pub fn abandon(&mut self, plan: &Plan) {
        self.land();
        for chunk in &plan.chunks {
            if let Some(sequence) = self.sequences.get_mut(&chunk.number) {
                sequence.planned -= chunk.tokens;
                sequence.pending -= usize::from(chunk.samples);
            }
        }
    }

    /// The oldest step in flight has ended.
    pub(super) fn land(&mut self) {
        let flight = self.flights.pop_front().expect("a step in flight ends once");
        for block in flight.blocks {
            self.cache.release(block, User::Sequence);
        }
    }
}
