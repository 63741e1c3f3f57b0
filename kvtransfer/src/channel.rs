//! Channels: payload from the memory of a node's devices to that of another one's, past the host. NCCL
//! makes them.
//!
//! A connection has at most one, made while it is used already: the receiver's end names it with
//! `Invite`, both join, and from `Joined` on the receiver may ask for payload this way. What it
//! carries next is announced on the control stream, in the order in which it is sent: so both ends
//! queue matching operations, and the channel itself carries nothing that could be believed.
//!
//! Whatever fails or takes too long breaks the channel, for good and for all transfers at once: they
//! go on over QUIC, and the peer is not asked for another one for
//! [`DIRECT_PAUSE`](crate::limits::DIRECT_PAUSE).

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use crate::memory::Soon;

/// What both ends join by; only their makers know how. Who knows it can take an end's place, so it is
/// told to the peer alone. At most [`MAX_CHANNEL_NAME_BYTES`](crate::limits::MAX_CHANNEL_NAME_BYTES).
pub type ChannelName = Vec<u8>;

/// Pieces on their way through a channel, one after the other, in memory of whoever made it. No
/// block: what is late or torn spoils nothing.
pub type Parcel = Box<dyn Any + Send>;

/// One of the two ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChannelEnd {
    /// It named the channel.
    Receiving,
    /// It was invited.
    Sending,
}

/// Makes channels between this node's devices and others.
pub trait Channels: Send + Sync + 'static {
    /// How many devices share the blocks here.
    fn devices(&self) -> u8;

    /// A name for a new channel from a node with so many devices, or why there can be none.
    fn name(&self, senders: u8) -> Soon<Result<ChannelName, String>>;

    /// Joins a channel; done when the other end has, or after `join`, or when it is refused, with the
    /// reason. Afterwards the channel is broken when something takes longer than `patience`.
    fn join(
        &self,
        name: ChannelName,
        end: ChannelEnd,
        join: Duration,
        patience: Duration,
    ) -> Soon<Result<Arc<dyn Channel>, String>>;
}

/// One end of a channel. What is queued goes in the order in which it was asked for, and never waits
/// for longer than the channel's patience; then the channel is broken, and nothing arrives any more.
pub trait Channel: Any + Send + Sync {
    /// Sends a parcel. False: the channel is broken.
    fn send(&self, parcel: Parcel) -> Soon<bool>;

    /// Receives the next parcel, of so many bytes. `None`: the channel is broken.
    fn receive(&self, bytes: usize) -> Soon<Option<Parcel>>;

    /// Whether it does not even notice any more that something takes too long.
    fn is_stuck(&self) -> bool;

    /// Breaks it, wherever it is, without waiting.
    fn close(&self);
}
