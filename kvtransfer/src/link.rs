//! One connection to another node: its control stream, and how it ends.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use baton_identity::peer_node_id;
use baton_proto::ids::{Epoch, NodeId};
use quinn::{Connection, ConnectionError, ReadExactError, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::direct::Remote;
use crate::error::SendError;
use crate::frame::{Frame, FrameError, Hello, Reason, frame_length};
use crate::inbox::Origin;
use crate::limits::{MAX_COPIES, MAX_QUEUED_FRAMES, MAX_UNITS};
use crate::sender::LinkId;
use crate::wire::Wire;

/// Why a connection was closed, as told to the peer. 0 is what QUIC says for a dropped one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CloseCode {
    /// The node stops; its transfers are over.
    Stopping = 1,
    /// The peer broke the protocol.
    Protocol = 2,
    /// The peer does not read what it is sent.
    Stuck = 3,
    /// No common version.
    Version = 4,
    /// The peer is an earlier life of its node.
    Epoch = 5,
    /// The same node has opened another one.
    Replaced = 6,
    /// Too many connections.
    Busy = 7,
    /// The peer's certificate names no node.
    Identity = 8,
}

impl CloseCode {
    pub(crate) fn matches(self, code: quinn::VarInt) -> bool {
        code.into_inner() == self as u64
    }
}

/// Why a payload stream ends early. The peer need not look.
pub(crate) const STREAM_ABANDONED: quinn::VarInt = quinn::VarInt::from_u32(0);

/// Why a connection cannot be used, or no longer.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    #[error("it sent {0}")]
    Frame(#[from] FrameError),
    #[error("it sent an unexpected {0} frame")]
    Unexpected(String),
    #[error("it broke the protocol: {0}")]
    Broke(&'static str),
    #[error("it ended the control stream")]
    ControlEnded,
    #[error("it was too slow with {0}")]
    Slow(&'static str),
    #[error("{0}")]
    Identity(String),
    #[error("it speaks versions {0} to {1}")]
    Version(u32, u32),
    #[error("it is in epoch {theirs}, not {expected}")]
    Epoch { expected: u64, theirs: u64 },
    #[error("nothing listens on {0}")]
    Refused(SocketAddr),
    #[error("{0}")]
    Dial(String),
}

impl LinkError {
    /// The error of transfers that cannot use the connection; `None` if trying again may help.
    pub(crate) fn fatal(&self) -> Option<SendError> {
        match self {
            Self::Connection(error) => fatal(error),
            Self::Identity(what) => Some(SendError::WrongPeer(what.clone())),
            Self::Epoch { expected, theirs } => {
                Some(SendError::WrongEpoch { expected: *expected, theirs: *theirs })
            }
            Self::Frame(_) | Self::Unexpected(_) | Self::Broke(_) => {
                Some(SendError::Protocol("what it sent is not in the protocol"))
            }
            // A life of a node that does not listen is over.
            Self::Version(..) | Self::Refused(_) => Some(SendError::Unreachable(self.to_string())),
            Self::ControlEnded | Self::Slow(_) | Self::Dial(_) => None,
        }
    }

    /// What the peer is told when it is this end that stops.
    pub(crate) fn close_code(&self) -> CloseCode {
        match self {
            Self::Slow(_) => CloseCode::Stuck,
            Self::Identity(_) => CloseCode::Identity,
            Self::Version(..) => CloseCode::Version,
            Self::Epoch { .. } => CloseCode::Epoch,
            _ => CloseCode::Protocol,
        }
    }
}

fn fatal(error: &ConnectionError) -> Option<SendError> {
    let code = match error {
        ConnectionError::TransportError(error) => u64::from(error.code),
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        ConnectionError::ApplicationClosed(close) => {
            let code = close.error_code;
            if CloseCode::Epoch.matches(code) {
                return Some(SendError::Refused(Reason::Epoch));
            }
            let passing = code.into_inner() == 0
                || CloseCode::Replaced.matches(code)
                || CloseCode::Stuck.matches(code)
                || CloseCode::Busy.matches(code);
            return (!passing).then(|| SendError::Unreachable(error.to_string()));
        }
        ConnectionError::VersionMismatch => {
            return Some(SendError::Unreachable(error.to_string()));
        }
        _ => return None,
    };
    // RFC 9001, section 4.8: alerts of the TLS handshake.
    let is_tls_alert = (0x100..0x200).contains(&code);
    is_tls_alert.then(|| SendError::WrongPeer(error.to_string()))
}

impl From<ReadExactError> for LinkError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => error.into(),
            _ => Self::ControlEnded,
        }
    }
}

impl From<quinn::WriteError> for LinkError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::ConnectionLost(error) => error.into(),
            _ => Self::ControlEnded,
        }
    }
}

