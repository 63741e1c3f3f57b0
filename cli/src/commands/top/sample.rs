//! One look at the cluster, and what changed since the one before.

use std::collections::VecDeque;
use std::time::Instant;

use baton_proto::wire::v1::{
    Event, GetStatusRequest, GetStatusResponse, ListNodesRequest, Node, TokenTotals, WatchRequest,
};

use crate::client::{Target, explain};
use crate::commands::CommandError;

/// Failures that are kept for the screen.
const MOST_TROUBLES: usize = 16;

/// What the screen shows.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) status: GetStatusResponse,
    pub(super) nodes: Vec<Node>,
    pub(super) rates: Rates,
    /// Events that somebody should know of, the newest first.
    pub(super) troubles: VecDeque<Event>,
}

/// Per second, since the look before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) prompt: f64,
    pub(super) generated: f64,
    pub(super) finished: f64,
    pub(super) bytes: f64,
}

impl Rates {
    /// Of two states so many seconds apart. A coordinator that restarted counts from 0.
    fn between(before: &GetStatusResponse, now: &GetStatusResponse, seconds: f64) -> Self {
        let per_second = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
        let (old, new): (TokenTotals, TokenTotals) =
            (before.tokens.unwrap_or_default(), now.tokens.unwrap_or_default());
        Self {
            prompt: per_second(old.prompt, new.prompt),
            generated: per_second(old.generated, new.generated),
            finished: per_second(before.requests_finished, now.requests_finished),
            bytes: per_second(old.transfer_bytes, new.transfer_bytes),
        }
    }
}

/// Looks at the cluster again and again.
pub(super) struct Sampler {
    target: Target,
    before: Option<(Instant, GetStatusResponse)>,
    /// Number of the last event seen.
    after: u64,
    troubles: VecDeque<Event>,
}

impl Sampler {
    pub(super) fn new(target: Target) -> Self {
        Self { target, before: None, after: 0, troubles: VecDeque::new() }
    }

    pub(super) async fn take(&mut self) -> Result<Sample, CommandError> {
        let mut client = self.target.cluster().await?;
        let said = |status: tonic::Status| explain(&status);
        let status = client.get_status(GetStatusRequest {}).await.map_err(said)?.into_inner();
        let nodes = client.list_nodes(ListNodesRequest {}).await.map_err(said)?.into_inner().nodes;
        let request = WatchRequest { after: Some(self.after), until_now: true };
        let mut news = client.watch(request).await.map_err(said)?.into_inner();
        while let Some(message) = news.message().await.map_err(said)? {
            self.after = message.events.last().map_or(self.after, |event| event.sequence);
            message.events.into_iter().filter(is_trouble).for_each(|e| self.troubles.push_front(e));
            self.troubles.truncate(MOST_TROUBLES);
        }
        let now = Instant::now();
        let rates = match &self.before {
            Some((at, before)) => {
                let seconds = now.duration_since(*at).as_secs_f64().max(1e-3);
                Rates::between(before, &status, seconds)
            }
            None => Rates::default(),
        };
        self.before = Some((now, status.clone()));
        Ok(Sample { status, nodes, rates, troubles: self.troubles.clone() })
    }
}

fn is_trouble(event: &Event) -> bool {
    let kinds = ["node_left", "request_failed", "request_retried", "requests_refused"];
    kinds.contains(&&*event.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_per_second() {
        let status = |generated, finished| GetStatusResponse {
            tokens: Some(TokenTotals { generated, ..TokenTotals::default() }),
            requests_finished: finished,
            ..GetStatusResponse::default()
        };
        let rates = Rates::between(&status(100, 5), &status(300, 6), 2.0);
        assert_eq!((rates.generated, rates.finished, rates.prompt), (100.0, 0.5, 0.0));
        let restarted = Rates::between(&status(100, 5), &status(3, 0), 1.0);
        assert_eq!(restarted, Rates::default());
    }
}
