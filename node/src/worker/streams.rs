//! What a node says to each coordinator that it has joined about its prefix cache.

use std::collections::{BTreeMap, VecDeque};

use baton_proto::hash::BlockHash;
use baton_proto::message::NodeEvent;

use super::Action;

/// Hashes of one message of a snapshot: 1 MiB.
const SNAPSHOT_PART: usize = 65_536;

/// One stream to one coordinator; a new one for every dial.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct StreamId(pub u64);

/// All open streams.
///
/// Every stream numbers its own cache events. Engine events are ordered, so what a stream was
/// told up to a snapshot is exactly what the snapshot includes.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: BTreeMap<StreamId, Stream>,
}

#[derive(Debug, Default)]
struct Stream {
    /// Number of the last cache event.
    sequence: u64,
    /// Before its first snapshot a stream needs no cache events.
    has_snapshot: bool,
    wants_snapshot: bool,
}

impl Streams {
    /// A stream opened. It wants a snapshot, which the caller asks the engine for.
    pub(super) fn open(&mut self, id: StreamId) {
        self.open.insert(id, Stream { wants_snapshot: true, ..Stream::default() });
    }

    /// Whether a stream is open. What comes from one that is not is void.
    pub(super) fn is_open(&self, id: StreamId) -> bool {
        self.open.contains_key(&id)
    }

    /// A stream ended.
    pub(super) fn close(&mut self, id: StreamId) {
        self.open.remove(&id);
    }

    /// The coordinator asked for a snapshot, which the caller asks the engine for.
    pub(super) fn want_snapshot(&mut self, id: StreamId) {
        if let Some(stream) = self.open.get_mut(&id) {
            stream.wants_snapshot = true;
        }
    }

    /// The prefix cache changed.
    pub(super) fn cache_changed(
        &mut self,
        stored: &[BlockHash],
        removed: &[BlockHash],
        out: &mut VecDeque<Action>,
    ) {
        for (&stream, state) in self.open.iter_mut().filter(|(_, state)| state.has_snapshot) {
            state.sequence += 1;
            let event = NodeEvent::Cache {
                sequence: state.sequence,
                stored: stored.to_vec(),
                removed: removed.to_vec(),
            };
            out.push_back(Action::Tell { stream, event });
        }
    }

    /// All that the prefix cache holds after the changes told so far.
    pub(super) fn snapshot(&mut self, hashes: &[BlockHash], out: &mut VecDeque<Action>) {
        for (&stream, state) in &mut self.open {
            if !std::mem::take(&mut state.wants_snapshot) {
                continue;
            }
            state.has_snapshot = true;
            // An empty cache is one empty part.
            let parts = hashes.len().div_ceil(SNAPSHOT_PART).max(1);
            for part in 0..parts {
                let end = hashes.len().min((part + 1) * SNAPSHOT_PART);
                let event = NodeEvent::Snapshot {
                    sequence: state.sequence,
                    hashes: hashes[part * SNAPSHOT_PART..end].to_vec(),
                    last: part + 1 == parts,
                };
                out.push_back(Action::Tell { stream, event });
            }
        }
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

    /// What a coordinator would believe from the events of its stream alone.
    fn replay(actions: &VecDeque<Action>, id: u64) -> BTreeSet<BlockHash> {
        let (mut held, mut incoming, mut last) = (BTreeSet::new(), BTreeSet::new(), 0);
        for action in actions {
            let Action::Tell { stream, event } = action else { panic!("unexpected {action:?}") };
            match event {
                _ if *stream != StreamId(id) => {}
                NodeEvent::Cache { sequence, stored, removed } => {
                    assert_eq!(*sequence, last + 1, "no gap");
                    last = *sequence;
                    held.extend(stored.iter().copied());
                    held.retain(|hash| !removed.contains(hash));
                }
                NodeEvent::Snapshot { sequence, hashes, last: ends } => {
                    assert_eq!(*sequence, last, "a snapshot stands between the events it is of");
                    incoming.extend(hashes.iter().copied());
                    if *ends {
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
        let (mut streams, mut out) = (Streams::default(), VecDeque::new());
        streams.open(StreamId(1));
        let mut cache = BTreeSet::new();
        for n in 0..100 {
            let removed: Vec<_> = (n % 3 == 0).then(|| hash(n / 2)).into_iter().collect();
            cache.insert(hash(n));
            cache.retain(|hash| !removed.contains(hash));
            streams.cache_changed(&[hash(n)], &removed, &mut out);
            if n == 40 {
                streams.open(StreamId(2));
            }
            if n % 10 == 5 {
                streams.snapshot(&cache.iter().copied().collect::<Vec<_>>(), &mut out);
            }
            if n == 60 {
                streams.want_snapshot(StreamId(1));
            }
        }
        assert_eq!(replay(&out, 1), cache);
        assert_eq!(replay(&out, 2), cache);
    }

    #[test]
    fn a_large_snapshot_comes_in_parts() {
        let (mut streams, mut out) = (Streams::default(), VecDeque::new());
        streams.open(StreamId(1));
        let cache: Vec<_> = (0..SNAPSHOT_PART as u32 + 1).map(hash).collect();
        streams.snapshot(&cache, &mut out);
        assert_eq!(out.len(), 2);
        assert_eq!(replay(&out, 1), cache.into_iter().collect());
    }
}
