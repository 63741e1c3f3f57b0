//! What the two ends of a transfer say to each other, and its wire form.
//!
//! Control frames travel on one bidirectional stream, each as `length: u32, kind: u8, body`, all
//! numbers little endian; `length` counts kind and body. Payload units travel on unidirectional
//! streams, each as a header of [`UnitHeader::BYTES`] and then the pieces as they lie in memory.
//! No frame carries an address: blocks are named by their ordinal in the sequence.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use baton_proto::geometry::KvGeometry;
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{Epoch, TransferId};
use baton_proto::message::{Logprobs, NodeFinish};

use crate::channel::ChannelName;
use crate::codec::{Reader, Writer};
use crate::direct::{HostMark, SharedMemory, Transport};
pub use crate::grid::{LayerRun, Run};
use crate::limits::{MAX_BLOCKS, MAX_FRAME_BYTES, MAX_LANDED_RUNS, MAX_WANTED_RUNS};

mod reason;
mod unit;

pub use reason::Reason;
pub use unit::UnitHeader;

/// Protocol versions that this build speaks.
pub const VERSIONS: RangeInclusive<u32> = 4..=4;

/// Bytes that are no frame. Whoever sent them broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME_BYTES`], or empty.
    #[error("a frame of {0} bytes")]
    Length(u32),
    /// The frame ends inside a field.
    #[error("a frame that ends inside a field")]
    Truncated,
    /// The frame goes on after its last field.
    #[error("a frame with {0} bytes too many")]
    Trailing(usize),
    /// No frame of this version has this kind.
    #[error("a frame of unknown kind {0}")]
    UnknownKind(u8),
    /// A field has a code that this version does not know.
    #[error("unknown code {code} for {what}")]
    UnknownCode {
        /// The field.
        what: &'static str,
        /// Its value.
        code: u8,
    },
    /// Units of two transfers on one stream.
    #[error("units of two transfers on one stream")]
    MixedStream,
    /// A number is outside its range.
    #[error("{value} for {what}")]
    OutOfRange {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u32,
    },
}

/// A control frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// The first frame of each end of a connection.
    Hello(Hello),
    /// Sender: this is what I have.
    Offer(Offer),
    /// Receiver: send me these.
    Grant(Grant),
    /// Receiver: these arrived damaged, send them again.
    Retry(TransferId, LayerRun),
    /// Sender: the prompt is computed; every granted piece is sent or about to be.
    Finish(TransferId, FirstToken),
    /// Receiver: all granted pieces are verified and in place.
    Complete(TransferId),
    /// Either: the transfer is over, without success.
    Cancel(TransferId, Reason),
    /// Either: I am still at it.
    Heartbeat(TransferId),
    /// Receiver: everything that the units referred to was copied.
    Read(TransferId),
    /// Sender: what was copied before you said so was mine all the time.
    Held(TransferId),
    /// Receiver: join this channel.
    Invite(ChannelName),
    /// Sender: I have joined it.
    Joined,
    /// Sender: the channel's next parcel has these pieces, of so many bytes.
    Announce(TransferId, LayerRun, u32),
    /// Sender: the channel is broken; ask for the pieces in another way.
    Unable(TransferId),
}

/// Opens a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version spoken.
    pub oldest: u32,
    /// Newest version spoken.
    pub newest: u32,
    /// Which life of the node speaks.
    pub epoch: Epoch,
    /// The sender's memory, for a receiver on the same machine.
    pub shared: Option<(HostMark, SharedMemory)>,
    /// Sender: it would join a channel, from so many devices; 0: it would not.
    pub devices: u8,
}

impl Hello {
    /// What this build says.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        let (oldest, newest) = (*VERSIONS.start(), *VERSIONS.end());
        Self { oldest, newest, epoch, shared: None, devices: 0 }
    }

    /// The version that both ends then speak: the newest that both know.
    #[must_use]
    pub fn common_version(&self) -> Option<u32> {
        let newest = self.newest.min(*VERSIONS.end());
        (newest >= self.oldest.max(*VERSIONS.start())).then_some(newest)
    }
}

/// What is transferred; both ends must have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The transfer.
    pub transfer: TransferId,
    /// The model.
    pub root: ModelRoot,
    /// Layout of the blocks.
    pub geometry: KvGeometry,
    /// Blocks of the sequence, the partial last one included.
    pub blocks: u32,
    /// Hash chain of the full blocks.
    pub hashes: Vec<BlockHash>,
}

/// What the sender has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The blocks.
    pub manifest: Manifest,
    /// The sender gives up when the receiver is silent for so long.
    pub lease: Duration,
}

/// What the receiver wants: the sender's credit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The transfer.
    pub transfer: TransferId,
    /// How the payload is to travel. Another grant over the same connection asks for another way.
    pub transport: Transport,
    /// The receiver gives up when the sender is silent for so long.
    pub lease: Duration,
    /// Wanted blocks, ascending.
    pub wanted: Vec<Run>,
    /// Wanted pieces that have landed over an earlier connection.
    pub landed: Vec<LayerRun>,
}

/// The first token, sampled by the sender's node, handed over with the KV.
#[derive(Clone, Debug, PartialEq)]
pub struct FirstToken {
    /// The token.
    pub token: u32,
    /// If the request asked for them.
    pub logprobs: Option<Logprobs>,
    /// The sequence ends with this token.
    pub finish: Option<NodeFinish>,
}

/// Checks the length that stands before a frame.
pub fn frame_length(prefix: [u8; 4]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(prefix);
    if length == 0 || length as usize > MAX_FRAME_BYTES {
        return Err(FrameError::Length(length));
    }
    Ok(length as usize)
}

