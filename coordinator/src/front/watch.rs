//! Events of the cluster, as a stream that each reader takes at its own speed.

use std::time::{Duration, Instant, SystemTime};

use baton_proto::wire::v1::{Event, WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::running::Running;
use crate::core::Core;
use crate::events::{self, Happening};

/// Events of one message.
const MOST_PER_MESSAGE: usize = 256;
/// Messages that wait for a slow reader; further events wait in the core, which forgets the oldest.
const WAITING_MESSAGES: usize = 1;

type Message = Result<WatchResponse, Status>;
pub(super) type Messages = ReceiverStream<Message>;

/// Begins to tell a reader what it asked for, until it leaves or the front drains.
pub(super) fn start(core: Core, running: Running, request: WatchRequest) -> Messages {
    let (sender, messages) = mpsc::channel(WAITING_MESSAGES);
    let newest = core.newest_event();
    // A number that was not reached is one of an earlier life of this coordinator.
    let after = request.after.map_or(newest, |after| if after > newest { 0 } else { after });
    let until = request.until_now.then_some(newest);
    tokio::spawn(tell(core, running, after, until, sender));
    ReceiverStream::new(messages)
}

async fn tell(
    core: Core,
    running: Running,
    mut after: u64,
    until: Option<u64>,
    out: mpsc::Sender<Message>,
) {
    while until.is_none_or(|until| after < until) {
        // Events are fetched only when there is room for them.
        let Ok(room) = out.reserve().await else { return };
        let there_is_one = tokio::select! {
            () = out.closed() => return,
            () = running.until_draining() => false,
            there_is_one = core.event_after(after) => there_is_one,
        };
        if !there_is_one {
            return room.send(Err(Status::unavailable("the coordinator is shutting down")));
        }
        let events = core.events_after(after, MOST_PER_MESSAGE).await;
        let (Some(first), Some(last)) = (events.first(), events.last()) else { return };
        let missed = first.sequence - after - 1;
        after = last.sequence;
        let (now, clock) = (Instant::now(), SystemTime::now());
        let events = events.iter().map(|event| in_words(event, now, clock)).collect();
        room.send(Ok(WatchResponse { missed, events }));
    }
}

/// Milliseconds since 1970.
pub(super) fn unix_ms(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64
}

fn in_words(event: &events::Event, now: Instant, clock: SystemTime) -> Event {
    let age = now.saturating_duration_since(event.at);
    let unix_ms = unix_ms(clock.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH));
    let named = |kind: &str, node: String, request_id: String, message: String| Event {
        sequence: event.sequence,
        unix_ms,
        kind: kind.to_owned(),
        node,
        request_id,
        message,
        count: 0,
    };
    let of_node = |kind, node: &baton_proto::ids::NodeId, message| {
        named(kind, node.to_string(), String::new(), message)
    };
    let of_request = |kind, request: &baton_proto::ids::RequestId, message| {
        named(kind, String::new(), request.to_string(), message)
    };
    match &event.what {
        Happening::Joined { node, role, model } => {
            of_node("node_joined", node, format!("joined as a {role} node of {model}"))
        }
        Happening::Left(node) => of_node("node_left", node, "left".to_owned()),
        Happening::Draining(node, true) => {
            of_node("node_draining", node, "takes nothing new".to_owned())
        }
        Happening::Draining(node, false) => {
            of_node("node_undrained", node, "takes work again".to_owned())
        }
        Happening::Role(node, role) => of_node("node_role", node, format!("is a {role} node now")),
        Happening::Retried { request, attempt, reason } => {
            let message = format!("attempt {attempt} failed, tried again: {reason}");
            of_request("request_retried", request, message)
        }
        Happening::Failed { request, reason } => {
            of_request("request_failed", request, reason.clone())
        }
        Happening::Cancelled(request) => {
            of_request("request_cancelled", request, "an operator cancelled it".to_owned())
        }
        Happening::Refused(why, count) => Event {
            count: *count,
            ..named(
                "requests_refused",
                String::new(),
                String::new(),
                format!("{count} refused: {}", why.as_str()),
            )
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;
    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn who_follows_is_told_when_the_coordinator_goes_down() {
        let (asks, _asks) = mpsc::channel(1);
        let (drops, _drops) = mpsc::channel(1);
        let (_models, models) = watch::channel(Default::default());
        let (_events, events) = watch::channel(7);
        let core = Core::new(asks, drops, models, events);
        let running = Running::default();
        let request = WatchRequest { after: Some(7), until_now: true };
        let mut nothing = start(core.clone(), running.clone(), request);
        assert!(nothing.next().await.is_none(), "nothing happened after that");
        let request = WatchRequest { after: None, until_now: false };
        let mut messages = start(core, running.clone(), request);
        running.drain();
        let last = messages.next().await.unwrap().unwrap_err();
        assert_eq!(last.code(), tonic::Code::Unavailable);
        assert!(messages.next().await.is_none());
    }
}
