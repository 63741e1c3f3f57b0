//! What operators ask about requests and events.

use baton_proto::ids::RequestId;
use tokio::sync::oneshot;

use super::{Ask, Core};
use crate::alerts::Alert;
use crate::control::Control;
use crate::events::Event;
use crate::history::{FindError, IdPrefix, Recent, Record, RequestView};
use crate::placement::WaitsFor;
use crate::requests::Totals;

/// Some requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestList {
    /// In the order of [`Control::requests`].
    pub requests: Vec<RequestView>,
    /// How many run in all.
    pub active: usize,
}

/// One request, and why it went where it went.
#[derive(Clone, Debug, PartialEq)]
pub struct Explained {
    /// The request.
    pub record: Record,
    /// Where it stands, if it waits here.
    pub waits: Option<WaitsFor>,
}

/// How the cluster does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pulse {
    /// What somebody should look at, the worst first.
    pub alerts: Vec<Alert>,
    /// Counts since the start.
    pub totals: Totals,
    /// How requests went lately.
    pub recent: Recent,
    /// KV transfers under way.
    pub transfers: usize,
}

/// A question that changes nothing.
#[derive(Debug)]
pub(crate) enum Look {
    Requests { only_active: bool, limit: usize, reply: oneshot::Sender<RequestList> },
    Explain { id: IdPrefix, reply: oneshot::Sender<Result<Explained, FindError>> },
    Events { after: u64, most: usize, reply: oneshot::Sender<Vec<Event>> },
    Pulse(oneshot::Sender<Pulse>),
}

impl Look {
    /// Answers; an answer whose asker is gone is dropped.
    pub(crate) fn answer(self, control: &Control, now: std::time::Instant) {
        match self {
            Self::Requests { only_active, limit, reply } => {
                drop(reply.send(control.requests(only_active, limit, now)));
            }
            Self::Explain { id, reply } => drop(reply.send(control.explain(id, now))),
            Self::Events { after, most, reply } => {
                drop(reply.send(control.events_after(after, most)));
            }
            Self::Pulse(reply) => drop(reply.send(control.pulse(now))),
        }
    }
}

impl Core {
    /// Up to `limit` requests; see [`Control::requests`].
    pub async fn requests(&self, only_active: bool, limit: usize) -> RequestList {
        let look = |reply| Ask::Look(Look::Requests { only_active, limit, reply });
        self.ask(look).await.unwrap_or_default()
    }

    /// One request, and why it went where it went.
    pub async fn explain(&self, id: IdPrefix) -> Result<Explained, FindError> {
        let look = |reply| Ask::Look(Look::Explain { id, reply });
        self.ask(look).await.unwrap_or(Err(FindError::ShuttingDown))
    }

    /// Ends a request as an operator: its last update is
    /// [`RequestError::Cancelled`](super::RequestError::Cancelled). Returns its whole id.
    pub async fn cancel_one(&self, id: IdPrefix) -> Result<RequestId, FindError> {
        let ask = |reply| Ask::CancelOne { id, reply };
        self.ask(ask).await.unwrap_or(Err(FindError::ShuttingDown))
    }

    /// How the cluster does.
    pub async fn pulse(&self) -> Pulse {
        self.ask(|reply| Ask::Look(Look::Pulse(reply))).await.unwrap_or_default()
    }

    /// Number of the newest event.
    #[must_use]
    pub fn newest_event(&self) -> u64 {
        *self.events.borrow()
    }

    /// Waits until there is an event after that number; false once the core is gone.
    pub async fn event_after(&self, after: u64) -> bool {
        self.events.clone().wait_for(|newest| *newest > after).await.is_ok()
    }

    /// Up to `most` events after that number, the oldest first.
    pub async fn events_after(&self, after: u64, most: usize) -> Vec<Event> {
        let look = |reply| Ask::Look(Look::Events { after, most, reply });
        self.ask(look).await.unwrap_or_default()
    }
}
