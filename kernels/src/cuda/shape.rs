//! What kernels of whole rows ask of shapes.

/// Elements of the widest row that kernels keep in registers.
pub const MAX_WIDTH: usize = 32_768;

/// Elements of one access of a thread: 16 bytes of bf16.
pub(super) const VECTOR: usize = 8;

/// How many rows of `width` elements there are.
pub(super) fn rows_of(elements: usize, width: usize) -> usize {
    assert!(width > 0 && width.is_multiple_of(VECTOR), "rows of {width} elements");
    assert!(elements.is_multiple_of(width), "{elements} elements are no rows of {width}");
    elements / width
}

/// Checks that each of the slices is of `elements` elements.
pub(super) fn check_lengths(elements: usize, lengths: &[usize]) {
    for length in lengths {
        assert_eq!(*length, elements, "slices that belong together");
    }
}

/// Threads of a block that keeps a row in registers: one for each vector, as far as there are so
/// many. By the width alone, so that a row's sums are the same in any batch.
pub(super) fn threads_of_row(width: usize) -> u32 {
    assert!(width <= MAX_WIDTH, "rows of {width} elements, and {MAX_WIDTH} at most");
    width.div_ceil(VECTOR).next_multiple_of(32).min(1024) as u32
}
