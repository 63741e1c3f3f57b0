//! Ways for a payload that spare the network: memory that both ends can reach.
//!
//! Whoever owns the memory of a node [describes](Direct::shared) it to the peers that it sends to.
//! A receiver on the same machine opens it and asks, with its grant, for references instead of
//! bytes; it copies what they refer to itself. Nobody writes to another one's memory: late reads
//! spoil nothing but a transfer that has failed, late writes would spoil another sequence's blocks.
//!
//! If the copy fails, the receiver asks for the bytes with a new grant, and does not try again for
//! [`DIRECT_PAUSE`](crate::limits::DIRECT_PAUSE).

use std::any::Any;
use std::fmt;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;

use crate::frame::FrameError;
use crate::memory::Soon;

/// How payload travels; a greater one is better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Transport {
    /// Bytes over QUIC.
    Quic = 0,
    /// Bytes through a [channel](crate::Channel) between devices, neither encrypted nor checked.
    Nccl = 1,
    /// References to memory of the same machine, which the receiver copies from.
    Ipc = 2,
}

impl Transport {
    /// Every transport, best first.
    pub const ALL: [Self; 3] = [Self::Ipc, Self::Nccl, Self::Quic];

    /// Its name in configurations, reports and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Nccl => "nccl",
            Self::Ipc => "ipc",
        }
    }

    pub(crate) fn from_code(code: u8) -> Result<Self, FrameError> {
        let known = Self::ALL.into_iter().find(|&transport| transport as u8 == code);
        known.ok_or(FrameError::UnknownCode { what: "transport", code })
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The memory of a node's blocks, as it is described to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// References are below this.
    pub blocks: u32,
    /// What opens it; only its owners at both ends know how. At most
    /// [`MAX_DESCRIPTION_BYTES`](crate::limits::MAX_DESCRIPTION_BYTES).
    pub description: Vec<u8>,
}

/// Memory of a peer that was opened. Open until it is dropped.
pub type Remote = Arc<dyn Any + Send + Sync>;

/// The memory of a node, for transfers that spare the network.
pub trait Direct: Send + Sync + 'static {
    /// What peers need to read this node's blocks. Whoever is told may read all of them, and what
    /// the device's driver grants may go beyond: it is told to peers with an identity of the
    /// cluster only.
    fn shared(&self) -> SharedMemory;

    /// Opens a peer's memory; `None` if that cannot be done, for whatever reason.
    fn open(&self, shared: SharedMemory) -> Soon<Option<Remote>>;
}

/// The name of a machine in [`Hello`](crate::frame::Hello).
pub type HostMark = [u8; 16];

/// Shows to other processes that they run on the same machine: a socket with a random name that
/// only they can see. (Names of hosts are not unique, and a handle of another machine's memory
/// might open something here.)
pub(crate) struct Host {
    pub(crate) mark: HostMark,
    _socket: UnixDatagram,
}

impl Host {
    /// `None` if there are no such sockets here.
    pub(crate) fn new() -> Option<Self> {
        let mut mark = HostMark::default();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.secure_random.fill(&mut mark).ok()?;
        let socket = UnixDatagram::bind_addr(&address(&mark)?).ok()?;
        Some(Self { mark, _socket: socket })
    }
}

/// Whether the process that says so runs on this machine.
pub(crate) fn is_here(mark: &HostMark) -> bool {
    let connect = || {
        let socket = UnixDatagram::unbound().ok()?;
        socket.connect_addr(&address(mark)?).ok()
    };
    connect().is_some()
}

/// In the abstract namespace, which is the kernel's own: nothing is left behind by a process that
/// dies, and no shared file system can carry it to another machine.
fn address(mark: &HostMark) -> Option<SocketAddr> {
    let mark = u128::from_be_bytes(*mark);
    SocketAddr::from_abstract_name(format!("baton-kv-{mark:032x}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_seen_as_long_as_its_process_lives() {
        let host = Host::new().unwrap();
        let mark = host.mark;
        assert!(is_here(&mark));
        assert_ne!(Host::new().unwrap().mark, mark);
        drop(host);
        assert!(!is_here(&mark));
    }
}
