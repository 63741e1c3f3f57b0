//! Where the heads of a batch lie in memory.

/// A range of heads in every row of a matrix: head `h` of row `r` is `dim` elements at
/// `r * stride + offset + h * dim`. So q, k and v can stay in the one matrix that a fused
/// projection wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    /// Elements from one row to the next.
    pub stride: usize,
    /// Where the first of these heads begins in its row.
    pub offset: usize,
    /// How many.
    pub count: usize,
    /// Elements of one head.
    pub dim: usize,
}

impl Heads {
    /// Elements of all these heads in one row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.count * self.dim
    }

    /// Rows of a matrix of `len` elements.
    ///
    /// # Panics
    /// If the matrix has no whole number of rows, or the heads do not fit a row.
    pub(crate) fn rows(&self, len: usize) -> usize {
        assert!(self.offset + self.width() <= self.stride, "heads lie inside their row");
        assert!(len.is_multiple_of(self.stride), "a whole number of rows");
        len / self.stride
    }

    /// These heads of `row`.
    pub(crate) fn of<'a>(&self, matrix: &'a [f32], row: usize) -> &'a [f32] {
        &matrix[row * self.stride + self.offset..][..self.width()]
    }
}
