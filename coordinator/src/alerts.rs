//! What an operator should look at, from what the coordinator knows at one moment.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use baton_proto::ids::NodeId;

use crate::core::NodeView;
use crate::events::{Events, Happening};

/// Nodes report ten times a second: this is twenty reports.
pub(crate) const SILENT: Duration = Duration::from_secs(2);
/// A node that left is missed for so long.
const LOST: Duration = Duration::from_secs(600);
/// Refusals are worth a look for so long.
const REFUSING: Duration = Duration::from_secs(60);
/// Share of a node's KV blocks below which those that can be had are few, in percent.
const FEW_BLOCKS_PERCENT: u64 = 5;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Requests are not served.
    Critical,
    /// Requests are served worse than they could be, or soon will be.
    Warning,
    /// Somebody wanted it so.
    Info,
}

impl Severity {
    /// Its name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Warning => "warning",
            Self::Info => "info",
        }
    }
}

/// One of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Alert {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, for programs.
    pub code: &'static str,
    /// For people.
    pub message: String,
}

/// What alerts are made of.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    /// Why no request would be served; empty if it would.
    pub(crate) reason: &'a str,
    pub(crate) nodes: &'a [NodeView],
    /// Nodes that get nothing for a while, as they failed several times in a row.
    pub(crate) resting: &'a [NodeId],
    pub(crate) events: &'a Events,
    pub(crate) now: Instant,
}

impl Facts<'_> {
    /// All alerts, the worst first.
    pub(crate) fn alerts(&self) -> Vec<Alert> {
        let mut alerts = Vec::new();
        if !self.reason.is_empty() {
            alerts.push(alert(Severity::Critical, "NOT_READY", self.reason.to_owned()));
        }
        alerts.extend(self.nodes.iter().flat_map(of_node));
        let resting = self.resting.iter().map(|node| {
            let message = format!("{node} failed several requests in a row and rests; see its log");
            alert(Severity::Warning, "NODE_FAILING", message)
        });
        alerts.extend(resting);
        alerts.extend(self.lost());
        alerts.extend(self.refusing());
        alerts.sort_by_key(|alert| alert.severity);
        alerts
    }

    /// Nodes that left lately and have not come back.
    fn lost(&self) -> Vec<Alert> {
        let mut seen: BTreeSet<&NodeId> = self.nodes.iter().map(|view| &view.node).collect();
        let mut alerts = Vec::new();
        for event in self.events.latest() {
            let age = self.now.saturating_duration_since(event.at);
            if age > LOST {
                break;
            }
            let Happening::Left(node) = &event.what else { continue };
            if seen.insert(node) {
                let message = format!("{node} left {} s ago and has not come back", age.as_secs());
                alerts.push(alert(Severity::Warning, "NODE_LOST", message));
            }
        }
        alerts
    }

    fn refusing(&self) -> Option<Alert> {
        let recent = self.events.latest();
        let recent = recent
            .take_while(|event| self.now.saturating_duration_since(event.at) <= REFUSING)
            .filter_map(|event| match event.what {
                Happening::Refused(_, count) => Some(count),
                _ => None,
            });
        let count: u64 = recent.sum();
        let message = format!("requests refused in the last minute: {count}; see `baton events`");
        (count > 0).then(|| alert(Severity::Warning, "REFUSING", message))
    }
}

fn of_node(view: &NodeView) -> Vec<Alert> {
    let NodeView { node, hello, report, report_age } = view;
    let mut alerts = Vec::new();
    if *report_age > SILENT {
        let message = format!("{node} has reported nothing for {} s", report_age.as_secs());
        alerts.push(alert(Severity::Warning, "NODE_SILENT", message));
    }
    let (left, total) = (report.blocks.free + report.blocks.cached, hello.total_blocks);
    let known = report.blocks != Default::default();
    if known && left * 100 < total * FEW_BLOCKS_PERCENT {
        let message = format!("{left} of {total} KV blocks of {node} can be had");
        alerts.push(alert(Severity::Warning, "KV_FULL", message));
    }
    if report.draining {
        alerts.push(alert(Severity::Info, "NODE_DRAINING", format!("{node} takes nothing new")));
    }
    alerts
}

fn alert(severity: Severity, code: &'static str, message: String) -> Alert {
    Alert { severity, code, message }
}

#[cfg(test)]
mod tests {
    use baton_proto::ids::Role;
    use baton_proto::message::{BlockCounts, Report};

    use super::*;
    use crate::events::RefusedFor;
    use crate::testing::{hello, node};

    fn view(name: &str, report: Report) -> NodeView {
        let hello = hello(Role::Decode, 1);
        NodeView { node: node(name), hello, report, report_age: Duration::ZERO }
    }

    fn codes(facts: &Facts<'_>) -> Vec<&'static str> {
        facts.alerts().iter().map(|alert| alert.code).collect()
    }

    #[test]
    fn alerts_name_what_is_wrong_the_worst_first() {
        let now = Instant::now();
        let blocks = BlockCounts { free: 5, active: 1000, cached: 19, leased: 0 };
        let full = Report { blocks, draining: true, ..Report::default() };
        let silent =
            NodeView { report_age: Duration::from_secs(3), ..view("s", Report::default()) };
        let mut events = Events::default();
        for name in ["gone", "s", "gone"] {
            events.push(Happening::Left(node(name)), now);
        }
        events.refused(RefusedFor::Overload, now);
        let nodes = [view("f", full), silent];
        let facts = Facts {
            reason: "no decode node has joined",
            nodes: &nodes,
            resting: &[node("r")],
            events: &events,
            now,
        };
        let wanted = [
            "NOT_READY",
            "KV_FULL",
            "NODE_SILENT",
            "NODE_FAILING",
            "NODE_LOST",
            "REFUSING",
            "NODE_DRAINING",
        ];
        assert_eq!(codes(&facts), wanted);
        let later = Facts { now: now + 2 * LOST, reason: "", nodes: &[], resting: &[], ..facts };
        assert!(codes(&later).is_empty(), "what is long past is no alert");
    }
}
