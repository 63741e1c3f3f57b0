//! Little-endian reading and writing of control frames. Reading checks every length and range.

use std::time::Duration;

use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::{Logprobs, NodeFinish};
use baton_proto::sampling::MAX_LOGPROBS;

use crate::channel::ChannelName;
use crate::direct::{HostMark, SharedMemory};
use crate::frame::{FirstToken, FrameError};
use crate::grid::{LayerRun, Run};
use crate::limits::{
    MAX_BLOCKS, MAX_CHANNEL_NAME_BYTES, MAX_DESCRIPTION_BYTES, MAX_LAYERS, MAX_PIECE_BYTES,
};

/// The unread rest of a frame.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(FrameError::Truncated)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FrameError> {
        self.bytes::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FrameError> {
        self.bytes().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FrameError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn f32(&mut self) -> Result<f32, FrameError> {
        self.u32().map(f32::from_bits)
    }

    fn within(
        &mut self,
        range: std::ops::RangeInclusive<u32>,
        what: &'static str,
    ) -> Result<u32, FrameError> {
        let value = self.u32()?;
        if range.contains(&value) { Ok(value) } else { Err(FrameError::OutOfRange { what, value }) }
    }

    /// A list whose length is in front. Grows as items are read, never ahead of them.
    pub(crate) fn list<T>(
        &mut self,
        most: usize,
        what: &'static str,
        mut item: impl FnMut(&mut Self) -> Result<T, FrameError>,
    ) -> Result<Vec<T>, FrameError> {
        let length = self.within(0..=most as u32, what)?;
        (0..length).map(|_| item(self)).collect()
    }

    pub(crate) fn duration(&mut self) -> Result<Duration, FrameError> {
        self.u32().map(|ms| Duration::from_millis(ms.into()))
    }

    pub(crate) fn transfer(&mut self) -> Result<TransferId, FrameError> {
        Ok(TransferId {
            request: RequestId(u128::from_le_bytes(self.bytes()?)),
            attempt: self.u32()?,
        })
    }

    pub(crate) fn shared_memory(&mut self) -> Result<Option<(HostMark, SharedMemory)>, FrameError> {
        match self.u8()? {
            0 => Ok(None),
            1 => {
                let (host, blocks) = (self.bytes()?, self.u32()?);
                let description = self.list(MAX_DESCRIPTION_BYTES, "description", Self::u8)?;
                Ok(Some((host, SharedMemory { blocks, description })))
            }
            code => Err(FrameError::UnknownCode { what: "shared memory", code }),
        }
    }

    pub(crate) fn channel_name(&mut self) -> Result<ChannelName, FrameError> {
        self.list(MAX_CHANNEL_NAME_BYTES, "bytes of a channel's name", Self::u8)
    }

    pub(crate) fn blocks(&mut self) -> Result<u32, FrameError> {
        self.within(1..=MAX_BLOCKS, "block count")
    }

    pub(crate) fn run(&mut self) -> Result<Run, FrameError> {
        let first = self.within(0..=MAX_BLOCKS - 1, "first block")?;
        let count = self.within(1..=MAX_BLOCKS - first, "run of blocks")?;
        Ok(Run { first, count })
    }

    pub(crate) fn layer_run(&mut self) -> Result<LayerRun, FrameError> {
        let layer = self.within(0..=MAX_LAYERS - 1, "layer")?;
        Ok(LayerRun { layer, run: self.run()? })
    }

    pub(crate) fn geometry(&mut self) -> Result<KvGeometry, FrameError> {
        let dimension = 1..=4096;
        let geometry = KvGeometry {
            layers: self.within(1..=MAX_LAYERS, "layer count")?,
            kv_heads: self.within(dimension.clone(), "head count")?,
            head_dim: self.within(dimension.clone(), "head size")?,
            dtype: self.dtype()?,
            block_tokens: self.within(dimension, "block size")?,
        };
        let value = geometry.piece_bytes();
        if value > MAX_PIECE_BYTES {
            let value = u32::try_from(value).unwrap_or(u32::MAX);
            return Err(FrameError::OutOfRange { what: "bytes of a piece", value });
        }
        Ok(geometry)
    }

    fn dtype(&mut self) -> Result<KvDtype, FrameError> {
        match self.u8()? {
            0 => Ok(KvDtype::F32),
            1 => Ok(KvDtype::Bf16),
            2 => Ok(KvDtype::F16),
            3 => Ok(KvDtype::Fp8),
            code => Err(FrameError::UnknownCode { what: "element type", code }),
        }
    }

    pub(crate) fn first_token(&mut self) -> Result<FirstToken, FrameError> {
        Ok(FirstToken { token: self.u32()?, logprobs: self.logprobs()?, finish: self.finish()? })
    }

    fn logprobs(&mut self) -> Result<Option<Logprobs>, FrameError> {
        match self.u8()? {
            0 => Ok(None),
            1 => Ok(Some(Logprobs {
                logprob: self.f32()?,
                top: self.list(MAX_LOGPROBS as usize, "log-probabilities", |r| {
                    Ok((r.u32()?, r.f32()?))
                })?,
            })),
            code => Err(FrameError::UnknownCode { what: "log-probabilities", code }),
        }
    }

    fn finish(&mut self) -> Result<Option<NodeFinish>, FrameError> {
        match self.u8()? {
            0 => Ok(None),
            1 => Ok(Some(NodeFinish::EndOfSequence)),
            2 => Ok(Some(NodeFinish::StopToken(self.u32()?))),
            3 => Ok(Some(NodeFinish::Length)),
            code => Err(FrameError::UnknownCode { what: "finish", code }),
        }
    }
}

