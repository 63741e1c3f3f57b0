//! One model on one set of devices: checkpoints, the forward pass, the paged KV cache, continuous
//! batching and sampling. Opens no socket and sees no text.

pub mod blocks;
pub mod channel;
pub mod config;
mod engine;
mod events;
mod executor;
mod forward;
pub mod generation;
pub mod gpu;
mod guiding;
mod host;
mod inbox;
mod lease;
mod memory;
pub mod model;
pub mod pace;
mod place;
mod pooling;
pub mod prefix;
mod rope;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod staging;
mod step;
#[doc(hidden)]
pub mod testing;
mod weights;

pub use engine::{Engine, EngineConfig, EngineInfo, Sink};
pub use events::{EngineEvent, FirstToken, Kind, Submission, SubmitError};

pub use executor::{
    AfterLayer, DeviceFailure, Executor, Input, PromptLogprobs, Sample, Step, StepChunk,
};
pub use forward::{Chunk, Forward, Wanted};
pub use host::HostExecutor;
pub use lease::{BlockLease, Piece};
pub use memory::{KvMemory, MemoryLost, PeerKv, SharedKv, Soon};
pub use place::Place;
pub use rope::Rope;
