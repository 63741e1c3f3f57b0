//! Accepting connections: each is made ready beside the others, so that who is slow holds up nobody.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// When the process has no file descriptors left, waiting is all that helps.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that wait to be served.
const WAITING_CONNECTIONS: usize = 64;

/// New connections, ready to be served; dropping it closes the port.
pub(crate) type Incoming<C> = ReceiverStream<io::Result<C>>;

/// Begins to accept connections. `greet` refuses one at once, by `None`, or makes it ready, which may
/// fail as well; how long that may take, and how many may do it, is up to it.
pub(crate) fn connections<C, F>(
    listener: TcpListener,
    greet: impl Fn(TcpStream, SocketAddr) -> Option<F> + Send + 'static,
) -> Incoming<C>
where
    C: Send + 'static,
    F: Future<Output = Option<C>> + Send + 'static,
{
    let (sender, connections) = mpsc::channel(WAITING_CONNECTIONS);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Some(greeted) = greet(stream, address) else { continue };
            let sender = sender.clone();
            tokio::spawn(async move {
                if let Some(connection) = greeted.await {
                    // Whoever serves them may have stopped.
                    drop(sender.send(Ok(connection)).await);
                }
            });
        }
    });
    ReceiverStream::new(connections)
}
