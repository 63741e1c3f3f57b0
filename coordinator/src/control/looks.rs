//! What operators look at beyond nodes and caches: requests, events, and the cluster's pulse.

use std::time::Instant;

use baton_proto::ids::RequestId;

use super::Control;
use crate::alerts::Facts;
use crate::core::{Explained, Pulse, RequestList};
use crate::events::{Event, Happening};
use crate::history::{FindError, IdPrefix, Record, RequestView};
use crate::request::Request;
use crate::requests::Action;

impl Control {
    /// Requests that run, the oldest first, then those that ended or were refused, the newest first.
    #[must_use]
    pub fn requests(&self, only_active: bool, limit: usize, now: Instant) -> RequestList {
        let mut running: Vec<&Request> = self.requests.running().collect();
        running.sort_unstable_by_key(|request| request.arrived);
        let views = running.iter().take(limit).map(|request| request.view(now));
        let mut requests: Vec<RequestView> = views.collect();
        if !only_active {
            let rest = limit - requests.len();
            let ended = self.requests.history().latest().take(rest);
            requests.extend(ended.map(|record| record.view.clone()));
        }
        RequestList { requests, active: running.len() }
    }

    /// One request, and why it went where it went.
    pub fn explain(&self, id: IdPrefix, now: Instant) -> Result<Explained, FindError> {
        let running = self.requests.running_as(id).map(|request| request.record(now));
        let ids = id.range();
        let ended = self.requests.history().latest();
        let ended = ended.filter(|record| ids.contains(&record.view.id)).cloned();
        let record = single(running.chain(ended), |record| record.view.id)?;
        let waits = self.placement.waits_for(record.view.id);
        Ok(Explained { record, waits })
    }

    /// An operator ends a request.
    pub fn cancel_one(
        &mut self,
        id: IdPrefix,
        now: Instant,
        out: &mut Vec<Action>,
    ) -> Result<RequestId, FindError> {
        let running = self.requests.running_as(id).map(|request| request.new.id);
        let id = match single(running, |id| *id) {
            Err(FindError::Unknown) => return Err(self.why_not_running(id, now)),
            found => found?,
        };
        self.events.push(Happening::Cancelled(id), now);
        self.cancel(id, now, out);
        Ok(id)
    }

    fn why_not_running(&self, id: IdPrefix, now: Instant) -> FindError {
        match self.explain(id, now) {
            Ok(Explained { record: Record { view, .. }, .. }) => FindError::Ended(view.id),
            Err(error) => error,
        }
    }

    /// Number of the newest event.
    #[must_use]
    pub fn newest_event(&self) -> u64 {
        self.events.newest()
    }

    /// Events after that number, the oldest first.
    #[must_use]
    pub fn events_after(&self, after: u64, most: usize) -> Vec<Event> {
        self.events.after(after, most)
    }

    /// How the cluster does.
    #[must_use]
    pub fn pulse(&self, now: Instant) -> Pulse {
        let (status, nodes) = (self.status(now), self.nodes(now));
        let resting: Vec<_> = self.placement.resting(now).cloned().collect();
        let facts = Facts {
            reason: &status.reason,
            nodes: &nodes,
            resting: &resting,
            events: &self.events,
            now,
        };
        Pulse {
            alerts: facts.alerts(),
            totals: self.requests.totals(),
            recent: self.requests.history().recent(now),
            transfers: self.placement.transfers(),
        }
    }
}

/// The only one of `all`. The same id may have been refused and run afterwards: the first counts.
fn single<T>(all: impl Iterator<Item = T>, id: impl Fn(&T) -> RequestId) -> Result<T, FindError> {
    let mut all = all.into_iter();
    let first = all.next().ok_or(FindError::Unknown)?;
    let others = all.any(|other| id(&other) != id(&first));
    if others { Err(FindError::Ambiguous) } else { Ok(first) }
}

#[cfg(test)]
#[path = "looks_tests.rs"]
mod tests;
