//! How the keys of a step's rows are shared out.

use std::ops::Range;

use super::QueryRows;
use crate::cuda::kv::HeadShape;

/// Query rows of a unit of work: tokens times heads of a group.
pub(super) const UNIT_ROWS: usize = 16;
/// Keys that the warps of a block read at once; shares are of whole such.
const BLOCK_KEYS: usize = 64;
/// Keys that a warp reads at once; items begin at a multiple of it.
const STEP_KEYS: usize = 16;
/// A smaller share is not worth the addition of its result to the others'. An estimate.
const LEAST_SHARE: usize = 128;
/// Words of an item: `decode::Item`.
pub(super) const ITEM_WORDS: usize = 8;

/// Who reads which keys in [`decode_attention`](super::decode_attention): the keys of all rows, one
/// after another, cut into equal shares. It depends on positions, so it is made and uploaded for
/// each step; its place on the device and the grid stay, so a captured step can be replayed. Rows
/// that pad a batch are in no item, and their results stay as they are.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DecodePlan {
    items: Vec<[u32; ITEM_WORDS]>,
    shares: Vec<u32>,
}

/// Tokens of one sequence whose queries fit one product.
struct Unit {
    row: usize,
    rows: usize,
    position: usize,
    sequence: usize,
}

impl DecodePlan {
    /// Shares out the keys of `runs` among `workers`
    /// ([`decode_workers`](super::decode_workers)), for layers with this window.
    ///
    /// # Panics
    /// If a group has more than 16 heads, there are no workers, or a position is beyond 2³².
    #[must_use]
    pub fn new(runs: &[QueryRows], shape: &HeadShape, window: usize, workers: usize) -> Self {
        let units: Vec<Unit> = runs.iter().flat_map(|run| units(run, shape.group())).collect();
        let blocks: usize =
            units.iter().map(|unit| unit.keys(window).len().div_ceil(BLOCK_KEYS)).sum();
        let share = (blocks.div_ceil(workers) * BLOCK_KEYS).max(LEAST_SHARE);
        let mut plan = Self { items: Vec::new(), shares: vec![0] };
        let mut room = share;
        for unit in &units {
            let first_part = plan.items.len();
            let Range { start: mut key, end } = unit.keys(window);
            while key < end {
                if room == 0 {
                    plan.shares.push(word(plan.items.len()));
                    room = share;
                }
                let next = end.min(key + room);
                room -= (next - key).next_multiple_of(BLOCK_KEYS);
                plan.items.push(unit.item(key..next, first_part));
                key = next;
            }
            let parts = word(plan.items.len() - first_part);
            for item in &mut plan.items[first_part..] {
                item[ITEM_WORDS - 1] = parts;
            }
        }
        plan.shares.resize(workers + 1, word(plan.items.len()));
        plan
    }

    /// Most items of a plan.
    #[must_use]
    pub fn most_items(units: usize, workers: usize) -> usize {
        units + workers
    }

    /// Units into which a run of rows falls.
    #[must_use]
    pub fn units_of(rows: usize, shape: &HeadShape) -> usize {
        rows.div_ceil(UNIT_ROWS / shape.group())
    }

    /// Ranges of keys, as the device reads them.
    #[must_use]
    pub fn items(&self) -> &[u32] {
        self.items.as_flattened()
    }

    /// Where each worker's items begin, and where the last one's end.
    #[must_use]
    pub fn shares(&self) -> &[u32] {
        &self.shares
    }
}

fn units(run: &QueryRows, group: usize) -> impl Iterator<Item = Unit> + use<> {
    assert!(group <= UNIT_ROWS, "groups of {group} heads");
    let (run, tokens) = (*run, UNIT_ROWS / group);
    (0..run.rows).step_by(tokens).map(move |first| Unit {
        row: run.row + first,
        rows: tokens.min(run.rows - first),
        position: run.position + first,
        sequence: run.sequence,
    })
}

impl Unit {
    /// The keys that any row sees, and up to 15 before them.
    fn keys(&self, window: usize) -> Range<usize> {
        let first = if window == 0 { 0 } else { (self.position + 1).saturating_sub(window) };
        first / STEP_KEYS * STEP_KEYS..self.position + self.rows
    }

    fn item(&self, keys: Range<usize>, first_part: usize) -> [u32; ITEM_WORDS] {
        let parts = 0; // set when they are known
        let Self { row, rows, position, sequence } = *self;
        [row, rows, position, sequence, keys.start, keys.end, first_part, parts].map(word)
    }
}

fn word(value: usize) -> u32 {
    u32::try_from(value).expect("positions, rows and items below 2^32")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: HeadShape = HeadShape { heads: 8, kv_heads: 2, head_dim: 128 };

    fn runs(lengths: &[(usize, usize)]) -> Vec<QueryRows> {
        let mut row = 0;
        let run = |(sequence, &(rows, position))| {
            row += rows;
            QueryRows { row: row - rows, rows, position, sequence }
        };
        lengths.iter().enumerate().map(run).collect()
    }

    /// The items that hold a row are those of its keys, one after another.
    fn check_row(plan: &DecodePlan, row: usize, position: usize, sequence: usize, window: usize) {
        let first = if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
        let mut next = None;
        for (i, item) in plan.items.iter().enumerate() {
            let item = item.map(|word| word as usize);
            if !(item[0]..item[0] + item[1]).contains(&row) {
                continue;
            }
            assert_eq!((item[2] + row - item[0], item[3]), (position, sequence));
            assert!(item[4].is_multiple_of(16) && item[4] < item[5]);
            assert!((item[6]..item[6] + item[7]).contains(&i));
            assert!(next.map_or(item[4] <= first, |next| next == item[4]));
            next = Some(item[5]);
        }
        assert!(next.is_some_and(|end| end > position));
    }

    proptest! {
        /// Every key that a row sees is in one item, which belongs to one worker, and no share is
        /// longer than an equal part of all keys.
        #[test]
        fn every_key_is_read_once(
            lengths in prop::collection::vec((1_usize..10, 0_usize..3000), 1..20),
            window in prop::sample::select(vec![0_usize, 1, 100, 1000]),
            workers in 1_usize..40,
        ) {
            let runs = runs(&lengths);
            let plan = DecodePlan::new(&runs, &SHAPE, window, workers);
            let units: usize = runs.iter().map(|run| DecodePlan::units_of(run.rows, &SHAPE)).sum();
            assert!(plan.items.len() <= DecodePlan::most_items(units, workers));
            assert_eq!(plan.shares.len(), workers + 1);
            assert_eq!(plan.shares[workers] as usize, plan.items.len());

            let keys = |item: &[u32; 8]| (item[5] - item[4]).next_multiple_of(64) as usize;
            let total: usize = plan.items.iter().map(keys).sum();
            let equal = ((total / 64).div_ceil(workers) * 64).max(LEAST_SHARE);
            for share in plan.shares.windows(2) {
                let items = &plan.items[share[0] as usize..share[1] as usize];
                assert!(items.iter().map(keys).sum::<usize>() <= equal);
            }
            for run in &runs {
                for i in 0..run.rows {
                    check_row(&plan, run.row + i, run.position + i, run.sequence, window);
                }
            }
        }
    }
}
