//! What operators may ask of nodes.

use baton_proto::config::nearest;
use baton_proto::ids::{NodeId, Role};
use baton_proto::message::Command;

use crate::cluster::{Cluster, Member, NodeRef};

/// Most names in an error.
const MAX_NAMES: usize = 8;

/// What a node is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Be this from now on.
    Role(Role),
    /// Take nothing new, or take work again.
    Drain(bool),
}

/// An order is not passed on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// There is no such node.
    #[error("no node {node} has joined; {hint}")]
    Unknown {
        /// As asked for.
        node: NodeId,
        /// What there is.
        hint: String,
    },
    /// Nothing would be served any more.
    #[error(
        "{node} is the last decode node of {model:?} that takes work; force it if that is meant"
    )]
    LastDecode {
        /// The node.
        node: NodeId,
        /// Its model.
        model: String,
    },
    /// The coordinator is going down.
    #[error("the coordinator is shutting down")]
    ShuttingDown,
}

impl Order {
    /// To whom and how the order is to be said. `force`: even if it takes the last decode node of a
    /// model away.
    pub fn command(
        self,
        node: &NodeId,
        force: bool,
        cluster: &Cluster,
    ) -> Result<(NodeRef, Command), OrderError> {
        let unknown = || OrderError::Unknown { node: node.clone(), hint: hint(node, cluster) };
        let member = cluster.member(node).ok_or_else(unknown)?;
        if !force && self.takes_decode_away() && is_last_decode(node, member, cluster) {
            let model = member.hello.model.clone();
            return Err(OrderError::LastDecode { node: node.clone(), model });
        }
        let command = match self {
            Self::Role(role) => Command::SetRole(role),
            Self::Drain(draining) => Command::SetDraining(draining),
        };
        Ok((NodeRef { node: node.clone(), epoch: member.hello.epoch }, command))
    }

    fn takes_decode_away(self) -> bool {
        matches!(self, Self::Role(Role::Prefill) | Self::Drain(true))
    }
}

fn is_last_decode(node: &NodeId, member: &Member, cluster: &Cluster) -> bool {
    let serving = cluster.serving(member.hello.root);
    let mut decode = serving.filter(|(_, member)| member.hello.role == Role::Decode);
    decode.next().is_some_and(|(first, _)| first == node) && decode.next().is_none()
}

fn hint(node: &NodeId, cluster: &Cluster) -> String {
    let names: Vec<&str> = cluster.names().map(NodeId::as_str).collect();
    if let Some(name) = nearest(node.as_str(), names.iter().copied()) {
        return format!("did you mean {name}?");
    }
    match names.len() {
        0 => "no node at all has".to_owned(),
        more if more > MAX_NAMES => {
            format!("{} and {} others have", names[..MAX_NAMES].join(", "), more - MAX_NAMES)
        }
        _ => format!("there are {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use baton_proto::message::Report;

    use super::*;
    use crate::cluster::LinkId;
    use crate::testing::{hello, node};

    fn cluster(nodes: &[(&str, Role)]) -> Cluster {
        let mut cluster = Cluster::default();
        for (link, (name, role)) in (1..).zip(nodes) {
            cluster.join(&node(name), hello(*role, 7), LinkId(link), Instant::now()).unwrap();
        }
        cluster
    }

    #[test]
    fn orders_go_to_this_life_of_the_node() {
        let cluster = cluster(&[("d", Role::Decode), ("p", Role::Prefill)]);
        let (to, command) = Order::Role(Role::Decode).command(&node("p"), false, &cluster).unwrap();
        assert_eq!((to.node, to.epoch.0), (node("p"), 7));
        assert_eq!(command, Command::SetRole(Role::Decode));
        let (_, command) = Order::Drain(false).command(&node("d"), false, &cluster).unwrap();
        assert_eq!(command, Command::SetDraining(false));
    }

    #[test]
    fn the_last_decode_node_stays_unless_forced() {
        let mut cluster =
            cluster(&[("d-1", Role::Decode), ("d-2", Role::Decode), ("p", Role::Prefill)]);
        let away = [Order::Role(Role::Prefill), Order::Drain(true)];
        for order in away {
            assert!(order.command(&node("d-1"), false, &cluster).is_ok());
            assert!(order.command(&node("p"), false, &cluster).is_ok());
        }
        let draining = Report { role: Role::Decode, draining: true, ..Report::default() };
        cluster.report(&node("d-2"), draining, Instant::now());
        for order in away {
            let error = order.command(&node("d-1"), false, &cluster).unwrap_err();
            assert!(matches!(error, OrderError::LastDecode { .. }), "{error}");
            assert!(order.command(&node("d-1"), true, &cluster).is_ok());
            // It takes nothing anyway.
            assert!(order.command(&node("d-2"), false, &cluster).is_ok());
        }
    }

    #[test]
    fn an_unknown_node_is_answered_with_what_there_is() {
        let error = |name: &str, nodes: &[(&str, Role)]| {
            let error = Order::Drain(true).command(&node(name), false, &cluster(nodes));
            error.unwrap_err().to_string()
        };
        let two = [("decode-0", Role::Decode), ("prefill-0", Role::Prefill)];
        assert_eq!(error("prefil-0", &two), "no node prefil-0 has joined; did you mean prefill-0?");
        assert_eq!(error("x", &two), "no node x has joined; there are decode-0, prefill-0");
        assert_eq!(error("x", &[]), "no node x has joined; no node at all has");
    }
}
