//! Random batches over a paged cache, and what attention has to give for them.

use baton_kernels::cuda::{
    AttentionInput, Buffer, HeadShape, KvElements, PagedKv, QueryRows, Stream,
};
use half::bf16;

use crate::support::{Random, e4m3_to_f64};

/// Greatest error of a head's output, relative to its length: that of weights and results in bf16.
const TOLERANCE: f64 = 1.0 / 160.0;
/// What nothing may be read from: NaN in every type.
const POISON: u8 = 0xff;

/// Everything about a batch but its numbers.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) shape: HeadShape,
    pub(crate) elements: KvElements,
    pub(crate) block_tokens: usize,
    pub(crate) window: usize,
    /// In order of their rows; there may be rows between them that nobody computes.
    pub(crate) runs: Vec<QueryRows>,
}

/// A batch on the host.
pub(crate) struct Case {
    pub(crate) setup: Setup,
    max_blocks: usize,
    tables: Vec<u32>,
    pieces: Vec<u8>,
    qkv: Vec<bf16>,
}

/// A batch on a device.
pub(crate) struct Uploaded {
    tables: Buffer<u32>,
    pieces: Buffer<u8>,
    qkv: Buffer<bf16>,
    pub(crate) out: Buffer<bf16>,
}

impl Setup {
    /// Runs one after another, of so many rows after so many tokens.
    pub(crate) fn runs(lengths: &[(usize, usize)]) -> Vec<QueryRows> {
        let mut next = 0;
        let run = |(sequence, &(rows, position))| {
            let row = next;
            // Now and then a row that nobody computes.
            next += rows + sequence % 2;
            QueryRows { row, rows, position, sequence }
        };
        lengths.iter().enumerate().map(run).collect()
    }

    fn first_key(&self, position: usize) -> usize {
        if self.window == 0 { 0 } else { (position + 1).saturating_sub(self.window) }
    }

    fn rows(&self) -> usize {
        self.runs.iter().map(|run| run.row + run.rows).max().unwrap_or(0) + 2
    }
}

impl Case {
    /// Blocks in random order. Poison is in blocks of nobody, slots after the last key, keys and values of
    /// `qkv`; and blocks that no row sees are in no table.
    pub(crate) fn new(random: &mut Random, setup: Setup) -> Self {
        let (shape, block_tokens) = (setup.shape, setup.block_tokens);
        let end = |run: &QueryRows| (run.position + run.rows).div_ceil(block_tokens);
        let max_blocks = setup.runs.iter().map(end).max().unwrap_or(0) + 2;
        let mut free: Vec<u32> =
            (0..setup.runs.iter().map(end).sum::<usize>() as u32 + 3).collect();
        let piece = 2 * shape.kv_heads * block_tokens * shape.head_dim * setup.elements.bytes();
        let mut case = Self {
            max_blocks,
            tables: vec![u32::MAX >> 1; setup.runs.len() * max_blocks],
            pieces: vec![POISON; free.len() * piece],
            qkv: vec![bf16::NAN; setup.rows() * shape.row()],
            setup,
        };
        for run in case.setup.runs.clone() {
            let first = case.setup.first_key(run.position) / block_tokens;
            for block in first..end(&run) {
                let taken = free.swap_remove(random.below(free.len()));
                case.tables[run.sequence * max_blocks + block] = taken;
            }
            case.fill(random, &run, first * block_tokens);
        }
        case
    }

    fn fill(&mut self, random: &mut Random, run: &QueryRows, first_key: usize) {
        let shape = self.setup.shape;
        for row in run.row..run.row + run.rows {
            let queries = random.bf16s(shape.heads * shape.head_dim);
            self.qkv[row * shape.row()..][..queries.len()].copy_from_slice(&queries);
        }
        for key in first_key..run.position + run.rows {
            for half in 0..2 {
                for head in 0..shape.kv_heads {
                    for element in 0..shape.head_dim {
                        let at = self.element_at(run.sequence, key, half, head, element);
                        self.write(random, at);
                    }
                }
            }
        }
    }

    fn write(&mut self, random: &mut Random, at: usize) {
        match self.setup.elements {
            KvElements::Bf16 => {
                let value = bf16::from_f32(random.number() * 1.5);
                self.pieces[2 * at..2 * at + 2].copy_from_slice(&value.to_le_bytes());
            }
            KvElements::E4m3 { .. } => {
                let bytes = || random.bits() as u8;
                self.pieces[at] = std::iter::repeat_with(bytes)
                    .find(|&byte| e4m3_to_f64(byte).abs() <= 4.0)
                    .expect("most bytes are small numbers");
            }
        }
    }

