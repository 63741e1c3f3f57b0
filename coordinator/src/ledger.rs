//! What the coordinator has asked of each node and the node's last report does not show yet.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use baton_proto::ids::{NodeId, TransferId};
use baton_proto::message::Report;
use baton_proto::share::SharedLoad;

/// A report shows what was sent to the node this long before it arrived.
pub(crate) const REPORT_LAG: Duration = Duration::from_millis(50);

/// What is told other coordinators: their reports of a node may be this much older than ours.
const SHARED_FOR: Duration = Duration::from_millis(250);

/// Work promised to nodes. Pure; corrected by every report.
#[derive(Debug, Default)]
pub struct Ledger {
    nodes: HashMap<NodeId, Account>,
}

#[derive(Debug, Default)]
struct Account {
    /// Of the last report, less what is known to be done since.
    queued_tokens: u64,
    work: HashMap<TransferId, Work>,
}

/// One attempt's demand on one node.
#[derive(Clone, Copy, Debug)]
struct Work {
    tokens: u64,
    blocks: u64,
    sent: Instant,
    /// The last report includes it.
    reported: bool,
}

/// A node's load beyond what its last report says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Prompt tokens that it has still to compute, reported ones included.
    pub queued_tokens: u64,
    /// Blocks promised since the last report.
    pub blocks: u64,
    /// Sequences promised since the last report.
    pub sequences: u32,
}

impl Ledger {
    /// A node joined or left: it owes nothing.
    pub fn clear(&mut self, node: &NodeId) {
        self.nodes.remove(node);
    }

    /// A node is asked to compute `tokens` prompt tokens and to hold `blocks` more blocks.
    pub fn promise(
        &mut self,
        node: &NodeId,
        id: TransferId,
        tokens: u64,
        blocks: u64,
        now: Instant,
    ) {
        let work = Work { tokens, blocks, sent: now, reported: false };
        self.nodes.entry(node.clone()).or_default().work.insert(id, work);
    }

    /// The node has computed the prompt.
    pub fn prefilled(&mut self, node: &NodeId, id: TransferId) {
        let Some(account) = self.nodes.get_mut(node) else {
            return;
        };
        if let Some(work) = account.work.get_mut(&id) {
            let tokens = std::mem::take(&mut work.tokens);
            if work.reported {
                account.queued_tokens = account.queued_tokens.saturating_sub(tokens);
            }
        }
    }

    /// The node has nothing to do with the attempt any more.
    pub fn ended(&mut self, node: &NodeId, id: TransferId) {
        self.prefilled(node, id);
        if let Some(account) = self.nodes.get_mut(node) {
            account.work.remove(&id);
        }
    }

    /// The node's own view replaces ours for everything that it can know of.
    pub fn report(&mut self, node: &NodeId, report: &Report, now: Instant) {
        let account = self.nodes.entry(node.clone()).or_default();
        account.queued_tokens = report.queued_tokens;
        for work in account.work.values_mut() {
            work.reported |= work.sent + REPORT_LAG <= now;
        }
    }

    /// What is known of a node's load.
    #[must_use]
    pub fn load(&self, node: &NodeId) -> Load {
        let Some(account) = self.nodes.get(node) else {
            return Load::default();
        };
        let start = Load { queued_tokens: account.queued_tokens, ..Load::default() };
        account.work.values().filter(|work| !work.reported).fold(start, |all, work| Load {
            queued_tokens: all.queued_tokens.saturating_add(work.tokens),
            blocks: all.blocks.saturating_add(work.blocks),
            sequences: all.sequences + 1,
        })
    }

    /// Promises that a report of the node to another coordinator may not show yet: which node, when
    /// and what.
    pub fn recent(&self, now: Instant) -> impl Iterator<Item = (&NodeId, Instant, SharedLoad)> {
        let all = self
            .nodes
            .iter()
            .flat_map(|(node, account)| account.work.values().map(move |work| (node, work)));
        let recent = all.filter(move |(_, work)| !work.reported || work.sent + SHARED_FOR > now);
        recent.map(|(node, &Work { tokens, blocks, sent, .. })| {
            (node, sent, SharedLoad { prefill_ms: 0.0, tokens, blocks, sequences: 1 })
        })
    }

    /// Attempts that some node still works on.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.values().all(|account| account.work.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::ids::RequestId;

    use super::*;
    use crate::testing::node;

    fn id(request: u128) -> TransferId {
        TransferId { request: RequestId(request), attempt: 1 }
    }

    fn report(queued_tokens: u64) -> Report {
        Report { queued_tokens, ..Report::default() }
    }

    #[test]
    fn work_counts_once_before_and_after_the_report_that_shows_it() {
        let (mut ledger, p, start) = (Ledger::default(), node("p"), Instant::now());
        ledger.promise(&p, id(1), 100, 7, start);
        assert_eq!(ledger.load(&p), Load { queued_tokens: 100, blocks: 7, sequences: 1 });
        // This report left the node before the work arrived there.
        ledger.report(&p, &report(0), start + Duration::from_millis(1));
        assert_eq!(ledger.load(&p).queued_tokens, 100);
        // This one shows it, half done.
        ledger.report(&p, &report(50), start + REPORT_LAG);
        assert_eq!(ledger.load(&p), Load { queued_tokens: 50, blocks: 0, sequences: 0 });
        ledger.prefilled(&p, id(1));
        ledger.prefilled(&p, id(1));
        assert_eq!(ledger.load(&p).queued_tokens, 0);
        ledger.ended(&p, id(1));
        assert!(ledger.is_empty());
    }

    #[test]
    fn what_ends_before_any_report_leaves_nothing() {
        let (mut ledger, p, start) = (Ledger::default(), node("p"), Instant::now());
        ledger.report(&p, &report(30), start);
        ledger.promise(&p, id(1), 100, 7, start);
        ledger.ended(&p, id(1));
        assert_eq!(ledger.load(&p), Load { queued_tokens: 30, blocks: 0, sequences: 0 });
    }
}
