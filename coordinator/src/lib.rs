//! The coordinator: admission, placement, the life of requests, the index of cached blocks, and
//! the front that clients talk to.

pub mod core;
pub mod front;
