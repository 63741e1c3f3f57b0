//! A client's connection, plain or encrypted, that does not wait for ever.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::entrance::Patience;
use super::room::Place;

/// The first bytes: those of HTTP/2's preface, or most of HTTP/1's first line.
const GREETING_BYTES: usize = 16;

/// A client's connection. Reading fails if the client does not say anything at first, writing fails
/// if it takes nothing. How long a request's headers may take is up to who serves it.
pub(crate) struct Connection {
    io: Io,
    info: TcpConnectInfo,
    _place: Place,
    /// Bytes that are still to come in time.
    greeting: usize,
    greeted_by: Pin<Box<Sleep>>,
    /// Since when nothing could be written, if something is to be.
    stalled: bool,
    stall: Duration,
    stalled_until: Pin<Box<Sleep>>,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    pub(super) fn plain(stream: TcpStream, place: Place, patience: Patience) -> Self {
        let info = stream.connect_info();
        Self::new(Io::Plain(stream), info, place, patience)
    }

    pub(super) fn tls(stream: TlsStream<TcpStream>, place: Place, patience: Patience) -> Self {
        let info = stream.get_ref().0.connect_info();
        Self::new(Io::Tls(Box::new(stream)), info, place, patience)
    }

    fn new(io: Io, info: TcpConnectInfo, place: Place, patience: Patience) -> Self {
        Self {
            io,
            info,
            _place: place,
            greeting: GREETING_BYTES,
            greeted_by: Box::pin(sleep(patience.greeting)),
            stalled: false,
            stall: patience.stall,
            stalled_until: Box::pin(sleep(patience.stall)),
        }
    }

    /// Passes on what came of writing; an error if nothing did for too long.
    fn watch_stall<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = false;
            return written;
        }
        if !self.stalled {
            self.stalled = true;
            self.stalled_until.as_mut().reset(Instant::now() + self.stall);
        }
        ready!(self.stalled_until.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = match &mut this.io {
            Io::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        this.greeting = this.greeting.saturating_sub(buffer.filled().len() - before);
        if read.is_pending() && this.greeting > 0 {
            ready!(this.greeted_by.as_mut().poll(context));
            let silent = io::Error::new(io::ErrorKind::TimedOut, "the client says nothing");
            return Poll::Ready(Err(silent));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = match &mut this.io {
            Io::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Io::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        };
        this.watch_stall(written, context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = match &mut this.io {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(context, parts),
        };
        this.watch_stall(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = match &mut this.io {
            Io::Plain(stream) => Pin::new(stream).poll_flush(context),
            Io::Tls(stream) => Pin::new(stream).poll_flush(context),
        };
        this.watch_stall(flushed, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let closed = match &mut this.io {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        };
        this.watch_stall(closed, context)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.info.clone()
    }
}
