//! What coordinators say to each other.

use std::time::Duration;

use super::{InvalidMessage, invalid};
use crate::ids::{Epoch, NodeId};
use crate::share::{MAX_PROMISES, MAX_SHARED_NODES, NodePromises, Promise, Share, SharedLoad};
use crate::wire::peer as wire;

/// Longest prefill that is believed: a day.
const MAX_PREFILL_MS: f64 = 86_400_000.0;

impl Share {
    /// The message of `coordinator` that says this.
    #[must_use]
    pub fn into_wire(self, coordinator: &NodeId) -> wire::Share {
        let nodes = self.nodes.into_iter().map(Into::into).collect();
        wire::Share { coordinator: coordinator.to_string(), sequence: self.sequence, nodes }
    }

    /// Whose message it is, and what it says.
    pub fn from_wire(share: wire::Share) -> Result<(NodeId, Self), InvalidMessage> {
        if share.nodes.len() > MAX_SHARED_NODES {
            let count = share.nodes.len();
            return invalid(format!("share.nodes has {count}; most are {MAX_SHARED_NODES}"));
        }
        let coordinator = name(&share.coordinator, "share.coordinator")?;
        let nodes = share.nodes.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        Ok((coordinator, Self { sequence: share.sequence, nodes }))
    }
}

fn name(text: &str, field: &str) -> Result<NodeId, InvalidMessage> {
    text.parse().map_err(|e| InvalidMessage(format!("{field}: {e}")))
}

impl From<NodePromises> for wire::NodePromises {
    fn from(node: NodePromises) -> Self {
        Self {
            node: node.node.to_string(),
            epoch: node.epoch.0,
            promises: node.promises.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<wire::NodePromises> for NodePromises {
    type Error = InvalidMessage;

    fn try_from(node: wire::NodePromises) -> Result<Self, InvalidMessage> {
        if node.promises.len() > MAX_PROMISES {
            let count = node.promises.len();
            return invalid(format!("share.promises has {count}; most are {MAX_PROMISES}"));
        }
        Ok(Self {
            node: name(&node.node, "share.node")?,
            epoch: Epoch(node.epoch),
            promises: node.promises.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<Promise> for wire::Promise {
    fn from(Promise { age, load }: Promise) -> Self {
        Self {
            age_ms: u32::try_from(age.as_millis()).unwrap_or(u32::MAX),
            prefill_ms: load.prefill_ms,
            tokens: load.tokens,
            blocks: load.blocks,
            sequences: load.sequences,
        }
    }
}

impl TryFrom<wire::Promise> for Promise {
    type Error = InvalidMessage;

    fn try_from(promise: wire::Promise) -> Result<Self, InvalidMessage> {
        let wire::Promise { age_ms, prefill_ms, tokens, blocks, sequences } = promise;
        if !(0.0..=MAX_PREFILL_MS).contains(&prefill_ms) {
            return invalid(format!("share.prefill_ms is {prefill_ms}"));
        }
        let load = SharedLoad { prefill_ms, tokens, blocks, sequences };
        Ok(Self { age: Duration::from_millis(age_ms.into()), load })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(promises: usize) -> Share {
        let load = SharedLoad { prefill_ms: 1.5, tokens: 2, blocks: 3, sequences: 4 };
        let promise = Promise { age: Duration::from_millis(7), load };
        let (node, epoch) = ("p-0".parse().unwrap(), Epoch(9));
        let node = NodePromises { node, epoch, promises: vec![promise; promises] };
        Share { sequence: 5, nodes: vec![node] }
    }

    #[test]
    fn shares_survive_the_wire() {
        let coordinator: NodeId = "c-1".parse().unwrap();
        let wire = share(2).into_wire(&coordinator);
        assert_eq!(Share::from_wire(wire), Ok((coordinator, share(2))));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let coordinator: NodeId = "c-1".parse().unwrap();
        let legal = share(MAX_PROMISES).into_wire(&coordinator);
        assert!(Share::from_wire(legal.clone()).is_ok());
        let broken: [fn(&mut wire::Share); 6] = [
            |share| share.coordinator = "not a name".to_owned(),
            |share| share.nodes[0].node = String::new(),
            |share| share.nodes[0].promises[0].prefill_ms = f64::NAN,
            |share| share.nodes[0].promises[0].prefill_ms = -1.0,
            |share| share.nodes[0].promises.push(wire::Promise::default()),
            |share| share.nodes = vec![wire::NodePromises::default(); MAX_SHARED_NODES + 1],
        ];
        for (case, spoil) in broken.into_iter().enumerate() {
            let mut share = legal.clone();
            spoil(&mut share);
            assert!(Share::from_wire(share).is_err(), "case {case}");
        }
    }
}