/// What is appended to a frame in the making.
pub(crate) trait Writer {
    fn u8(&mut self, value: u8);
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
    fn bytes(&mut self, bytes: &[u8]);

    fn list<T>(&mut self, items: &[T], mut item: impl FnMut(&mut Self, &T)) {
        self.u32(items.len() as u32);
        for i in items {
            item(self, i);
        }
    }

    fn duration(&mut self, duration: Duration) {
        self.u32(u32::try_from(duration.as_millis()).unwrap_or(u32::MAX));
    }

    fn transfer(&mut self, id: TransferId) {
        self.bytes(&id.request.0.to_le_bytes());
        self.u32(id.attempt);
    }

    fn run(&mut self, run: Run) {
        self.u32(run.first);
        self.u32(run.count);
    }

    fn layer_run(&mut self, at: LayerRun) {
        self.u32(at.layer);
        self.run(at.run);
    }

    fn geometry(&mut self, geometry: &KvGeometry) {
        self.u32(geometry.layers);
        self.u32(geometry.kv_heads);
        self.u32(geometry.head_dim);
        self.u8(match geometry.dtype {
            KvDtype::F32 => 0,
            KvDtype::Bf16 => 1,
            KvDtype::F16 => 2,
            KvDtype::Fp8 => 3,
        });
        self.u32(geometry.block_tokens);
    }

    fn first_token(&mut self, first: &FirstToken) {
        self.u32(first.token);
        self.u8(first.logprobs.is_some().into());
        if let Some(logprobs) = &first.logprobs {
            self.u32(logprobs.logprob.to_bits());
            self.list(&logprobs.top, |w, &(token, logprob)| {
                w.u32(token);
                w.u32(logprob.to_bits());
            });
        }
        match first.finish {
            None => self.u8(0),
            Some(NodeFinish::EndOfSequence) => self.u8(1),
            Some(NodeFinish::StopToken(token)) => {
                self.u8(2);
                self.u32(token);
            }
            Some(NodeFinish::Length) => self.u8(3),
        }
    }
}

impl Writer for Vec<u8> {
    fn u8(&mut self, value: u8) {
        self.push(value);
    }

    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
