//! `baton events`: what happened in the cluster, and what happens.

use std::time::Duration;

use baton_proto::wire::v1::{Event, WatchRequest, WatchResponse};
use serde_json::json;

use super::{CommandError, is_unreachable};
use crate::client::{Target, explain, is_lost};
use crate::output::{FormatArgs, complain, harmless, print, utc};

/// Pause before a coordinator that went away is asked again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Command line of `baton events`.
#[derive(clap::Args)]
pub(crate) struct EventsArgs {
    /// Go on as things happen, until interrupted
    #[arg(short, long)]
    follow: bool,
    /// Only those after this number
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    after: u64,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    format: FormatArgs,
}

/// Runs `baton events`.
pub(crate) async fn run(args: EventsArgs) -> Result<(), CommandError> {
    let mut after = args.after;
    loop {
        let ended = watch(&args, &mut after).await;
        match ended {
            Err(Ended::Lost(error)) if args.follow => {
                complain(&format!("baton: {error}; trying again"));
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            Err(Ended::Lost(error) | Ended::Failed(error)) => return Err(error),
            Ok(()) => return Ok(()),
        }
    }
}

/// Why a stream ended early.
enum Ended {
    /// The coordinator went away.
    Lost(CommandError),
    /// Something else.
    Failed(CommandError),
}

impl From<tonic::Status> for Ended {
    fn from(status: tonic::Status) -> Self {
        let error = explain(&status);
        if is_lost(&status) { Self::Lost(error) } else { Self::Failed(error) }
    }
}

/// Prints events and counts them in `after`, so that it can be gone on with.
async fn watch(args: &EventsArgs, after: &mut u64) -> Result<(), Ended> {
    let first = *after == args.after;
    let mut client = args.target.cluster().await.map_err(|error| {
        // Whoever never answered has not gone away.
        if is_unreachable(&*error) && !first { Ended::Lost(error) } else { Ended::Failed(error) }
    })?;
    let request = WatchRequest { after: Some(*after), until_now: !args.follow };
    let mut stream = client.watch(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        let json = args.format.is_json();
        let text = if json { as_json(&message) } else { harmless(&as_text(&message)) };
        print(&text).map_err(|error| Ended::Failed(error.into()))?;
        *after = message.events.last().map_or(*after, |event| event.sequence);
    }
    Ok(())
}

fn as_json(message: &WatchResponse) -> String {
    let missed = (message.missed > 0).then(|| json!({"missed": message.missed}));
    let events = message.events.iter().map(|event| {
        json!({
            "sequence": event.sequence,
            "unix_ms": event.unix_ms,
            "kind": event.kind,
            "node": event.node,
            "request_id": event.request_id,
            "message": event.message,
            "count": event.count,
        })
    });
    missed.into_iter().chain(events).map(|line| format!("{line}\n")).collect()
}

fn as_text(message: &WatchResponse) -> String {
    let missed = match message.missed {
        0 => String::new(),
        missed => format!("({missed} events were forgotten before they could be shown)\n"),
    };
    missed + &message.events.iter().map(|event| line(event) + "\n").collect::<String>()
}

/// One event as a line.
pub(super) fn line(event: &Event) -> String {
    let Event { sequence, unix_ms, kind, node, request_id, message, .. } = event;
    let who = if node.is_empty() { request_id } else { node };
    let who = if who.is_empty() { String::new() } else { format!("{who} ") };
    format!("{sequence:>5}  {}  {kind:<17}  {who}{message}", utc(*unix_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_is_too_slow_is_told() {
        let event = |sequence, kind: &str, node: &str, message: &str| Event {
            sequence,
            kind: kind.to_owned(),
            node: node.to_owned(),
            message: message.to_owned(),
            ..Event::default()
        };
        let events = vec![
            event(8, "node_left", "d", "left"),
            event(9, "requests_refused", "", "2 refused: no"),
        ];
        let message = WatchResponse { missed: 3, events };
        let wanted = "\
(3 events were forgotten before they could be shown)
    8  1970-01-01T00:00:00.000Z  node_left          d left
    9  1970-01-01T00:00:00.000Z  requests_refused   2 refused: no
";
        assert_eq!(as_text(&message), wanted);
        assert!(as_json(&message).starts_with("{\"missed\":3}\n{\"sequence\":8,"));
    }
}
