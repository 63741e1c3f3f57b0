//! Weights in the order in which products read them.
#![expect(unsafe_code, reason = "raw memory")]

use super::element::LINE;
use super::memory::Memory;
use super::pool::ThreadPool;
use crate::Dtype;

/// A weight matrix `[outputs, inputs]`, in the precision that it came in.
///
/// It lies in panels of 32 outputs: for each input in turn, the 32 weights of the panel. The last
/// panel is filled up with zeros.
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    dtype: Dtype,
    memory: Memory,
}

impl PackedMatrix {
    /// Packs a matrix that comes as row-major little-endian pieces, stacked by rows.
    ///
    /// # Panics
    /// If the pieces are not whole rows of `inputs > 0` elements, `outputs` in all.
    #[must_use]
    pub fn pack(
        pool: &ThreadPool,
        outputs: usize,
        inputs: usize,
        dtype: Dtype,
        pieces: &[&[u8]],
    ) -> Self {
        let row_bytes = inputs * dtype.bytes();
        assert!(inputs > 0, "a matrix has inputs");
        let rows: usize = pieces.iter().map(|p| p.len() / row_bytes).sum();
        assert!(
            rows == outputs && pieces.iter().all(|p| p.len().is_multiple_of(row_bytes)),
            "{outputs} rows of {inputs} elements in whole rows"
        );
        let panel_bytes = LINE * row_bytes;
        let memory = Memory::zeroed(outputs.div_ceil(LINE) * panel_bytes);
        let packed = Self { outputs, inputs, dtype, memory };
        pool.for_each(outputs.div_ceil(LINE), &|panel| {
            // SAFETY: this panel's part of the memory, which no other task touches.
            let target = unsafe {
                let start = packed.memory.as_ptr().add(panel * panel_bytes);
                std::slice::from_raw_parts_mut(start, panel_bytes)
            };
            for column in 0..LINE.min(outputs - panel * LINE) {
                let row = row_of(pieces, row_bytes, panel * LINE + column);
                let slot = slot(dtype, column);
                match dtype {
                    Dtype::F32 => scatter::<4>(row, target, slot),
                    Dtype::Bf16 | Dtype::F16 => scatter::<2>(row, target, slot),
                }
            }
        });
        packed
    }

    /// Rows: the length of a product's result.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns: the length of what it is multiplied with.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Precision of the weights.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Copies row `output` to `row`, widened. So a matrix that is also the table of embeddings
    /// needs to be in memory only once.
    ///
    /// # Panics
    /// If there is no such row, or it is not of `row`'s length.
    pub fn unpack_row(&self, output: usize, row: &mut [f32]) {
        assert!(output < self.outputs && row.len() == self.inputs, "a row of the matrix");
        // SAFETY: the memory was written by `pack`, and nothing writes to it any more.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.memory.len()) };
        let panel_bytes = LINE * self.inputs * self.dtype.bytes();
        let panel = &bytes[output / LINE * panel_bytes..][..panel_bytes];
        let at = slot(self.dtype, output % LINE) * self.dtype.bytes();
        let lines = panel.chunks_exact(LINE * self.dtype.bytes());
        for (value, line) in row.iter_mut().zip(lines) {
            let element = &line[at..at + self.dtype.bytes()];
            self.dtype.widen(element, std::slice::from_mut(value));
        }
    }

    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(LINE)
    }

    /// Bytes from one input to the next.
    pub(crate) fn line_bytes(&self) -> usize {
        LINE * self.dtype.bytes()
    }

    /// Bytes from one panel to the next.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.inputs * self.line_bytes()
    }

    /// The weights of `panel` for the inputs from `input` on.
    pub(crate) fn line(&self, panel: usize, input: usize) -> *const u8 {
        let offset = panel * self.panel_bytes() + input * self.line_bytes();
        assert!(offset <= self.memory.len(), "inside the matrix");
        // SAFETY: just checked.
        unsafe { self.memory.as_ptr().add(offset) }
    }
}

/// Where in its line a column lies: see [`Bf16Pairs`](super::element::Bf16Pairs).
fn slot(dtype: Dtype, column: usize) -> usize {
    match dtype {
        Dtype::Bf16 => column % (LINE / 2) * 2 + column / (LINE / 2),
        Dtype::F32 | Dtype::F16 => column,
    }
}

fn row_of<'a>(pieces: &[&'a [u8]], row_bytes: usize, row: usize) -> &'a [u8] {
    let mut offset = row * row_bytes;
    for piece in pieces {
        if offset < piece.len() {
            return &piece[offset..offset + row_bytes];
        }
        offset -= piece.len();
    }
    unreachable!("rows were counted")
}

/// Writes the elements of `row` to slot `slot` of successive lines.
fn scatter<const N: usize>(row: &[u8], lines: &mut [u8], slot: usize) {
    let elements = row.as_chunks::<N>().0;
    for (element, line) in elements.iter().zip(lines.as_chunks_mut::<N>().0.chunks_exact_mut(LINE))
    {
        line[slot] = *element;
    }
}
