//! Bounds on everything that a peer could make grow, and on every wait.

use std::time::Duration;

/// Most blocks of one transfer: a million tokens in blocks of 16.
pub const MAX_BLOCKS: u32 = 1 << 16;
/// Most layers of a model.
pub const MAX_LAYERS: u32 = 1024;
/// Most bytes of one piece (one layer of one block).
pub const MAX_PIECE_BYTES: usize = 64 << 20;
/// A payload unit is a run of blocks of one layer, filled up to this size; always at least one
/// piece. Small enough that the checksum leaves it in the second-level cache for encryption.
pub const UNIT_BYTES: usize = 512 << 10;
/// Most bytes of a control frame: an offer of [`MAX_BLOCKS`] hashes is the largest.
pub const MAX_FRAME_BYTES: usize = (16 * MAX_BLOCKS as usize) + 4096;
/// Most runs of blocks in a grant.
pub const MAX_WANTED_RUNS: usize = 256;
/// Most runs of landed pieces in a grant; those beyond are sent once more and dropped.
pub const MAX_LANDED_RUNS: usize = 16_384;
/// Units of one transfer whose checksum may fail before the transfer does.
pub const MAX_RETRIES: u32 = 8;
/// Connections that one transfer may use up.
pub const MAX_CONNECTIONS: u32 = 16;

/// Most blocks of a unit of references.
pub const MAX_REFERENCES: u32 = 8192;
/// Most bytes that describe a node's memory to others.
pub const MAX_DESCRIPTION_BYTES: usize = 4096;
/// Units of references that are copied at a time, of one connection.
pub const MAX_COPIES: usize = 64;
/// How long a peer's memory is left alone after a copy from it has failed.
pub const DIRECT_PAUSE: Duration = Duration::from_secs(60);

/// Most bytes of what two ends join a channel by.
pub const MAX_CHANNEL_NAME_BYTES: usize = 4096;
/// Most bytes of a parcel, unless one piece is larger.
pub const PARCEL_BYTES: usize = 4 << 20;
/// Parcels that are announced to one peer and not sent yet.
pub const MAX_ANNOUNCED: usize = 64;
/// Parcels that one peer may have announced and not sent yet: more than it does, as it may have sent
/// what this end has not noticed yet.
pub const MAX_EXPECTED: usize = 4 * MAX_ANNOUNCED;
/// How long a library that does not come back from joining is waited for beyond its deadline.
pub const JOIN_GRACE: Duration = Duration::from_secs(5);

/// Units of one transfer that are taken from its source ahead of the one that is being written: a
/// copy out of a device overlaps with the network.
pub const STAGED_UNITS: usize = 3;

/// Transfers that one endpoint sends at a time.
pub const MAX_OUTGOING: usize = 4096;
/// Transfers that one endpoint receives at a time.
pub const MAX_INCOMING: usize = 4096;
/// Offers that may wait for [`Endpoint::expect`](crate::Endpoint::expect), of all peers: all
/// transfers whose blocks wait in the receiving node's queue.
pub const MAX_PENDING_OFFERS: usize = 4096;
/// The same, of one peer.
pub const MAX_PENDING_OFFERS_PER_PEER: usize = 2048;
/// Hashes in all waiting offers together.
pub const MAX_PENDING_HASHES: usize = 1 << 21;
/// Ended transfers that are remembered, so that a repeated offer gets the same answer.
pub const MAX_REMEMBERED: usize = 16_384;

/// Connections of one endpoint in each direction.
pub const MAX_LINKS: usize = 1024;
/// Handshakes in progress.
pub const MAX_HANDSHAKES: usize = 64;
/// Payload streams that one peer may have open.
pub const MAX_PAYLOAD_STREAMS: u32 = 96;
/// Units of one connection that are in memory: of each stream one that is read and one that waits for
/// its place, which it does beyond the end of its stream.
pub const MAX_UNITS: usize = 2 * MAX_PAYLOAD_STREAMS as usize;
/// Control frames waiting to be written to one connection. When it comes up, every transfer that
/// waited for it makes its offer.
pub const MAX_QUEUED_FRAMES: usize = 2 * MAX_OUTGOING;

/// Unread bytes of one payload stream.
pub const STREAM_WINDOW: u32 = 16 << 20;
/// Unread bytes of one connection: 100 Gb/s at a round trip of 5 ms.
pub const CONNECTION_WINDOW: u32 = 64 << 20;
/// Unacknowledged bytes of one connection.
pub const SEND_WINDOW: u64 = 64 << 20;

/// How long an endpoint waits for what. Durations on its own clock.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// For the other end to say anything while a transfer runs; the other end is told.
    pub lease: Duration,
    /// For the other end to know of the transfer: an offer waits for so long to be expected, and
    /// its sender to be answered. When a node is lost meanwhile, it is the coordinator that
    /// cancels.
    pub begin: Duration,
    /// For the owner of a transfer to have the next piece, or the first token, ready; the receiver
    /// waits as long for the offer, for blocks of its own, and for a piece to land.
    pub producer: Duration,
    /// For `Complete` after the last unit was handed to the transport.
    pub complete: Duration,
    /// For a lost connection to come back.
    pub reconnect: Duration,
    /// For a handshake, and for a peer to finish a message that it has begun.
    pub message: Duration,
    /// For the other end to join a channel.
    pub join: Duration,
    /// For the next parcel to get through a channel.
    pub channel: Duration,
    /// Silence after which a connection is lost; keep-alives go out at a quarter of it.
    pub idle: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            begin: Duration::from_secs(120),
            producer: Duration::from_secs(600),
            complete: Duration::from_secs(30),
            reconnect: Duration::from_secs(5),
            message: Duration::from_secs(5),
            join: Duration::from_secs(30),
            channel: Duration::from_secs(5),
            idle: Duration::from_secs(2),
        }
    }
}
