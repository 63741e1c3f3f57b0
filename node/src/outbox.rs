//! The streams to coordinators, from the side that says something.

use std::collections::HashMap;

use baton_proto::message::NodeEvent;
use tokio::sync::{mpsc, oneshot};

use crate::worker::StreamId;

/// Most events that wait for a coordinator to take them; with more its stream is closed.
pub const MAX_OUTBOX: usize = 4096;

/// The sending ends of all open streams.
#[derive(Default)]
pub(crate) struct Outboxes {
    open: HashMap<StreamId, Outbox>,
}

struct Outbox {
    events: mpsc::Sender<NodeEvent>,
    /// Dropping it ends the session that serves the stream.
    _session: oneshot::Sender<()>,
}

impl Outboxes {
    /// A stream opened.
    pub(crate) fn open(
        &mut self,
        stream: StreamId,
        events: mpsc::Sender<NodeEvent>,
        session: oneshot::Sender<()>,
    ) {
        self.open.insert(stream, Outbox { events, _session: session });
    }

    /// A stream ended.
    pub(crate) fn close(&mut self, stream: StreamId) {
        self.open.remove(&stream);
    }

    /// Says `event` to one coordinator. False: it did not read, and has lost its stream by that.
    pub(crate) fn tell(&mut self, stream: StreamId, event: NodeEvent) -> bool {
        let Some(outbox) = self.open.get(&stream) else { return true };
        let told = outbox.events.try_send(event).is_ok();
        if !told {
            tracing::warn!(stream = stream.0, "the coordinator does not read; closing its stream");
            self.open.remove(&stream);
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_that_does_not_read_loses_its_stream() {
        let mut outboxes = Outboxes::default();
        let (stream, (outbox, mut events)) = (StreamId(1), mpsc::channel(1));
        let (session, mut ended) = oneshot::channel();
        outboxes.open(stream, outbox, session);
        assert!(outboxes.tell(stream, NodeEvent::Tokens(Vec::new())));
        assert!(ended.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        assert!(!outboxes.tell(stream, NodeEvent::Tokens(Vec::new())), "one too many");
        assert!(ended.try_recv() == Err(oneshot::error::TryRecvError::Closed));
        assert!(outboxes.tell(stream, NodeEvent::Tokens(Vec::new())), "it is gone already");
        assert!(events.try_recv().is_ok());
        assert_eq!(events.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    }
}
