//! A [`Worker`]'s side of KV transfers.

use std::time::Instant;

use baton_kvtransfer::{Reason, ReceiveError, SendError, Sent};
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, NodeEvent, Peer, Retry};

use super::{Action, FirstToken, Task, Transfer, Work, Worker, pull};

impl Worker {
    pub(super) fn transfer(&self, job: &Job, peer: Peer) -> Transfer {
        let block_tokens = self.geometry.block_tokens as usize;
        let hashes = self.root.chain(job.salt, &job.tokens, block_tokens);
        let blocks = self.geometry.blocks_for(job.tokens.len()) as u32;
        Transfer { id: job.id, peer, hashes, blocks }
    }

    pub(super) fn admitted(&mut self, now: Instant, id: TransferId, cached_blocks: u32) {
        let Some(Task { work, .. }) = self.tasks.get_mut(&id) else { return };
        match work {
            Work::Local => {}
            Work::Export(transfer) => {
                if let Some(transfer) = transfer.take() {
                    self.send(transfer, cached_blocks);
                }
            }
            Work::Serve(transfer) => {
                if let Some(transfer) = transfer.take() {
                    self.send(transfer, cached_blocks);
                    self.actions.push_back(Action::Finish { id, first: pull::NO_TOKEN });
                }
            }
            Work::Import => self.actions.push_back(Action::Reserve { id, held: cached_blocks }),
            Work::Fetch(fetch) => {
                fetch.admitted(now, cached_blocks);
                self.actions.push_back(Action::Reserve { id, held: cached_blocks });
            }
        }
    }

    fn send(&mut self, transfer: Transfer, ready_blocks: u32) {
        let id = transfer.id;
        self.actions.push_back(Action::Send(transfer));
        if ready_blocks > 0 {
            for layer in 0..self.geometry.layers {
                self.actions.push_back(Action::Ready { id, layer, blocks: 0..ready_blocks });
            }
        }
    }

    pub(super) fn offered(&mut self, now: Instant, id: TransferId) {
        match self.tasks.get_mut(&id).map(|task| &mut task.work) {
            Some(Work::Import) => self.actions.push_back(Action::Release(id)),
            Some(Work::Fetch(fetch)) => self.deadlines.extend([(fetch.offered(now), id)]),
            _ => {}
        }
    }

    pub(super) fn received(
        &mut self,
        now: Instant,
        id: TransferId,
        outcome: Result<FirstToken, ReceiveError>,
    ) {
        let Some(Task { work, .. }) = self.tasks.get_mut(&id) else { return };
        match (work, outcome) {
            (work @ Work::Import, Ok(first)) => {
                *work = Work::Local;
                let FirstToken { token, logprobs, finish } = first;
                let first = baton_engine::FirstToken { token, logprobs, finish };
                self.actions.push_back(Action::Imported { id, first });
            }
            (Work::Import, Err(error)) => {
                // Whose job was cancelled is not waiting for it: the other end gave up.
                let retry = match error {
                    ReceiveError::Cancelled | ReceiveError::Ended(Reason::Cancelled) => {
                        Retry::OtherNode
                    }
                    ref error => error.retry(),
                };
                self.actions.push_back(Action::Stop(id));
                self.failed(now, id, error.to_string(), retry);
            }
            (Work::Fetch(_), Ok(_)) => {
                self.actions.push_back(Action::Fetched(id));
                self.pull_over(now, id, true);
            }
            (Work::Fetch(_), Err(error)) => {
                tracing::debug!(%id, %error, "a pull has failed");
                self.actions.push_back(Action::Stop(id));
                self.pull_over(now, id, false);
            }
            _ => {}
        }
    }

    pub(super) fn sent(&mut self, id: TransferId, outcome: Result<Sent, SendError>) {
        let Some(Work::Export(_) | Work::Serve(_)) = self.work(id) else { return };
        match outcome {
            Ok(Sent { hidden, exposed, bytes, blocks, .. }) => {
                self.tell(id, NodeEvent::Transferred { id, hidden, exposed, bytes, blocks });
                self.tasks.remove(&id);
            }
            Err(error) => {
                let retry = match error {
                    SendError::Cancelled | SendError::Refused(Reason::Cancelled) => {
                        Retry::OtherNode
                    }
                    ref error => error.retry(),
                };
                self.actions.push_back(Action::Stop(id));
                if let Some(Task { stream, .. }) = self.tasks.remove(&id) {
                    self.refuse(stream, id, error.to_string(), retry);
                }
            }
        }
    }

    pub(super) fn drop_transfer(&mut self, id: TransferId, work: &Work) {
        match work {
            Work::Local => {}
            Work::Export(_) | Work::Serve(_) => self.actions.push_back(Action::CancelSend(id)),
            Work::Import | Work::Fetch(_) => self.actions.push_back(Action::CancelReceive(id)),
        }
    }
}
