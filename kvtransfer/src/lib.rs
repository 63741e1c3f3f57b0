//! Moves the KV blocks of one sequence from the pool of one node to the pool of another.
//!
//! The decisions are two state machines without I/O, clock or memory of their own: [`Sender`] and
//! [`Receiver`]. They speak in control frames ([`frame::Frame`]) and payload units (pieces behind
//! a [`frame::UnitHeader`]). An [`Endpoint`] drives them over QUIC; each end reads and writes its
//! pool through [`BlockSource`] and [`BlockSink`]. Between processes of one machine, units may hold
//! references to memory instead of bytes ([`Direct`]). This crate knows no model and no engine.
//!
//! ```text
//! sender                                              receiver
//!   Offer   model, geometry, hash chain, block count →
//!         ← Heartbeat, as long as there is no room for the blocks
//!         ← Grant   which blocks are wanted, and after a reconnect which pieces have landed
//!   Unit    layer, run of blocks, length, checksum   →   (as soon as a layer of them is computed)
//!         ← Retry   a unit whose checksum did not hold
//!         ← Grant   again, if the payload has to travel in another way
//!   Finish  the first token                          →
//!         ← Read    everything referred to was copied (by reference only)
//!   Held    … and was there until now                →
//!         ← Complete   every wanted piece was verified and lies in its place
//! ```
//!
//! Where the payload goes through a channel between devices, `Announce` frames stand for the units,
//! and the sender says `Unable` when it is broken: a second grant follows.
//!
//! Either end may `Cancel` at any time; both send `Heartbeat`s, and give up when the other has
//! been silent for as long as their own lease.

pub mod frame;
pub mod inbox;
pub mod limits;

mod accept;
mod channel;
mod codec;
mod dial;
mod direct;
mod endpoint;
mod error;
mod grid;
mod link;
mod meet;
mod memory;
mod payload;
mod pump;
mod receive;
mod receiver;
mod send;
mod sender;
mod transport;
mod wire;

pub use channel::{Channel, ChannelEnd, ChannelName, Channels, Parcel};
pub use direct::{Direct, HostMark, Remote, SharedMemory, Transport};
pub use endpoint::{BindError, Endpoint};
pub use error::{ReceiveError, SendError};
pub use frame::{FirstToken, Reason};
pub use limits::Timing;
pub use meet::{MeetError, meet};
pub use memory::{BlockSink, BlockSource, MemoryLost, Place, Soon, at_hand};
pub use receive::{Incoming, ReceiveHandle, Room};
pub use receiver::Receiver;
pub use send::{Outgoing, SendHandle, Sent};
pub use sender::{LinkId, Sender};
