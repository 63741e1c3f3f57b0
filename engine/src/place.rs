//! [`Place`]: where one payload unit of an import goes.

use std::ops::Range;
use std::sync::Arc;

use crate::lease::BlockLease;
use crate::memory::{KvMemory, Soon, at_hand};
use crate::staging::Staged;

/// One layer of consecutive blocks of a lease, to be written.
pub struct Place {
    lease: Arc<BlockLease>,
    layer: usize,
    ordinals: Range<usize>,
    staged: Option<(Staged, Vec<bool>)>,
}

impl Place {
    /// Written in place.
    pub(crate) fn at_hand(lease: Arc<BlockLease>, layer: usize, ordinals: Range<usize>) -> Self {
        Self { lease, layer, ordinals, staged: None }
    }

    /// Written to `staged` first.
    pub(crate) fn staged(
        lease: Arc<BlockLease>,
        layer: usize,
        ordinals: Range<usize>,
        staged: Staged,
    ) -> Self {
        let untouched = vec![false; ordinals.len()];
        Self { lease, layer, ordinals, staged: Some((staged, untouched)) }
    }

    /// Copies `bytes` to `offset` of the piece of block `ordinal`. Blocks that were here at
    /// admission are not changed, nor any once the sequence runs.
    ///
    /// # Panics
    /// If that is not within the place.
    pub fn write(&mut self, ordinal: usize, offset: usize, bytes: &[u8]) {
        let at = ordinal.checked_sub(self.ordinals.start).expect("a block of the place");
        let Some((staged, touched)) = &mut self.staged else {
            assert!(at < self.ordinals.len(), "a block of the place");
            return self.lease.write(self.layer, ordinal, offset, bytes);
        };
        touched[at] = true;
        let unit = staged.as_mut();
        let piece_bytes = unit.len() / self.ordinals.len();
        unit[at * piece_bytes..][..piece_bytes][offset..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Puts what was written into the blocks. Done when the engine would see it; the lease is
    /// released before, if nobody else has it.
    #[must_use]
    pub fn apply(self) -> Soon<()> {
        let (Some((staged, touched)), KvMemory::Device(staging)) =
            (self.staged, self.lease.memory().clone())
        else {
            return at_hand(());
        };
        let new = self.ordinals.clone().zip(touched).enumerate();
        let new = new.filter(|(_, (ordinal, touched))| *touched && *ordinal >= self.lease.held());
        let block = |ordinal: usize| self.lease.block_ids(ordinal..ordinal + 1)[0];
        let pieces = new.map(|(at, (ordinal, _))| (at, block(ordinal))).collect();
        staging.apply(self.lease, self.layer, staged, pieces)
    }
}
