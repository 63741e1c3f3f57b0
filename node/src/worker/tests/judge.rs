//! What must hold when everything is over.

use std::collections::BTreeSet;

use baton_proto::ids::TransferId;
use baton_proto::message::NodeEvent;

use super::World;

impl World {
    /// How often a task's end was told.
    fn ends(&self, id: TransferId) -> usize {
        let end = |event: &NodeEvent| match event {
            NodeEvent::Failed { id: ended, .. } | NodeEvent::Transferred { id: ended, .. } => {
                *ended == id
            }
            NodeEvent::Embedded { id: ended, .. } => *ended == id,
            NodeEvent::Tokens(tokens) => tokens.iter().any(|t| {
                // The end of an export is that of its transfer.
                t.id == id && t.finish.is_some() && !self.exported(id)
            }),
            _ => false,
        };
        self.told.iter().filter(|(_, event)| end(event)).count()
    }

    fn exported(&self, id: TransferId) -> bool {
        self.told.iter().any(|(_, event)| match event {
            NodeEvent::Transferred { id: sent, .. } => *sent == id,
            NodeEvent::Failed { id: sent, .. } => *sent == id,
            _ => false,
        })
    }

    /// Every job has ended once for its coordinator.
    pub(super) fn judge(&self) {
        let mut failed = BTreeSet::new();
        for (_, event) in &self.told {
            match event {
                NodeEvent::Failed { id, .. } => assert!(failed.insert(*id), "{id} fails twice"),
                NodeEvent::Started { id, .. } | NodeEvent::Pulled { id, .. } => {
                    assert!(!failed.contains(id), "{id} goes on after its end");
                }
                _ => {}
            }
        }
        for (&id, stream) in &self.begun {
            let open = self.streams[stream];
            let ends = self.ends(id);
            assert!(ends <= 1, "{id} ends once: {:?}", self.told);
            // A job whose first token, at its import, was its last has nothing to tell.
            if open && !self.cancelled.contains(&id) {
                assert_eq!(ends, 1, "{id} does not end: {:?}", self.told);
            }
        }
    }
}
