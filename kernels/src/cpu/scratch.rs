//! Scratch memory that each thread keeps, so that tasks do not allocate.

use std::cell::Cell;

thread_local! {
    static KEPT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `task` with `len` numbers of any value.
pub(crate) fn with_scratch(len: usize, task: impl FnOnce(&mut [f32])) {
    KEPT.with(|kept| {
        // Taken, not borrowed: a task inside a task gets memory of its own.
        let mut scratch = kept.take();
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        task(&mut scratch[..len]);
        kept.set(scratch);
    });
}
