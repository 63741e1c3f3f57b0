//! Cached prefixes from node to node: worth a try, never a reason to fail.

use std::time::{Duration, Instant};

use baton_engine::Kind;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, NodeEvent, Peer, Pull};
use baton_proto::sampling::SamplingParams;

use super::{Action, FirstToken, StreamId, Task, Transfer, Work, Worker};

/// How long the source of a pull may take to offer it: it only has to look into its cache.
pub const PULL_WAIT: Duration = Duration::from_secs(1);
/// How long a pull may take after that.
pub const PULL_TIMEOUT: Duration = Duration::from_secs(10);

/// A transfer ends with a first token; a pull has none, and nobody looks at this one.
pub(super) const NO_TOKEN: FirstToken = FirstToken { token: 0, logprobs: None, finish: None };

/// A prefix that is to come.
#[derive(Debug)]
pub(super) struct Fetch {
    /// The job that is held for it.
    job: TransferId,
    /// Its full blocks.
    blocks: u32,
    /// Leading ones that were here.
    held: u32,
    /// When the blocks were reserved.
    since: Option<Instant>,
    /// Given up at this time.
    by: Instant,
}

impl Fetch {
    /// Its source has it. By when it has to be here.
    pub(super) fn offered(&mut self, now: Instant) -> Instant {
        self.by = now + PULL_TIMEOUT;
        self.by
    }

    pub(super) fn admitted(&mut self, now: Instant, held: u32) {
        self.held = held;
        self.since = Some(now);
    }
}

/// What names a prefix to the engine.
pub(super) fn prefix(id: TransferId, tokens: Vec<u32>, salt: CacheSalt) -> Job {
    let (prompt_tokens, sampling) = (tokens.len(), SamplingParams::default());
    Job { id, tokens: tokens.into(), prompt_tokens, sampling, salt, deadline: None, trace: None }
}

impl Worker {
    /// Fetches the prefix of a job, if that is worth it; true: the job is to be held meanwhile.
    pub(super) fn start_pull(
        &mut self,
        now: Instant,
        stream: StreamId,
        job: &Job,
        pull: Option<Pull>,
    ) -> bool {
        let Some(Pull { from, tokens }) = pull else { return false };
        let id = job.id.pull();
        let tokens = &job.tokens[..tokens.min(job.tokens.len())];
        let blocks = tokens.len() as u32 / self.geometry.block_tokens;
        // Log-probabilities of the prompt have to be computed, whatever is cached.
        let useful = blocks > 0 && job.sampling.prompt_logprobs.is_none();
        if !useful || self.tasks.contains_key(&id) {
            return false;
        }
        let prefix = prefix(id, tokens.to_vec(), job.salt);
        let transfer = self.whole_blocks(&prefix, from);
        let by = now + PULL_WAIT;
        let fetch = Fetch { job: job.id, blocks, held: 0, since: None, by };
        self.begin(stream, id, Work::Fetch(fetch));
        self.deadlines.insert((by, id));
        self.actions.push_back(Action::Expect(transfer));
        self.submit(prefix, Kind::Fetch, false);
        true
    }

    /// The other side: sends a prefix if it is cached.
    pub(super) fn serve(&mut self, stream: StreamId, prefix: Job, to: Peer) {
        let transfer = self.whole_blocks(&prefix, to);
        self.begin(stream, prefix.id, Work::Serve(Some(transfer)));
        self.submit(prefix, Kind::Serve, false);
    }

    fn whole_blocks(&self, prefix: &Job, peer: Peer) -> Transfer {
        let transfer = self.transfer(prefix, peer);
        Transfer { blocks: transfer.hashes.len() as u32, ..transfer }
    }

    /// A fetch is over: its job goes on with what there is.
    pub(super) fn pull_over(&mut self, now: Instant, id: TransferId, arrived: bool) {
        let Some(Task { stream, work: Work::Fetch(fetch) }) = self.tasks.remove(&id) else {
            return;
        };
        let blocks = if arrived { fetch.blocks - fetch.held } else { 0 };
        let event = NodeEvent::Pulled {
            id: fetch.job,
            tokens: blocks * self.geometry.block_tokens,
            took: fetch.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since)),
        };
        self.actions.push_back(Action::Tell { stream, event });
        self.actions.push_back(Action::Release(fetch.job));
    }

    /// The job is over: what was fetched for it is not wanted any more.
    pub(super) fn stop_fetch_of(&mut self, job: TransferId) {
        let id = job.pull();
        if matches!(self.work(id), Some(Work::Fetch(fetch)) if fetch.job == job) {
            self.tasks.remove(&id);
            self.actions.push_back(Action::Stop(id));
            self.actions.push_back(Action::CancelReceive(id));
        }
    }

    pub(super) fn expire_pulls(&mut self, now: Instant) {
        while let Some(&(by, id)) = self.deadlines.first()
            && by <= now
        {
            self.deadlines.pop_first();
            // It may be over, or have been offered meanwhile.
            if matches!(self.work(id), Some(Work::Fetch(fetch)) if fetch.by <= now) {
                tracing::debug!(%id, "a pull takes too long");
                self.actions.push_back(Action::Stop(id));
                self.actions.push_back(Action::CancelReceive(id));
                self.pull_over(now, id, false);
            }
        }
    }
}
