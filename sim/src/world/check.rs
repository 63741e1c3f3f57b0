//! What must be true when everything is mended and all is done.

use baton_proto::hash::{BlockHash, CacheSalt};
use baton_proto::message::BlockCounts;

use super::World;

impl World {
    /// Whether every client has ended, no node has anything left to do, and all have joined.
    pub(crate) fn is_idle(&self) -> bool {
        let nodes = self.nodes.iter().flatten();
        let all = 0..self.specs.len();
        let joined = |c: &super::Coordinator| all.clone().all(|node| c.has_joined(node, &self.net));
        self.open == 0
            && nodes.into_iter().all(super::Node::is_idle)
            && self.coordinators.iter().flatten().all(joined)
    }

    /// What is still under way, for people.
    pub(crate) fn left(&self) -> String {
        let mut left = format!("{} clients", self.open);
        for (node, name) in self.nodes.iter().zip(&self.names) {
            let Some(node) = node else { continue };
            left += &format!("; {name}: {}", node.left());
        }
        left
    }

    /// # Panics
    /// If something is left or contradicts itself.
    pub(crate) fn check(&mut self, indexed: bool) {
        for (number, client) in self.clients.iter().enumerate() {
            assert!(client.ended.is_some(), "client {number} has not ended");
        }
        for node in self.nodes.iter().flatten() {
            let scheduler = &node.engine.scheduler;
            scheduler.check();
            let BlockCounts { free, active, cached, leased } = scheduler.blocks();
            assert_eq!((active, leased), (0, 0), "blocks of nobody");
            assert_eq!(free + cached, node.spec.limits.kv_blocks as u64, "blocks are conserved");
            assert!(node.is_idle(), "something is left: {}", node.left());
        }
        for coordinator in 0..self.coordinators.len() {
            self.check_coordinator(coordinator, indexed);
        }
    }

    fn check_coordinator(&mut self, coordinator: usize, indexed: bool) {
        let now = self.net.now();
        let process = self.coordinators[coordinator].as_mut().expect("everything is mended");
        let control = &mut process.control;
        assert_eq!(control.status(now).requests_active, 0, "requests of nobody");
        assert!(control.owes_nothing(), "promises to nobody");
        assert_eq!(control.nodes(now).len(), self.specs.len(), "every node has joined");
        if !indexed {
            return;
        }
        let current = |(at, _): &(usize, _)| !process.behind.contains(at);
        for (_, (node, name)) in self.nodes.iter().zip(&self.names).enumerate().filter(current) {
            let scheduler = &node.as_ref().expect("everything is mended").engine.scheduler;
            let cached = scheduler.cached_hashes();
            let view = control.cache(Some(name), &[], self.block_tokens);
            assert_eq!(view.nodes[0].blocks, cached.len() as u64, "blocks indexed of {name}");
            for client in &self.clients {
                let mut tokens = client.question.prompt.clone();
                tokens.extend(&client.expected);
                let chain = self.root.chain(CacheSalt::default(), &tokens, self.block_tokens);
                let held = |hash: &&BlockHash| cached.binary_search(hash).is_ok();
                let held = chain.iter().take_while(held).count() * self.block_tokens;
                let view = control.cache(Some(name), &chain, self.block_tokens);
                assert_eq!(view.nodes[0].matched_tokens, held as u64, "what {name} holds");
            }
        }
    }
}
