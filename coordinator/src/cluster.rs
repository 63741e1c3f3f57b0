//! The nodes that are joined now, and the models that they serve.

use std::collections::BTreeMap;
use std::time::Instant;

use baton_proto::hash::ModelRoot;
use baton_proto::ids::{Epoch, NodeId, Role};
use baton_proto::message::{Hello, Peer, Report};

use crate::core::{ModelInfo, NodeView};
use crate::node_map::NodeMap;
use crate::roles::Seen;

/// Most nodes joined at once.
pub const MAX_NODES: usize = 1024;
/// Most nodes whose last epoch is remembered, joined or not.
const MAX_REMEMBERED: usize = 4 * MAX_NODES;
/// Most models known at once.
pub(crate) const MAX_MODELS: usize = 64;
/// Largest KV block; also keeps sizes computed from a geometry far from overflow.
const MAX_BLOCK_BYTES: u64 = 1 << 32;

/// One join stream: what an earlier stream of the same node said is void.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct LinkId(pub u64);

/// One life of a node.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct NodeRef {
    /// The node.
    pub node: NodeId,
    /// The life.
    pub epoch: Epoch,
}

/// A joined node.
#[derive(Clone, Debug)]
pub struct Member {
    /// What it said of itself; its role is that of the last report.
    pub hello: Hello,
    /// Its stream.
    pub link: LinkId,
    /// Its last report, or an empty one.
    pub report: Report,
    /// When that came, or when the node joined.
    pub heard: Instant,
}

impl Member {
    /// This life of the node.
    #[must_use]
    pub fn peer(&self, node: &NodeId) -> Peer {
        let (epoch, kv_address) = (self.hello.epoch, self.hello.kv_address.clone());
        Peer { node: node.clone(), epoch, kv_address }
    }
}

