//! QUIC as KV transfers use it. What is set here was measured on loopback: a large datagram
//! matters most, then AES-128-GCM (which the identity prefers), then payload that is not copied.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use baton_identity::Identity;
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ClientConfig, EndpointConfig, MtuDiscoveryConfig, Runtime, ServerConfig,
    TokioRuntime, TransportConfig, UdpPoller, VarInt,
};
use socket2::SockRef;

use crate::limits::{
    CONNECTION_WINDOW, MAX_HANDSHAKES, MAX_PAYLOAD_STREAMS, SEND_WINDOW, STREAM_WINDOW, Timing,
};

/// The protocol's name in TLS.
pub(crate) const ALPN: &[u8] = b"baton-kv/1";

/// Largest datagram tried over a network: fits a jumbo frame of 9000 bytes.
const NETWORK_DATAGRAM: u16 = 8952;
/// Largest datagram tried over loopback: the largest there is.
const LOOPBACK_DATAGRAM: u16 = 65_507;
/// The kernel takes at most 64 KiB at a time, split into datagrams; quinn would exceed that with
/// large ones, and every send would fail and be repeated without the split.
const LARGEST_SEND: usize = 65_507;

/// Kernel buffers of the socket, in each direction.
const SOCKET_BUFFER: usize = 8 << 20;
/// Bytes sent before the first acknowledgement. Well above the largest datagram, because a probe
/// for it counts: one that filled the window would hold everything up, even a farewell.
const INITIAL_WINDOW: u64 = 1 << 19;

/// A QUIC endpoint on `listen`, and how it dials.
pub(crate) fn bind(
    listen: SocketAddr,
    identity: &Identity,
    timing: &Timing,
) -> io::Result<(quinn::Endpoint, ClientConfig)> {
    let datagram = if listen.ip().is_loopback() { LOOPBACK_DATAGRAM } else { NETWORK_DATAGRAM };
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(datagram).expect("a datagram size in QUIC's range");

    let runtime = Arc::new(TokioRuntime);
    let socket = UdpSocket::bind(listen)?;
    widen_buffers(&socket);
    let socket = runtime.wrap_udp_socket(socket)?;
    let socket = Arc::new(BoundedSends { segments: LARGEST_SEND / usize::from(datagram), socket });
    let server = server_config(identity, timing, datagram);
    let quic = quinn::Endpoint::new_with_abstract_socket(config, Some(server), socket, runtime)?;
    Ok((quic, client_config(identity, timing, datagram)))
}

/// Asks for buffers that hold what a busy receiver has not yet read; the kernel grants at most
/// its own limits (`net.core.rmem_max`, `wmem_max`). With the usual default, every fifth of the
/// largest datagrams is lost.
fn widen_buffers(socket: &UdpSocket) {
    let socket = SockRef::from(socket);
    let widened = socket
        .set_recv_buffer_size(SOCKET_BUFFER)
        .and_then(|()| socket.set_send_buffer_size(SOCKET_BUFFER));
    if let Err(error) = widened {
        tracing::debug!(%error, "KV transfers keep the default socket buffers");
    }
}

fn server_config(identity: &Identity, timing: &Timing, datagram: u16) -> ServerConfig {
    let tls = QuicServerConfig::try_from(identity.rustls_server(&[ALPN]))
        .expect("the identity's TLS has AES-128-GCM");
    let mut transport = transport_config(timing, datagram);
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(MAX_PAYLOAD_STREAMS));
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config
        .transport_config(Arc::new(transport))
        .migration(false)
        .max_incoming(MAX_HANDSHAKES)
        .incoming_buffer_size(64 << 10)
        .incoming_buffer_size_total(4 << 20);
    config
}

fn client_config(identity: &Identity, timing: &Timing, datagram: u16) -> ClientConfig {
    let tls = QuicClientConfig::try_from(identity.rustls_client(&[ALPN]))
        .expect("the identity's TLS has AES-128-GCM");
    let mut transport = transport_config(timing, datagram);
    // The receiver answers on the stream that the sender opens, and opens none.
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0));
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    config
}

fn transport_config(timing: &Timing, datagram: u16) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(datagram);
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    let mut transport = TransportConfig::default();
    transport
        .congestion_controller_factory(Arc::new(congestion))
        .mtu_discovery_config(Some(mtu))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .max_idle_timeout(Some(timing.idle.try_into().expect("an idle timeout of seconds")))
        .keep_alive_interval(Some(timing.idle / 4))
        .datagram_receive_buffer_size(None);
    transport
}

/// A socket that hands no more datagrams at a time to the kernel than it takes.
#[derive(Debug)]
struct BoundedSends {
    socket: Arc<dyn AsyncUdpSocket>,
    segments: usize,
}

impl AsyncUdpSocket for BoundedSends {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments().min(self.segments)
    }

    /// Sizes quinn's receive buffers: 64 KiB hold all that the kernel ever joins, whatever the
    /// size of its parts.
    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments().min(self.segments + 1)
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

/// Whether nothing listens on a loopback address. A QUIC handshake would only find out by
/// waiting, because an unconnected socket is not told.
pub(crate) fn is_refused(address: SocketAddr) -> bool {
    let probe = || {
        let mut local = address;
        local.set_port(0);
        let socket = UdpSocket::bind(local)?;
        socket.set_nonblocking(true)?;
        socket.connect(address)?;
        socket.send(&[0])?;
        socket.recv(&mut [0])
    };
    address.ip().is_loopback()
        && probe().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
