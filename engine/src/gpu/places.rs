//! [`Places`]: where the numbers of a step lie on the device.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use baton_kernels::cuda::{
    DecodePlan, Device, HeadShape, NO_POSITION, QueryRows, prefill_tiles, split_runs,
};

use super::packing::Packing;
use super::rows::{Rows, last, positions, sources};
use super::sampling;
use crate::executor::{Step, StepChunk};

/// Words of a decode item.
const ITEM_WORDS: usize = 8;

/// What attention of a model looks like, the same in every step.
pub(super) struct AttentionShape {
    pub(super) heads: HeadShape,
    /// Windows that layers have; 0 for none.
    pub(super) windows: Vec<usize>,
    /// Among whom the keys of a step are shared out.
    pub(super) workers: usize,
    /// Which kernels there are depends on it.
    pub(super) device: Arc<Device>,
    /// Over an e4m3 cache: blocks that can be widened at once, of the longest sequence at least.
    pub(super) widened: Option<WidenedShape>,
}

/// Room for blocks of an e4m3 cache as bf16.
#[derive(Clone, Copy)]
pub(super) struct WidenedShape {
    pub(super) blocks: usize,
    pub(super) block_tokens: usize,
}

/// Ranges of the packed words.
pub(super) struct Places {
    /// Rows to compute, those that pad the step included.
    pub(super) rows: usize,
    pub(super) sources: Range<usize>,
    pub(super) positions: Range<usize>,
    /// Where each row's block table begins among `tables`.
    pub(super) sequences: Range<usize>,
    /// By window: items and shares of single rows and short chunks.
    pub(super) decode: BTreeMap<usize, (Range<usize>, Range<usize>)>,
    /// The tables of all sequences, one after the other.
    pub(super) tables: Range<usize>,
    /// Long chunks.
    pub(super) long: Vec<LongRuns>,
    /// Rows of which something is wanted: first those that sample, last those whose hidden states
    /// are summed. None: the logits of every row, in order.
    pub(super) wanted: Option<Range<usize>>,
    pub(super) sampling: sampling::Places,
}

impl Places {
    /// Packs a step. Everything that a graph of `padded` rows reads comes first and has the same
    /// place in every step of so many rows.
    pub(super) fn pack(
        packing: &mut Packing,
        (rows, padded): (&Rows, Option<usize>),
        step: &Step<'_>,
        sampled: &[Option<u32>],
        shape: &AttentionShape,
    ) -> Self {
        packing.clear();
        let total = padded.unwrap_or(rows.count);
        let tables = Tables::of(step);
        let (short, long) = tables.runs(rows, step, shape);
        let padding = std::iter::repeat_n(NO_POSITION, total - rows.count);
        Self {
            rows: total,
            sources: packing.array_of(sources(step, sampled), total),
            positions: packing.array(positions(step).chain(padding)),
            sequences: packing.array_of(tables.of_rows(step), total),
            decode: pack_decode(packing, &short, padded, shape),
            long: pack_long(packing, &long, &tables, shape),
            tables: packing.array(tables.words),
            wanted: padded.is_none().then(|| packing.array(wanted(rows, step))),
            sampling: sampling::pack(packing, rows, step, sampled),
        }
    }
}

/// Long chunks whose attention is computed together.
pub(super) struct LongRuns {
    /// Their tiles.
    pub(super) tiles: Range<usize>,
    /// Over an e4m3 cache: their blocks, to be widened before.
    pub(super) blocks: Range<usize>,
}

/// Block tables of all sequences.
struct Tables {
    words: Vec<u32>,
    /// By chunk: where its table begins.
    starts: Vec<usize>,
}

impl Tables {
    fn of(step: &Step<'_>) -> Self {
        let mut tables = Self { words: Vec::new(), starts: Vec::new() };
        for chunk in &step.chunks {
            tables.starts.push(tables.words.len());
            tables.words.extend_from_slice(chunk.blocks);
        }
        tables
    }

    fn of_rows(&self, step: &Step<'_>) -> Vec<u32> {
        let chunks = step.chunks.iter().zip(&self.starts);
        chunks
            .flat_map(|(chunk, start)| std::iter::repeat_n(*start as u32, chunk.input.rows()))
            .collect()
    }

    /// Runs of rows for each of the two kernels: short and long ones.
    fn runs(
        &self,
        rows: &Rows,
        step: &Step<'_>,
        shape: &AttentionShape,
    ) -> (Vec<QueryRows>, Vec<QueryRows>) {
        let run = |(index, chunk): (usize, &StepChunk<'_>)| QueryRows {
            row: rows.first[index],
            rows: chunk.input.rows(),
            position: chunk.start,
            sequence: self.starts[index],
        };
        let runs: Vec<_> = step.chunks.iter().enumerate().map(run).collect();
        split_runs(&shape.device, &shape.heads, &runs)
    }
}

fn pack_decode(
    packing: &mut Packing,
    runs: &[QueryRows],
    padded: Option<usize>,
    shape: &AttentionShape,
) -> BTreeMap<usize, (Range<usize>, Range<usize>)> {
    let room = padded.map_or(0, |rows| DecodePlan::most_items(rows, shape.workers) * ITEM_WORDS);
    let of_window = |window: &usize| {
        let plan = DecodePlan::new(runs, &shape.heads, *window, shape.workers);
        let items = packing.array_of(plan.items().iter().copied(), room);
        (*window, (items, packing.array(plan.shares().iter().copied())))
    };
    shape.windows.iter().map(of_window).collect()
}

/// All long runs at once, or as many as find room for their blocks as bf16.
fn pack_long(
    packing: &mut Packing,
    runs: &[QueryRows],
    tables: &Tables,
    shape: &AttentionShape,
) -> Vec<LongRuns> {
    let mut pack = |runs: &[QueryRows], blocks: Vec<u32>| LongRuns {
        tiles: packing.array(prefill_tiles(runs, &shape.heads)),
        blocks: packing.array(blocks),
    };
    let Some(WidenedShape { blocks: room, block_tokens }) = shape.widened else {
        return if runs.is_empty() { Vec::new() } else { vec![pack(runs, Vec::new())] };
    };
    let (mut packed, mut group, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
    for run in runs {
        let count = (run.position + run.rows).div_ceil(block_tokens);
        if blocks.len() + count > room {
            packed.push(pack(&std::mem::take(&mut group), std::mem::take(&mut blocks)));
        }
        group.push(QueryRows { sequence: blocks.len(), ..*run });
        blocks.extend_from_slice(&tables.words[run.sequence..run.sequence + count]);
    }
    if !group.is_empty() {
        packed.push(pack(&group, blocks));
    }
    packed
}

/// Rows that sample, then rows of prompts whose log-probabilities are wanted, then those whose
/// hidden states are.
fn wanted(rows: &Rows, step: &Step<'_>) -> Vec<u32> {
    let sampling = rows.sampling.iter().map(|index| last(rows, step, *index));
    let scored = step.chunks.iter().enumerate().filter_map(|(index, chunk)| {
        let wanted = chunk.prompt_logprobs?;
        let first = rows.first[index] + wanted.first_row;
        Some(first..first + wanted.tokens.len())
    });
    let pooled = rows.pooling.iter().flat_map(|(index, count)| {
        let end = last(rows, step, *index) + 1;
        end - count..end
    });
    sampling.chain(scored.flatten()).chain(pooled).map(|row| row as u32).collect()
}
