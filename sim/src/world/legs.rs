//! Which nodes still have a part in which attempts, as seen from outside of the coordinator.

use std::collections::BTreeSet;

use baton_proto::ids::{Epoch, RequestId, TransferId};
use baton_proto::message::{Command, NodeEvent};

/// Parts of attempts that were sent to a life of a node, and that have not ended: by what the node
/// says, by a cancel, or with the node's stream.
#[derive(Default)]
pub(crate) struct Legs {
    open: BTreeSet<(TransferId, usize, Epoch)>,
    /// Those that generate: the last token ends them.
    decode: BTreeSet<(TransferId, usize, Epoch)>,
}

impl Legs {
    /// The coordinator sends `command`.
    pub(crate) fn sent(&mut self, node: usize, epoch: Epoch, command: &Command) {
        match command {
            Command::Prefill { job, .. }
            | Command::Decode { job, .. }
            | Command::Embed { job, .. } => {
                let new = self.open.insert((job.id, node, epoch));
                assert!(new, "{} is sent to node {node} twice", job.id);
                if matches!(command, Command::Decode { .. }) {
                    self.decode.insert((job.id, node, epoch));
                }
            }
            Command::Cancel(id) => {
                self.open.remove(&(*id, node, epoch));
            }
            _ => {}
        }
    }

    /// The coordinator is about to hear `event`.
    pub(crate) fn hears(&mut self, node: usize, epoch: Epoch, event: &NodeEvent) {
        match event {
            NodeEvent::Failed { id, .. }
            | NodeEvent::Transferred { id, .. }
            | NodeEvent::Embedded { id, .. } => {
                self.open.remove(&(*id, node, epoch));
            }
            NodeEvent::Tokens(tokens) => {
                for token in tokens.iter().filter(|token| token.finish.is_some()) {
                    let leg = (token.id, node, epoch);
                    if self.decode.contains(&leg) {
                        self.open.remove(&leg);
                    }
                }
            }
            _ => {}
        }
    }

    /// A request has ended: nobody may still have a part in it.
    pub(crate) fn ended(&mut self, request: RequestId) {
        let first = TransferId { request, attempt: 0 };
        let next = self.open.range((first, 0, Epoch(0))..).next();
        if let Some((id, node, _)) = next.filter(|(id, ..)| id.request == request) {
            panic!("{id} still runs on node {node}");
        }
        self.decode.retain(|(id, ..)| id.request != request);
    }

    /// A node's stream has ended.
    pub(crate) fn lost(&mut self, node: usize) {
        self.open.retain(|&(_, at, _)| at != node);
    }
}