impl Frame {
    /// The transfer that it is about; `None` for those about the connection.
    #[must_use]
    pub fn transfer(&self) -> Option<TransferId> {
        match self {
            Self::Hello(_) | Self::Invite(_) | Self::Joined => None,
            Self::Offer(offer) => Some(offer.manifest.transfer),
            Self::Grant(grant) => Some(grant.transfer),
            Self::Retry(id, _)
            | Self::Finish(id, _)
            | Self::Complete(id)
            | Self::Cancel(id, _)
            | Self::Heartbeat(id)
            | Self::Read(id)
            | Self::Held(id)
            | Self::Announce(id, ..)
            | Self::Unable(id) => Some(*id),
        }
    }

    /// Appends the wire form, length included.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.u32(0);
        self.encode_body(out);
        let length = out.len() - start - 4;
        debug_assert!(length <= MAX_FRAME_BYTES, "a frame within its limit");
        out[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        let mut kind = |code: u8, id: &TransferId| {
            out.u8(code);
            out.transfer(*id);
        };
        match self {
            Self::Hello(hello) => {
                out.u8(1);
                out.u32(hello.oldest);
                out.u32(hello.newest);
                out.u64(hello.epoch.0);
                out.u8(hello.shared.is_some().into());
                if let Some((host, memory)) = &hello.shared {
                    out.bytes(host);
                    out.u32(memory.blocks);
                    out.list(&memory.description, |w, &byte| w.u8(byte));
                }
                out.u8(hello.devices);
            }
            Self::Offer(Offer { manifest, lease }) => {
                kind(2, &manifest.transfer);
                out.bytes(&manifest.root.0);
                out.geometry(&manifest.geometry);
                out.u32(manifest.blocks);
                out.list(&manifest.hashes, |w, hash| w.bytes(&hash.0));
                out.duration(*lease);
            }
            Self::Grant(grant) => {
                kind(3, &grant.transfer);
                out.u8(grant.transport as u8);
                out.duration(grant.lease);
                out.list(&grant.wanted, |w, &run| w.run(run));
                out.list(&grant.landed, |w, &at| w.layer_run(at));
            }
            Self::Retry(id, at) => {
                kind(4, id);
                out.layer_run(*at);
            }
            Self::Finish(id, first) => {
                kind(5, id);
                out.first_token(first);
            }
            Self::Complete(id) => kind(6, id),
            Self::Cancel(id, reason) => {
                kind(7, id);
                out.u8(*reason as u8);
            }
            Self::Heartbeat(id) => kind(8, id),
            Self::Read(id) => kind(9, id),
            Self::Held(id) => kind(10, id),
            Self::Invite(name) => {
                out.u8(11);
                out.list(name, |w, &byte| w.u8(byte));
            }
            Self::Joined => out.u8(12),
            Self::Announce(id, at, bytes) => {
                kind(13, id);
                out.layer_run(*at);
                out.u32(*bytes);
            }
            Self::Unable(id) => kind(14, id),
        }
    }

    /// Reads kind and body; the length before them has been taken off.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let mut r = Reader(bytes);
        let frame = match r.u8()? {
            1 => Self::Hello(Hello {
                oldest: r.u32()?,
                newest: r.u32()?,
                epoch: Epoch(r.u64()?),
                shared: r.shared_memory()?,
                devices: r.u8()?,
            }),
            2 => Self::Offer(Offer {
                manifest: Manifest {
                    transfer: r.transfer()?,
                    root: ModelRoot(r.bytes()?),
                    geometry: r.geometry()?,
                    blocks: r.blocks()?,
                    hashes: r
                        .list(MAX_BLOCKS as usize, "hash count", |r| r.bytes().map(BlockHash))?,
                },
                lease: r.duration()?,
            }),
            3 => Self::Grant(Grant {
                transfer: r.transfer()?,
                transport: Transport::from_code(r.u8()?)?,
                lease: r.duration()?,
                wanted: r.list(MAX_WANTED_RUNS, "wanted runs", Reader::run)?,
                landed: r.list(MAX_LANDED_RUNS, "landed runs", Reader::layer_run)?,
            }),
            4 => Self::Retry(r.transfer()?, r.layer_run()?),
            5 => Self::Finish(r.transfer()?, r.first_token()?),
            6 => Self::Complete(r.transfer()?),
            7 => Self::Cancel(r.transfer()?, Reason::from_code(r.u8()?)?),
            8 => Self::Heartbeat(r.transfer()?),
            9 => Self::Read(r.transfer()?),
            10 => Self::Held(r.transfer()?),
            11 => Self::Invite(r.channel_name()?),
            12 => Self::Joined,
            13 => Self::Announce(r.transfer()?, r.layer_run()?, r.u32()?),
            14 => Self::Unable(r.transfer()?),
            kind => return Err(FrameError::UnknownKind(kind)),
        };
        match r.0.len() {
            0 => Ok(frame),
            extra => Err(FrameError::Trailing(extra)),
        }
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hello(_) => "hello",
            Self::Offer(_) => "offer",
            Self::Grant(_) => "grant",
            Self::Retry(..) => "retry",
            Self::Finish(..) => "finish",
            Self::Complete(_) => "complete",
            Self::Cancel(..) => "cancel",
            Self::Heartbeat(_) => "heartbeat",
            Self::Read(_) => "read",
            Self::Held(_) => "held",
            Self::Invite(_) => "invite",
            Self::Joined => "joined",
            Self::Announce(..) => "announce",
            Self::Unable(_) => "unable",
        })
    }
}
