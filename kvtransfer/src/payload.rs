//! Payload units on unidirectional streams: one stream per transfer and connection.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::ids::TransferId;
use bytes::{Bytes, BytesMut};
use crc32c::crc32c_append;
use quinn::{ReadExactError, RecvStream, SendStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::direct::Transport;
use crate::endpoint::{Shared, lock};
use crate::frame::{FrameError, LayerRun, UnitHeader};
use crate::limits::MAX_REFERENCES;
use crate::link::{Link, LinkError, STREAM_ABANDONED};
use crate::receive::{Inbound, Late};
use crate::sender::LinkId;

/// The sending end: a transfer's stream of the current connection and transport, opened by the
/// first unit.
#[derive(Default)]
pub(crate) struct PayloadStream(Option<((LinkId, Transport), SendStream)>);

impl PayloadStream {
    /// Opens the stream, unless it is; the peer bounds how many are. False: the connection is lost.
    pub(crate) async fn open(&mut self, link: &Link, transport: Transport) -> bool {
        let of = (link.id, transport);
        if self.0.as_ref().is_some_and(|(current, _)| *current == of) {
            return true;
        }
        self.abandon();
        if let Ok(stream) = link.connection.open_uni().await {
            self.0 = Some((of, stream));
        }
        self.0.is_some()
    }

    /// Sends one unit, without copying what it holds. On failure the stream is gone.
    pub(crate) async fn write_unit(
        &mut self,
        (transfer, transport, pieces): (TransferId, Transport, LayerRun),
        data: Vec<Bytes>,
    ) {
        let Some((_, stream)) = &mut self.0 else { return };
        let header = UnitHeader { transfer, pieces, transport, length: 0, checksum: 0 };
        let mut chunks = unit(header, data);
        if stream.write_all_chunks(&mut chunks).await.is_err() {
            self.abandon();
        }
    }

    /// Stops, and lets go of every byte that QUIC still holds.
    pub(crate) fn abandon(&mut self) {
        if let Some((_, mut stream)) = self.0.take() {
            let _ = stream.reset(STREAM_ABANDONED);
        }
    }
}

/// A unit's header and what it holds.
fn unit(mut header: UnitHeader, data: Vec<Bytes>) -> Vec<Bytes> {
    header.length = u32::try_from(data.iter().map(Bytes::len).sum::<usize>())
        .expect("a unit is far below 4 GiB");
    let start = header.checksum_start();
    header.checksum = data.iter().fold(start, |sum, piece| crc32c_append(sum, piece));
    let mut chunks = Vec::with_capacity(1 + data.len());
    chunks.push(header.encode().into());
    chunks.extend(data);
    chunks
}

/// Why a payload stream is not read to its end.
enum Stop {
    /// Its transfer has ended, or is not known, or the stream or connection is lost.
    Over,
    /// The connection cannot be trusted to carry the rest.
    Link(LinkError),
}

impl From<FrameError> for Stop {
    fn from(error: FrameError) -> Self {
        Self::Link(error.into())
    }
}

impl From<LinkError> for Stop {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

/// The receiving end: reads one stream to its end. An error closes the connection.
pub(crate) async fn read_units(
    shared: Arc<Shared>,
    link: Arc<Link>,
    mut stream: RecvStream,
) -> Result<(), LinkError> {
    let stop = match read_first(&shared, &link, &mut stream).await {
        Ok((header, inbound)) => read_rest(&shared, &link, &mut stream, header, &inbound).await,
        Err(stop) => stop,
    };
    let _ = stream.stop(STREAM_ABANDONED);
    match stop {
        Stop::Over => Ok(()),
        Stop::Link(error) => Err(error),
    }
}

/// The first unit's header names the transfer of the stream. It comes with the stream's opening;
/// to stop one that is merely slow would lose a unit, so then the connection is made anew.
async fn read_first(
    shared: &Shared,
    link: &Arc<Link>,
    stream: &mut RecvStream,
) -> Result<(UnitHeader, Arc<Inbound>), Stop> {
    let patience: Duration = shared.timing.message;
    let header = timeout(patience, read_header(stream)).await;
    let header = header.map_err(|_| Stop::Link(LinkError::Slow("a payload header")))??;
    let inbound = lock(&shared.inbox).find(header.transfer, link);
    Ok((header, inbound.ok_or(Stop::Over)?))
}

async fn read_rest(
    shared: &Arc<Shared>,
    link: &Link,
    stream: &mut RecvStream,
    first: UnitHeader,
    inbound: &Arc<Inbound>,
) -> Stop {
    let mut outcome = inbound.outcome();
    let read = async {
        let (mut header, mut unit) = (first, Unit::default());
        loop {
            let read = match header.transport {
                Transport::Quic => unit.read(shared, link, stream, &header, inbound).await,
                Transport::Ipc => read_references(shared, link, stream, &header, inbound).await,
                // Parcels are announced.
                Transport::Nccl => Err(LinkError::Unexpected("payload unit".to_owned()).into()),
            };
            if let Err(stop) = read {
                return stop;
            }
            header = match read_header(stream).await {
                Ok(header) if header.transfer == first.transfer => header,
                Ok(_) => return FrameError::MixedStream.into(),
                Err(stop) => return stop,
            };
        }
    };
    tokio::select! {
        stop = read => stop,
        _ = outcome.wait_for(Option::is_some) => Stop::Over,
    }
}

/// The unit that is being read, and the one before it.
#[derive(Default)]
struct Unit {
    bytes: BytesMut,
    landing: Option<JoinHandle<()>>,
}

impl Unit {
    /// Reads a unit, and then waits for the one before it to land. It is read whole before it asks for
    /// a place: who is slow to send keeps no place from others.
    async fn read(
        &mut self,
        shared: &Arc<Shared>,
        link: &Link,
        stream: &mut RecvStream,
        header: &UnitHeader,
        inbound: &Arc<Inbound>,
    ) -> Result<(), Stop> {
        let length = header.length as usize;
        // Refused before it is read: a peer cannot make this end buffer more.
        if length > inbound.most_bytes() {
            return Err(FrameError::OutOfRange { what: "a unit", value: header.length }.into());
        }
        let permit = link.units.clone().acquire_owned().await.map_err(|_| Stop::Over)?;
        self.bytes.reserve(length);
        let mut checksum = header.checksum_start();
        while self.bytes.len() < length {
            let Ok(Some(chunk)) = stream.read_chunk(length - self.bytes.len(), true).await else {
                return Err(Stop::Over);
            };
            checksum = crc32c_append(checksum, &chunk.bytes);
            self.bytes.extend_from_slice(&chunk.bytes);
        }
        if let Some(before) = self.landing.take() {
            let _ = before.await;
        }
        let bytes = (self.bytes.split().freeze(), permit);
        let landing = inbound.unit(shared, link.id, (header, checksum), bytes);
        self.landing = landing.map_err(|Late| Stop::Over)?;
        Ok(())
    }
}

/// A unit of references: it is read whole, and what they refer to is copied while the next one
/// arrives.
async fn read_references(
    shared: &Arc<Shared>,
    link: &Link,
    stream: &mut RecvStream,
    header: &UnitHeader,
    inbound: &Arc<Inbound>,
) -> Result<(), Stop> {
    // Refused before it is read: a peer cannot make this end buffer more.
    let Some(remote) = link.remote.as_ref().filter(|_| header.length <= 4 * MAX_REFERENCES) else {
        return Err(FrameError::OutOfRange { what: "references", value: header.length }.into());
    };
    let mut bytes = vec![0; header.length as usize];
    stream.read_exact(&mut bytes).await.map_err(|_| Stop::Over)?;
    let checksum = crc32c_append(header.checksum_start(), &bytes);
    let blocks: Vec<u32> =
        bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
    if checksum == header.checksum
        && let Some(&value) = blocks.iter().find(|&&block| block >= remote.blocks)
    {
        return Err(FrameError::OutOfRange { what: "a reference", value }.into());
    }
    let permit = link.copies.clone().acquire_owned().await.map_err(|_| Stop::Over)?;
    match inbound.references(shared, link, (header, checksum), blocks, permit) {
        true => Ok(()),
        false => Err(Stop::Over),
    }
}

async fn read_header(stream: &mut RecvStream) -> Result<UnitHeader, Stop> {
    let mut bytes = [0; UnitHeader::BYTES];
    match stream.read_exact(&mut bytes).await {
        Ok(()) => Ok(UnitHeader::decode(&bytes)?),
        Err(ReadExactError::FinishedEarly(_) | ReadExactError::ReadError(_)) => Err(Stop::Over),
    }
}
