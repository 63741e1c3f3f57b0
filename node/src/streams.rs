//! What a node says to each coordinator that it has joined.

use std::collections::HashMap;

use baton_proto::hash::BlockHash;
use baton_proto::message::NodeEvent;
use tokio::sync::{mpsc, oneshot};

/// Most events that wait for a coordinator to take them; with more its stream is closed.
pub const MAX_OUTBOX: usize = 4096;

/// Hashes of one message of a snapshot: 1 MiB.
const SNAPSHOT_PART: usize = 65_536;

/// One stream to one coordinator; a new one for every dial.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StreamId(pub u64);

/// The sending ends of all open streams.
///
/// Every stream numbers its own cache events. Engine events are ordered, so what a stream was
/// told up to a snapshot is exactly what the snapshot includes.
#[derive(Default)]
pub struct Streams {
    open: HashMap<StreamId, Stream>,
}

struct Stream {
    outbox: mpsc::Sender<NodeEvent>,
    /// Number of the last cache event.
    sequence: u64,
    /// Before its first snapshot a stream needs no cache events.
    has_snapshot: bool,
    wants_snapshot: bool,
    /// Dropping it ends the session that serves the stream.
    _session: oneshot::Sender<()>,
}

impl Streams {
    /// A stream opened. It wants a snapshot, which the caller asks the engine for.
    pub fn open(
        &mut self,
        id: StreamId,
        outbox: mpsc::Sender<NodeEvent>,
        session: oneshot::Sender<()>,
    ) {
        let stream = Stream {
            outbox,
            sequence: 0,
            has_snapshot: false,
            wants_snapshot: true,
            _session: session,
        };
        self.open.insert(id, stream);
    }

    /// Whether a stream is open. What comes from one that is not is void.
    #[must_use]
    pub fn is_open(&self, id: StreamId) -> bool {
        self.open.contains_key(&id)
    }

    /// A stream ended.
    pub fn close(&mut self, id: StreamId) {
        self.open.remove(&id);
    }

    /// The coordinator asked for a snapshot, which the caller asks the engine for.
    pub fn want_snapshot(&mut self, id: StreamId) {
        if let Some(stream) = self.open.get_mut(&id) {
            stream.wants_snapshot = true;
        }
    }

    /// Says `event` to one coordinator. A coordinator that does not listen loses its stream.
    pub fn send(&mut self, id: StreamId, event: NodeEvent) {
        let Some(stream) = self.open.get(&id) else {
            return;
        };
        if stream.outbox.try_send(event).is_err() {
            tracing::warn!(stream = id.0, "the coordinator does not read; closing its stream");
            self.open.remove(&id);
        }
    }

    /// The prefix cache changed.
    pub fn cache_changed(&mut self, stored: &[BlockHash], removed: &[BlockHash]) {
        self.send_to_all(|stream| {
            if !stream.has_snapshot {
                return true;
            }
            stream.sequence += 1;
            let event = NodeEvent::Cache {
                sequence: stream.sequence,
                stored: stored.to_vec(),
                removed: removed.to_vec(),
            };
            stream.outbox.try_send(event).is_ok()
        });
    }

    /// All that the prefix cache holds after the changes told so far.
    pub fn snapshot(&mut self, hashes: &[BlockHash]) {
        self.send_to_all(|stream| {
            if !std::mem::take(&mut stream.wants_snapshot) {
                return true;
            }
            stream.has_snapshot = true;
            // An empty cache is one empty part.
            let parts = hashes.len().div_ceil(SNAPSHOT_PART).max(1);
            (0..parts).all(|part| {
                let end = hashes.len().min((part + 1) * SNAPSHOT_PART);
                let event = NodeEvent::Snapshot {
                    sequence: stream.sequence,
                    hashes: hashes[part * SNAPSHOT_PART..end].to_vec(),
                    last: part + 1 == parts,
                };
                stream.outbox.try_send(event).is_ok()
            })
        });
    }

    /// Keeps the streams for which `send` succeeds.
    fn send_to_all(&mut self, mut send: impl FnMut(&mut Stream) -> bool) {
        self.open.retain(|id, stream| {
            let sent = send(stream);
            if !sent {
                tracing::warn!(stream = id.0, "the coordinator does not read; closing its stream");
            }
            sent
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn hash(n: u32) -> BlockHash {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        BlockHash(bytes)
    }

    fn open(streams: &mut Streams, id: u64, capacity: usize) -> mpsc::Receiver<NodeEvent> {
        let (outbox, events) = mpsc::channel(capacity);
        streams.open(StreamId(id), outbox, oneshot::channel().0);
        events
    }

    /// What a coordinator would believe from the events alone.
    fn replay(events: &mut mpsc::Receiver<NodeEvent>) -> BTreeSet<BlockHash> {
        let (mut held, mut incoming, mut last) = (BTreeSet::new(), BTreeSet::new(), 0);
        while let Ok(event) = events.try_recv() {
            match event {
                NodeEvent::Cache { sequence, stored, removed } => {
                    assert_eq!(sequence, last + 1, "no gap");
                    last = sequence;
                    held.extend(stored);
                    held.retain(|hash| !removed.contains(hash));
                }
                NodeEvent::Snapshot { sequence, hashes, last: ends } => {
                    assert_eq!(sequence, last, "a snapshot stands between the events it is of");
                    incoming.extend(hashes);
                    if ends {
                        held = std::mem::take(&mut incoming);
                    }
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        held
    }

    #[test]
    fn events_and_snapshots_agree() {
        let mut streams = Streams::default();
        let mut early = open(&mut streams, 1, MAX_OUTBOX);
        let mut cache = BTreeSet::new();
        let mut late = None;
        for n in 0..100 {
            let removed: Vec<_> = (n % 3 == 0).then(|| hash(n / 2)).into_iter().collect();
            cache.insert(hash(n));
            cache.retain(|hash| !removed.contains(hash));
            streams.cache_changed(&[hash(n)], &removed);
            if n == 40 {
                late = Some(open(&mut streams, 2, MAX_OUTBOX));
            }
            if n % 10 == 5 {
                streams.snapshot(&cache.iter().copied().collect::<Vec<_>>());
            }
            if n == 60 {
                streams.want_snapshot(StreamId(1));
            }
        }
        assert_eq!(replay(&mut early), cache);
        assert_eq!(replay(&mut late.expect("opened")), cache);
    }

    #[test]
    fn a_large_snapshot_comes_in_parts() {
        let mut streams = Streams::default();
        let mut events = open(&mut streams, 1, MAX_OUTBOX);
        let cache: Vec<_> = (0..SNAPSHOT_PART as u32 + 1).map(hash).collect();
        streams.snapshot(&cache);
        assert_eq!(events.len(), 2);
        assert_eq!(replay(&mut events), cache.into_iter().collect());
    }

    #[test]
    fn a_coordinator_that_does_not_read_loses_its_stream() {
        let mut streams = Streams::default();
        let mut events = open(&mut streams, 1, 1);
        for _ in 0..2 {
            streams.send(StreamId(1), NodeEvent::Tokens(Vec::new()));
        }
        assert!(events.try_recv().is_ok());
        assert_eq!(events.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    }
}