    /// Makes scores rise (or fall) with the key: the first element of queries is large, that of keys a
    /// line. bf16 only.
    pub(crate) fn slope(&mut self, slope: f32) {
        let Setup { shape, runs, .. } = self.setup.clone();
        for run in &runs {
            for row in run.row..run.row + run.rows {
                for head in 0..shape.heads {
                    self.qkv[row * shape.row() + head * shape.head_dim] = bf16::from_f32(8.0);
                }
            }
            for key in 0..run.position + run.rows {
                for head in 0..shape.kv_heads {
                    let at = self.element_at(run.sequence, key, 0, head, 0);
                    let value = bf16::from_f32(slope * key as f32);
                    self.pieces[2 * at..2 * at + 2].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
    }

    /// Number of an element in the pieces.
    fn element_at(
        &self,
        sequence: usize,
        key: usize,
        half: usize,
        head: usize,
        element: usize,
    ) -> usize {
        let (shape, tokens) = (&self.setup.shape, self.setup.block_tokens);
        let block = self.tables[sequence * self.max_blocks + key / tokens] as usize;
        let head_row = ((block * 2 + half) * shape.kv_heads + head) * tokens + key % tokens;
        head_row * shape.head_dim + element
    }

    /// A head of a key or a value.
    fn cached(&self, sequence: usize, key: usize, half: usize, head: usize) -> Vec<f64> {
        let at = self.element_at(sequence, key, half, head, 0);
        let numbers = at..at + self.setup.shape.head_dim;
        match self.setup.elements {
            KvElements::Bf16 => numbers
                .map(|i| {
                    f64::from(bf16::from_le_bytes([self.pieces[2 * i], self.pieces[2 * i + 1]]))
                })
                .collect(),
            KvElements::E4m3 { k_scale, v_scale } => {
                let scale = f64::from([k_scale, v_scale][half]);
                numbers.map(|i| e4m3_to_f64(self.pieces[i]) * scale).collect()
            }
        }
    }

    fn scale(&self) -> f32 {
        (self.setup.shape.head_dim as f32).powf(-0.5)
    }

    pub(crate) fn upload(&self, stream: &Stream) -> Uploaded {
        let shape = &self.setup.shape;
        let out = vec![bf16::NAN; self.setup.rows() * shape.heads * shape.head_dim];
        Uploaded {
            tables: stream.buffer(&self.tables).unwrap(),
            pieces: stream.buffer(&self.pieces).unwrap(),
            qkv: stream.buffer(&self.qkv).unwrap(),
            out: stream.buffer(&out).unwrap(),
        }
    }

    pub(crate) fn input<'a>(&self, there: &'a Uploaded) -> AttentionInput<'a> {
        let kv = PagedKv {
            pieces: there.pieces.all(),
            elements: self.setup.elements,
            block_tokens: self.setup.block_tokens,
            block_tables: there.tables.all(),
            max_blocks: self.max_blocks,
        };
        let Setup { shape, window, .. } = self.setup;
        AttentionInput { qkv: there.qkv.all(), shape, kv, scale: self.scale(), window }
    }

    /// Compares all results, and looks that no other row was written.
    pub(crate) fn check(&self, out: &[bf16]) {
        let shape = &self.setup.shape;
        let mut written = vec![false; out.len() / (shape.heads * shape.head_dim)];
        for run in &self.setup.runs {
            for i in 0..run.rows {
                written[run.row + i] = true;
                for head in 0..shape.heads {
                    self.check_head(out, run, i, head);
                }
            }
        }
        for (row, values) in out.chunks(shape.heads * shape.head_dim).enumerate() {
            let kept = values.iter().all(|value| value.to_bits() == bf16::NAN.to_bits());
            assert!(written[row] || kept, "row {row} was written in {:?}", self.setup);
        }
    }

    fn check_head(&self, out: &[bf16], run: &QueryRows, i: usize, head: usize) {
        let HeadShape { heads, head_dim, .. } = self.setup.shape;
        let at = ((run.row + i) * heads + head) * head_dim;
        let found = out[at..at + head_dim].iter().map(|value| f64::from(value.to_f32()));
        let expected = self.reference(run, i, head);
        let length = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error = found.zip(&expected).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt() / length;
        // So that NaN fails.
        assert!(error <= TOLERANCE, "row {i} of {run:?}, head {head}: {error} in {:?}", self.setup);
    }

    /// `softmax(q kᵀ scale) v`, in f64.
    fn reference(&self, run: &QueryRows, i: usize, head: usize) -> Vec<f64> {
        let shape = &self.setup.shape;
        let (position, kv_head) = (run.position + i, head / shape.group());
        let at = (run.row + i) * shape.row() + head * shape.head_dim;
        let query: Vec<f64> = self.qkv[at..at + shape.head_dim].iter().map(|&q| q.into()).collect();
        let keys = self.setup.first_key(position)..=position;
        let score = |key| {
            let key = self.cached(run.sequence, key, 0, kv_head);
            query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * f64::from(self.scale())
        };
        let scores: Vec<f64> = keys.clone().map(score).collect();
        let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - greatest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut output = vec![0.0; shape.head_dim];
        for (key, weight) in keys.zip(weights) {
            let value = self.cached(run.sequence, key, 1, kv_head);
            output.iter_mut().zip(value).for_each(|(o, v)| *o += weight / sum * v);
        }
        output
    }
}