/// Why a node may not join. The node can try again, but some must change first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A later start of the same node joined before: another process has the same identity.
    #[error("node {node} joined with epoch {} before, this one has {}: two processes share an identity, or the clock went back", known.0, given.0)]
    OlderEpoch {
        /// The node.
        node: NodeId,
        /// The newest that joined.
        known: Epoch,
        /// Of the refused one.
        given: Epoch,
    },
    /// Its blocks would not fit those of the other nodes of the same model name.
    #[error(
        "model {model:?} is served by {by} with another {difference}; nodes of one model name must be equal"
    )]
    DifferentModel {
        /// The model's name.
        model: String,
        /// A node that serves it.
        by: NodeId,
        /// What differs.
        difference: &'static str,
    },
    /// A number that makes no sense.
    #[error("{0} must be above 0 and in range")]
    BadValue(&'static str),
    /// [`MAX_NODES`] are joined, or [`MAX_MODELS`] models served.
    #[error("this coordinator has no room for another {0}")]
    Full(&'static str),
}

/// The nodes that are joined now. Pure: the caller says what happened and when.
#[derive(Debug, Default)]
pub struct Cluster {
    members: NodeMap<Member>,
    /// Newest epoch of every node seen.
    epochs: BTreeMap<NodeId, Epoch>,
    /// A model outlives its nodes here, so that its requests are told apart from nonsense, until its
    /// place is needed.
    models: BTreeMap<String, ModelInfo>,
}

impl Cluster {
    /// Takes a node in. An earlier stream of it must have left before (see [`Self::member`]).
    pub fn join(
        &mut self,
        node: &NodeId,
        hello: Hello,
        link: LinkId,
        now: Instant,
    ) -> Result<(), Refusal> {
        self.admit(node, &hello)?;
        if self.epochs.len() >= MAX_REMEMBERED {
            self.epochs.retain(|node, _| self.members.contains_key(node));
        }
        self.epochs.insert(node.clone(), hello.epoch);
        let model = hello.model.clone();
        if self.models.len() >= MAX_MODELS && !self.models.contains_key(&model) {
            let Self { members, models, .. } = self;
            models.retain(|name, _| is_served(members, name));
        }
        let info = ModelInfo {
            name: model.clone(),
            root: hello.root,
            geometry: hello.geometry,
            max_model_len: hello.max_model_len,
            vocab_size: hello.vocab_size,
            hidden_size: hello.hidden_size,
        };
        self.models.insert(model.clone(), info);
        let report = Report { role: hello.role, ..Report::default() };
        let member = Member { hello, link, report, heard: now };
        self.members.insert(node.clone(), member);
        self.refresh(&model);
        Ok(())
    }

    /// Whether a node could join.
    pub fn admit(&self, node: &NodeId, hello: &Hello) -> Result<(), Refusal> {
        check_numbers(hello)?;
        let given = hello.epoch;
        if let Some(&known) = self.epochs.get(node).filter(|&&known| known > given) {
            return Err(Refusal::OlderEpoch { node: node.clone(), known, given });
        }
        // The node's own earlier life does not bind it.
        let same_name = |(id, m): &(&NodeId, &Member)| *id != node && m.hello.model == hello.model;
        if let Some((by, other)) = self.members.iter().find(same_name)
            && let Some(difference) = difference(&other.hello, hello)
        {
            let (model, by) = (hello.model.clone(), by.clone());
            return Err(Refusal::DifferentModel { model, by, difference });
        }
        if self.members.len() >= MAX_NODES && !self.members.contains_key(node) {
            return Err(Refusal::Full("node"));
        }
        let served = self.models.keys().filter(|name| is_served(&self.members, name));
        if !self.models.contains_key(&hello.model) && served.count() >= MAX_MODELS {
            return Err(Refusal::Full("model"));
        }
        Ok(())
    }

    /// A stream ended. Returns the member that it was, or `None` if it was replaced before.
    pub fn leave(&mut self, node: &NodeId, link: LinkId) -> Option<Member> {
        self.members.get(node).filter(|member| member.link == link)?;
        let member = self.members.remove(node)?;
        self.refresh(&member.hello.model);
        Some(member)
    }

    /// The model's context is what all its nodes can hold.
    fn refresh(&mut self, model: &str) {
        let nodes = self.members.values().filter(|m| m.hello.model == model);
        let least = nodes.map(|m| m.hello.max_model_len).min();
        if let (Some(least), Some(info)) = (least, self.models.get_mut(model)) {
            info.max_model_len = least;
        }
    }

    /// Keeps a node's report.
    pub fn report(&mut self, node: &NodeId, report: Report, now: Instant) {
        if let Some(member) = self.members.get_mut(node) {
            member.hello.role = report.role;
            member.report = report;
            member.heard = now;
        }
    }

    /// A joined node.
    #[must_use]
    pub fn member(&self, node: &NodeId) -> Option<&Member> {
        self.members.get(node)
    }

    /// Joined nodes that have this model and take new work, in no particular order.
    pub fn serving(&self, root: ModelRoot) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter().filter(move |(_, m)| m.hello.root == root && !m.report.draining)
    }

    /// Nodes that take work, by model.
    #[must_use]
    pub fn seen(&self) -> BTreeMap<ModelRoot, Vec<Seen>> {
        let mut models: BTreeMap<ModelRoot, Vec<Seen>> = BTreeMap::new();
        for (node, member) in self.by_name().filter(|(_, m)| !m.report.draining) {
            models.entry(member.hello.root).or_default().push(Seen::new(node, member));
        }
        models
    }

    /// All models known.
    #[must_use]
    pub fn models(&self) -> Vec<ModelInfo> {
        self.models.values().cloned().collect()
    }

    /// Names of all models known.
    pub fn model_names(&self) -> impl Iterator<Item = &str> {
        self.models.keys().map(String::as_str)
    }

    /// A model that a node serves or served.
    #[must_use]
    pub fn model(&self, name: &str) -> Option<&ModelInfo> {
        self.models.get(name)
    }

    /// Whether a request for this model would find a decode node.
    #[must_use]
    pub fn is_ready(&self, model: &ModelInfo) -> bool {
        self.serving(model.root).any(|(_, member)| member.hello.role == Role::Decode)
    }

    /// Names of joined nodes, in order.
    pub fn names(&self) -> impl Iterator<Item = &NodeId> {
        self.by_name().map(|(node, _)| node)
    }

    fn by_name(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        let mut members: Vec<_> = self.members.iter().collect();
        members.sort_unstable_by_key(|(node, _)| *node);
        members.into_iter()
    }

    /// Joined nodes with this role.
    #[must_use]
    pub fn count(&self, role: Role) -> usize {
        self.members.values().filter(|member| member.hello.role == role).count()
    }

    /// Joined nodes, by name.
    #[must_use]
    pub fn views(&self, now: Instant) -> Vec<NodeView> {
        let view = |(node, member): (&NodeId, &Member)| NodeView {
            node: node.clone(),
            hello: member.hello.clone(),
            report: member.report.clone(),
            report_age: now.saturating_duration_since(member.heard),
        };
        self.by_name().map(view).collect()
    }
}

fn is_served(members: &NodeMap<Member>, model: &str) -> bool {
    members.values().any(|member| member.hello.model == model)
}

fn difference(a: &Hello, b: &Hello) -> Option<&'static str> {
    if a.geometry.block_tokens != b.geometry.block_tokens {
        Some("block size")
    } else if a.geometry != b.geometry {
        Some("KV geometry")
    } else if (a.root, a.vocab_size, a.hidden_size) != (b.root, b.vocab_size, b.hidden_size) {
        Some("revision")
    } else {
        None
    }
}

