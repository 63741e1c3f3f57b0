//! Puts a request's demand and what is known of the nodes together, for [`choose`] to decide.

use std::time::Instant;

use baton_proto::ids::{NodeId, Role, TransferId};
use baton_proto::message::{BlockCounts, Report};

use crate::cluster::{Cluster, Member, NodeRef};
use crate::index::{Index, Matches, NodeKeys};
use crate::ledger::Ledger;
use crate::peers::Shares;
use crate::placement::{Candidate, Demand, LocalPrefill, choose};
use crate::requests::{Placed, Placer, Wanted};

/// What is known of the nodes.
#[derive(Debug)]
pub struct Placing {
    /// Who they are.
    pub cluster: Cluster,
    /// Their numbers in the index.
    pub keys: NodeKeys,
    /// What they hold.
    pub index: Index,
    /// What they hold of the prompt placed last.
    pub matches: Matches,
    /// What they were asked to do.
    pub ledger: Ledger,
    /// What other coordinators asked them to do.
    pub shares: Shares,
    /// Whether decode nodes may compute prompts.
    pub local_prefill: LocalPrefill,
}

impl Placer for Placing {
    fn place(&mut self, wanted: &Wanted<'_>, now: Instant) -> Option<Placed> {
        let geometry = wanted.model.geometry;
        let demand = Demand {
            tokens: wanted.tokens,
            token_bytes: geometry.token_bytes(),
            blocks: geometry.blocks_for(wanted.tokens + 1) as u64,
            local_prefill: self.local_prefill,
        };
        self.index.longest(wanted.chain, &mut self.matches);
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        for (node, member) in self.cluster.serving(wanted.model.root) {
            // A node with less room would end the output earlier than the others.
            let too_small = (member.hello.max_model_len as usize) < wanted.longest;
            if too_small || wanted.avoid.iter().any(|avoid| is(avoid, node, member)) {
                continue;
            }
            let held = self.keys.of(node).map(|key| self.matches.of(key)).unwrap_or_default();
            let cached_tokens = held.device_blocks * geometry.block_tokens as usize;
            let candidate = candidate(node, member, cached_tokens, self);
            match member.hello.role {
                Role::Prefill => prefill.push(candidate),
                Role::Decode => decode.push(candidate),
            }
        }
        let choice = choose(demand, &prefill, &decode)?;
        let source = choice.prefill.map(|at| &prefill[at]);
        let target = &decode[choice.decode];
        let rest = |node: &Candidate<'_>| {
            let cached = node.cached_tokens.min(demand.tokens.saturating_sub(1));
            (demand.tokens - cached) as u64
        };
        let (id, ledger) = (wanted.id, &mut self.ledger);
        if let Some(source) = source {
            ledger.promise(source.node, id, rest(source), demand.blocks, now);
        }
        let tokens = if source.is_some() { 0 } else { rest(target) };
        ledger.promise(target.node, id, tokens, demand.blocks, now);
        let peer = |node: &NodeId| Some(self.cluster.member(node)?.peer(node));
        Some(Placed {
            prefill: source.and_then(|source| peer(source.node)),
            decode: peer(target.node)?,
            reason: choice.reason,
        })
    }

    fn prefilled(&mut self, node: &NodeId, id: TransferId) {
        self.ledger.prefilled(node, id);
    }

    fn ended(&mut self, node: &NodeId, id: TransferId) {
        self.ledger.ended(node, id);
    }
}

fn is(life: &NodeRef, node: &NodeId, member: &Member) -> bool {
    life.node == *node && life.epoch == member.hello.epoch
}

fn candidate<'a>(
    node: &'a NodeId,
    member: &Member,
    cached_tokens: usize,
    placing: &Placing,
) -> Candidate<'a> {
    let Report { running, waiting, blocks, waiting_blocks, .. } = &member.report;
    let (load, shared) = (placing.ledger.load(node), placing.shares.load(node));
    let reported = blocks.free.saturating_add(blocks.cached).saturating_sub(*waiting_blocks);
    let none_yet = *blocks == BlockCounts::default();
    let room = if none_yet { member.hello.total_blocks } else { reported };
    Candidate {
        node,
        cached_tokens,
        queued_tokens: load.queued_tokens.saturating_add(shared.tokens),
        sequences: [*waiting, load.sequences, shared.sequences]
            .into_iter()
            .fold(*running, u32::saturating_add),
        tokens_per_second: member.report.prefill_tokens_per_second,
        step_ms: member.report.decode_step_ms,
        room: room.saturating_sub(load.blocks).saturating_sub(shared.blocks),
        total_blocks: member.hello.total_blocks,
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::ids::RequestId;

    use super::*;
    use crate::cluster::LinkId;
    use crate::core::ModelInfo;
    use crate::testing::{GEOMETRY, hello, node};

    #[test]
    fn nodes_that_would_end_the_output_early_are_left_out() {
        let now = Instant::now();
        let mut placing = Placing {
            cluster: Cluster::default(),
            keys: NodeKeys::default(),
            index: Index::new(1),
            matches: Matches::default(),
            ledger: Ledger::default(),
            shares: Shares::default(),
            local_prefill: LocalPrefill::Auto,
        };
        let mut small = hello(Role::Decode, 1);
        small.max_model_len = 20;
        let model = ModelInfo {
            name: small.model.clone(),
            root: small.root,
            geometry: GEOMETRY,
            max_model_len: 100,
            vocab_size: small.vocab_size,
        };
        placing.cluster.join(&node("d"), small, LinkId(1), now).unwrap();
        let mut placed = |longest| {
            let id = TransferId { request: RequestId(1), attempt: 1 };
            let wanted = Wanted { id, model: &model, tokens: 10, longest, chain: &[], avoid: &[] };
            placing.place(&wanted, now).is_some()
        };
        assert!(placed(20));
        assert!(!placed(21));
    }
}
