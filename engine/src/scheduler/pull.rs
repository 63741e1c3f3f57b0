//! Cached prefixes that leave for another node, or come from one: leased blocks without a
//! sequence.
//!
//! Neither waits for blocks. A prefix is served only as far as it is cached, which takes no block,
//! and fetched only where there is room now: who cannot fetch computes.

use std::time::Duration;

use baton_proto::hash::BlockHash;
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, Retry};

use super::{Event, Lease, Scheduler};
use crate::blocks::User;
use crate::events::Kind;

/// A prefix whose KV is on its way. It owns its blocks besides the lease, which is returned before
/// the end of the transfer is heard of.
#[derive(Debug)]
pub(super) struct Fetch {
    hashes: Vec<BlockHash>,
    blocks: Vec<u32>,
    /// Leading blocks that were cached before.
    held: usize,
    /// Sequences that are held until its end, since they need the same blocks.
    joined: Vec<u64>,
}

impl Scheduler {
    /// Leases the full blocks of `job`'s tokens, if all are cached.
    pub(super) fn serve(&mut self, job: &Job) {
        let hashes = self.root.chain(job.salt, &job.tokens, self.limits.block_tokens);
        let found = self.cache.find(&hashes).blocks;
        if hashes.is_empty() || found < hashes.len() {
            let wanted = hashes.len();
            return self.fail_pull(job.id, format!("{found} of {wanted} blocks are cached"));
        }
        let mut blocks = Vec::with_capacity(found);
        self.cache.share(&hashes, User::Transfer, &mut blocks);
        // There is nothing but the lease.
        self.lease(job.id, Kind::Serve, (blocks, found), true);
    }

    /// Leases blocks for the full blocks of `job`'s tokens, if there is room for those that are not
    /// cached.
    pub(super) fn fetch(&mut self, job: &Job) {
        let hashes = self.root.chain(job.salt, &job.tokens, self.limits.block_tokens);
        let found = self.cache.find(&hashes);
        let needed = hashes.len() - found.blocks;
        if needed == 0 {
            return self.fail_pull(job.id, "nothing is missing".to_owned());
        }
        if needed + self.growing() > self.cache.available() - found.unused {
            return self.fail_pull(job.id, format!("there is no room for {needed} blocks"));
        }
        let mut blocks = Vec::with_capacity(hashes.len());
        self.cache.share(&hashes[..found.blocks], User::Transfer, &mut blocks);
        let allocated = self.cache.allocate(needed, User::Transfer, &mut blocks);
        allocated.expect("as many blocks as were found available");
        for &block in &blocks {
            self.cache.retain(block, User::Transfer);
        }
        let (held, joined) = (found.blocks, Vec::new());
        let fetch = Fetch { hashes, blocks: blocks.clone(), held, joined };
        self.fetches.insert(job.id, fetch);
        self.lease(job.id, Kind::Fetch, (blocks, found.blocks), false);
    }

    /// The KV of a fetch is complete, and nobody writes it any more: it is cached. Without effect
    /// on other jobs.
    pub fn fetched(&mut self, id: TransferId) {
        let Some(Fetch { hashes, mut blocks, held, joined }) = self.fetches.remove(&id) else {
            return;
        };
        for ordinal in held..hashes.len() {
            let parent = ordinal.checked_sub(1).map(|before| hashes[before]);
            let cached = self.cache.insert(parent, hashes[ordinal], blocks[ordinal]);
            // Somebody computed an equal block meanwhile: its successors are cached under that, and
            // who uses them uses it too.
            if cached != blocks[ordinal] {
                self.cache.retain(cached, User::Transfer);
                blocks.push(cached);
                if let Some(lease) = self.leases.get_mut(&id) {
                    self.cache.retain(cached, User::Transfer);
                    lease.blocks.push(cached);
                }
            }
        }
        self.end_fetch(id, &blocks, &joined);
    }

    /// The KV of a fetch will not come. Without effect on other jobs.
    pub(super) fn stop_fetch(&mut self, id: TransferId) {
        if let Some(fetch) = self.fetches.remove(&id) {
            self.end_fetch(id, &fetch.blocks, &fetch.joined);
        }
    }

    /// Holds a waiting sequence whose next block is on its way for another job: whoever asked for
    /// that found fetching it cheaper than computing it.
    pub(super) fn joins_fetch(&mut self, number: u64) -> bool {
        let chain = self.sequences[&number].matchable(self.limits.block_tokens);
        let found = self.cache.find(chain).blocks;
        let Some(next) = chain.get(found) else { return false };
        // A hash stands for all blocks before it.
        let coming = self.fetches.values_mut().find(|fetch| fetch.hashes.get(found) == Some(next));
        coming.is_some_and(|fetch| {
            fetch.joined.push(number);
            self.waiting.remove(&number) && self.held.insert(number)
        })
    }

    fn end_fetch(&mut self, id: TransferId, blocks: &[u32], joined: &[u64]) {
        for number in joined {
            // It may be over.
            if self.held.remove(number) {
                self.waiting.insert(*number);
            }
        }
        for &block in blocks.iter().rev() {
            self.cache.release(block, User::Transfer);
        }
        self.tell_end(id);
    }

    fn lease(
        &mut self,
        id: TransferId,
        kind: Kind,
        (blocks, cached_blocks): (Vec<u32>, usize),
        ended: bool,
    ) {
        self.leases.insert(id, Lease { blocks: blocks.clone(), ended });
        let queued = Duration::ZERO;
        self.events.push(Event::Admitted { id, kind, lease: blocks, cached_blocks, queued });
    }

    fn fail_pull(&mut self, id: TransferId, reason: String) {
        self.events.push(Event::Failed { id, reason, retry: Retry::OtherNode });
    }
}