fn check_numbers(hello: &Hello) -> Result<(), Refusal> {
    let g = &hello.geometry;
    let factors = [g.layers, g.kv_heads, g.head_dim, g.block_tokens, 2 * g.dtype.bytes() as u32];
    let bytes = factors.iter().try_fold(1_u64, |all, &f| all.checked_mul(f.into()));
    let checks = [
        ("geometry", bytes.is_some_and(|bytes| (1..=MAX_BLOCK_BYTES).contains(&bytes))),
        ("max_model_len", hello.max_model_len > 1),
        ("vocab_size", hello.vocab_size > 0),
        ("hidden_size", hello.hidden_size > 0),
        ("total_blocks", hello.total_blocks > 0),
        ("model", !hello.model.is_empty()),
        ("kv_address", !hello.kv_address.is_empty()),
    ];
    match checks.into_iter().find(|(_, fine)| !fine) {
        Some((field, _)) => Err(Refusal::BadValue(field)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{hello, node};

    fn joined(cluster: &mut Cluster, name: &str, hello: Hello, link: u64) -> Result<(), Refusal> {
        cluster.join(&node(name), hello, LinkId(link), Instant::now())
    }

    #[test]
    fn an_older_life_is_refused_even_after_the_newer_left() {
        let mut cluster = Cluster::default();
        joined(&mut cluster, "d", hello(Role::Decode, 5), 1).unwrap();
        assert!(cluster.leave(&node("d"), LinkId(1)).is_some());
        let error = joined(&mut cluster, "d", hello(Role::Decode, 4), 2).unwrap_err();
        assert!(matches!(error, Refusal::OlderEpoch { known: Epoch(5), given: Epoch(4), .. }));
        joined(&mut cluster, "d", hello(Role::Decode, 5), 3).unwrap();
    }

    #[test]
    fn nodes_of_one_model_name_must_be_equal() {
        let mut cluster = Cluster::default();
        joined(&mut cluster, "d", hello(Role::Decode, 1), 1).unwrap();
        let mut other = hello(Role::Prefill, 1);
        other.geometry.block_tokens *= 2;
        other.root = ModelRoot::new(&[1; 32], &other.geometry);
        let error = joined(&mut cluster, "p", other.clone(), 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "model \"demo\" is served by d with another block size; nodes of one model name must be equal"
        );
        // Once no node of the old kind is there, the model may change.
        cluster.leave(&node("d"), LinkId(1));
        joined(&mut cluster, "p", other, 3).unwrap();
    }

    #[test]
    fn a_replaced_stream_cannot_take_the_node_away() {
        let mut cluster = Cluster::default();
        joined(&mut cluster, "d", hello(Role::Decode, 1), 1).unwrap();
        joined(&mut cluster, "d", hello(Role::Decode, 2), 2).unwrap();
        assert!(cluster.leave(&node("d"), LinkId(1)).is_none());
        assert_eq!(cluster.member(&node("d")).unwrap().hello.epoch, Epoch(2));
    }

    #[test]
    fn models_that_nobody_serves_any_more_take_no_room() {
        let mut cluster = Cluster::default();
        let model = |number: usize| {
            let mut hello = hello(Role::Decode, 1);
            hello.model = format!("model-{number}");
            hello
        };
        for number in 0..3 * MAX_MODELS {
            joined(&mut cluster, "d", model(number), 1).unwrap();
            cluster.leave(&node("d"), LinkId(1));
            assert!(cluster.model(&format!("model-{number}")).is_some(), "it may come back");
        }
        assert!(cluster.models().len() <= MAX_MODELS);
        let mut cluster = Cluster::default();
        for number in 0..MAX_MODELS {
            joined(&mut cluster, &format!("d-{number}"), model(number), 1).unwrap();
        }
        let error = joined(&mut cluster, "one-more", model(MAX_MODELS), 1).unwrap_err();
        assert_eq!(error, Refusal::Full("model"));
    }

    #[test]
    fn ready_needs_a_decode_node_that_takes_work() {
        let mut cluster = Cluster::default();
        joined(&mut cluster, "p", hello(Role::Prefill, 1), 1).unwrap();
        let ready = |cluster: &Cluster| cluster.is_ready(cluster.model("demo").unwrap());
        assert!(!ready(&cluster));
        joined(&mut cluster, "d", hello(Role::Decode, 1), 2).unwrap();
        assert!(ready(&cluster));
        let report = Report { role: Role::Decode, draining: true, ..Report::default() };
        cluster.report(&node("d"), report, Instant::now());
        assert!(!ready(&cluster));
    }

    #[test]
    fn a_node_is_what_it_reports() {
        let mut cluster = Cluster::default();
        joined(&mut cluster, "n", hello(Role::Prefill, 1), 1).unwrap();
        assert_eq!((cluster.count(Role::Prefill), cluster.count(Role::Decode)), (1, 0));
        let report = Report { role: Role::Decode, ..Report::default() };
        cluster.report(&node("n"), report, Instant::now());
        assert_eq!((cluster.count(Role::Prefill), cluster.count(Role::Decode)), (0, 1));
        assert!(cluster.is_ready(cluster.model("demo").unwrap()));
    }

    #[test]
    fn the_context_is_the_least_of_the_nodes() {
        let mut cluster = Cluster::default();
        let mut short = hello(Role::Prefill, 1);
        short.max_model_len = 64;
        joined(&mut cluster, "p", short, 1).unwrap();
        joined(&mut cluster, "d", hello(Role::Decode, 1), 2).unwrap();
        assert_eq!(cluster.model("demo").unwrap().max_model_len, 64);
        cluster.leave(&node("p"), LinkId(1));
        assert_eq!(
            cluster.model("demo").unwrap().max_model_len,
            hello(Role::Decode, 1).max_model_len
        );
    }
}
