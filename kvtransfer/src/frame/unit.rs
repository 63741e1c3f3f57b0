//! What stands before payload.

use baton_proto::ids::TransferId;

use super::{FrameError, LayerRun};
use crate::codec::{Reader, Writer};
use crate::direct::Transport;

/// What stands before the pieces of a payload unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitHeader {
    /// The transfer.
    pub transfer: TransferId,
    /// Which pieces follow, in order. Not checked against anything yet.
    pub pieces: LayerRun,
    /// Whether their bytes follow, or references to them: the number of each block, as `u32`.
    pub transport: Transport,
    /// Bytes that follow.
    pub length: u32,
    /// CRC-32C of the header before it and of those bytes.
    pub checksum: u32,
}

impl UnitHeader {
    /// Size of the wire form.
    pub const BYTES: usize = 41;

    /// What the checksum starts from, so that it also covers where the bytes belong.
    #[must_use]
    pub fn checksum_start(&self) -> u32 {
        crc32c::crc32c(&self.encode()[..Self::BYTES - size_of::<u32>()])
    }

    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::BYTES);
        out.transfer(self.transfer);
        out.layer_run(self.pieces);
        out.u8(self.transport as u8);
        out.u32(self.length);
        out.u32(self.checksum);
        out
    }

    /// The inverse of [`Self::encode`].
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, FrameError> {
        let mut r = Reader(bytes);
        Ok(Self {
            transfer: r.transfer()?,
            pieces: r.layer_run()?,
            transport: Transport::from_code(r.u8()?)?,
            length: r.u32()?,
            checksum: r.u32()?,
        })
    }
}
