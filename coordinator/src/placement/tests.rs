//! Placement as a whole.