/// A connection whose two ends know each other.
pub(crate) struct Link {
    pub(crate) id: LinkId,
    pub(crate) peer: NodeId,
    /// The peer's.
    pub(crate) epoch: Epoch,
    pub(crate) connection: Connection,
    frames: mpsc::Sender<Frame>,
    /// The peer's memory, if it was opened.
    pub(crate) remote: Option<OpenMemory>,
    /// Permits for copies from it.
    pub(crate) copies: Arc<Semaphore>,
    /// Permits for units of its payload in memory.
    pub(crate) units: Arc<Semaphore>,
    /// The channel, once this end has joined it.
    pub(crate) wire: OnceLock<Arc<Wire>>,
    /// It was named, which happens once.
    pub(crate) invited: AtomicBool,
    /// The sender has joined it.
    pub(crate) joined: AtomicBool,
}

/// Memory of a peer that was opened.
pub(crate) struct OpenMemory {
    pub(crate) blocks: u32,
    pub(crate) memory: Remote,
}

impl Link {
    /// The link, and the frames that [`write_frames`] is to write.
    pub(crate) fn new(
        id: LinkId,
        peer: NodeId,
        epoch: Epoch,
        connection: Connection,
    ) -> (Self, mpsc::Receiver<Frame>) {
        let (frames, queue) = mpsc::channel(MAX_QUEUED_FRAMES);
        let [copies, units] = [MAX_COPIES, MAX_UNITS].map(|most| Arc::new(Semaphore::new(most)));
        let (remote, wire) = (None, OnceLock::new());
        let (invited, joined) = (AtomicBool::new(false), AtomicBool::new(false));
        #[rustfmt::skip]
        let link = Self {
            id, peer, epoch, connection, frames, remote, copies, units, wire, invited, joined,
        };
        (link, queue)
    }

    /// Queues a control frame. A peer that lets the queue fill up loses the connection.
    pub(crate) fn send(&self, frame: Frame) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.frames.try_send(frame) {
            self.close(CloseCode::Stuck);
        }
    }

    pub(crate) fn close(&self, code: CloseCode) {
        close(&self.connection, code);
    }

    /// The channel, if it can be used.
    pub(crate) fn wire(&self) -> Option<&Arc<Wire>> {
        self.wire.get().filter(|wire| !wire.is_broken())
    }

    /// Whether the sender may be asked for payload through the channel.
    pub(crate) fn delivers(&self) -> bool {
        self.wire().is_some() && self.joined.load(Ordering::Relaxed)
    }
}

impl Origin for Arc<Link> {
    fn id(&self) -> LinkId {
        self.id
    }

    fn node(&self) -> &NodeId {
        &self.peer
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }
}

pub(crate) fn close(connection: &Connection, code: CloseCode) {
    connection.close(quinn::VarInt::from_u32(code as u32), &[]);
}

/// The node at the other end, as its verified certificate says.
pub(crate) fn peer_of(connection: &Connection) -> Result<NodeId, LinkError> {
    let chain = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = chain.as_ref().and_then(|chain| chain.first());
    let leaf = leaf.ok_or_else(|| LinkError::Identity("no certificate".to_owned()))?;
    peer_node_id(leaf).map_err(|error| LinkError::Identity(error.to_string()))
}

/// Reads the next control frame: waits for its beginning as long as the connection lives, and
/// then `patience` for the rest.
pub(crate) async fn read_frame(
    stream: &mut RecvStream,
    buffer: &mut Vec<u8>,
    patience: Duration,
) -> Result<Frame, LinkError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    buffer.resize(frame_length(prefix)?, 0);
    timeout(patience, stream.read_exact(buffer))
        .await
        .map_err(|_| LinkError::Slow("a control frame"))??;
    Ok(Frame::decode(buffer)?)
}

/// Reads the peer's hello, as [`read_frame`] does, and checks that there is a common version.
pub(crate) async fn read_hello(
    stream: &mut RecvStream,
    patience: Duration,
) -> Result<Hello, LinkError> {
    match read_frame(stream, &mut Vec::new(), patience).await? {
        Frame::Hello(hello) if hello.common_version().is_some() => Ok(hello),
        Frame::Hello(hello) => Err(LinkError::Version(hello.oldest, hello.newest)),
        other => Err(LinkError::Unexpected(other.to_string())),
    }
}

/// Writes one frame now.
pub(crate) async fn write_frame(stream: &mut SendStream, frame: &Frame) -> Result<(), LinkError> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    Ok(stream.write_all(&bytes).await?)
}

/// Writes queued frames until the connection is lost; those that wait together go together.
pub(crate) async fn write_frames(
    mut queue: mpsc::Receiver<Frame>,
    mut stream: SendStream,
) -> Result<(), LinkError> {
    let mut bytes = Vec::new();
    while let Some(frame) = queue.recv().await {
        frame.encode(&mut bytes);
        while bytes.len() < (64 << 10)
            && let Ok(frame) = queue.try_recv()
        {
            frame.encode(&mut bytes);
        }
        stream.write_all(&bytes).await?;
        bytes.clear();
    }
    Ok(())
}
