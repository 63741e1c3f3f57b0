//! What the choice of an algorithm depends on.

use std::fmt;

use cudarc::cublaslt::sys::cudaDataType;

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Shape {
    pub rows: usize,
    pub outputs: usize,
    pub inputs: usize,
    pub input: cudaDataType,
    pub output: cudaDataType,
    pub bias: bool,
    pub add: bool,
    /// Bytes that `w`, `x` and `y` are aligned to.
    pub alignment: [u32; 3],
}

/// The numbers of rows above 8 for which algorithms are chosen, per power of two.
const BUCKETS: usize = 4;

impl Shape {
    /// The shape whose algorithm serves this one too: with at least as many rows, 25 % more at most.
    /// Steps with prompts have every number of rows, and asking the library takes long.
    pub(super) fn bucket(&self) -> Self {
        let step = (self.rows.next_power_of_two() / (2 * BUCKETS)).max(1);
        Self { rows: self.rows.next_multiple_of(step), ..*self }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, outputs, inputs, input, output, alignment: [w, x, y], .. } = self;
        let mut parts = String::new();
        for (has, name) in [(self.bias, " + bias"), (self.add, " + y")] {
            parts += if has { name } else { "" };
        }
        write!(
            f,
            "[{rows}, {inputs}] x [{inputs}, {outputs}]{parts} of {input:?}, {output:?} out, "
        )?;
        write!(f, "with addresses of w, x and y that are multiples of {w}, {x} and {y}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        rows: 1,
        outputs: 24,
        inputs: 16,
        input: cudaDataType::CUDA_R_16BF,
        output: cudaDataType::CUDA_R_32F,
        bias: true,
        add: false,
        alignment: [256, 2, 16],
    };

    #[test]
    fn buckets_are_a_little_larger_than_what_is_in_them() {
        let bucket = |rows| Shape { rows, ..SHAPE }.bucket().rows;
        let all: std::collections::BTreeSet<_> = (1..=8192).map(bucket).collect();
        assert_eq!(all.len(), 8 + 4 * 10, "{all:?}");
        for rows in 1..=8192 {
            assert!((rows..=rows + rows / 4).contains(&bucket(rows)), "{rows}: {}", bucket(rows));
            assert_eq!(bucket(bucket(rows)), bucket(rows));
        }
        // Graphs have powers of two.
        assert!((0..14).all(|power| bucket(1 << power) == 1 << power));
    }

    #[test]
    fn a_shape_says_what_an_algorithm_is_missing_for() {
        let expected = "[1, 16] x [16, 24] + bias of CUDA_R_16BF, CUDA_R_32F out, with addresses \
                        of w, x and y that are multiples of 256, 2 and 16";
        assert_eq!(SHAPE.to_string(), expected);
    }
}
