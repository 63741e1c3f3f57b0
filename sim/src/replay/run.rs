//! The loop that plays a trace against a cluster and a policy.

use super::events::Event;
use super::serving::Serving;
use super::{Admission, Cluster, Decision, Outcome, Policy, Settings};
use crate::trace::Trace;

/// A policy that sleeps is not woken more often than this.
const SHORTEST_SLEEP_MS: f64 = 0.1;

/// About how many reports a node makes while the time grows by a factor of e.
const MOST_REPORTS: f64 = 1e5;

/// A policy neither dispatched nor refused requests that it took.
#[derive(Debug, thiserror::Error)]
#[error("the policy never decided about {0} requests that it took")]
pub struct Stuck(pub usize);

/// Plays a trace against a cluster whose requests go where the policy says.
///
/// # Errors
///
/// If the policy holds requests for ever.
pub fn replay(
    settings: &Settings,
    trace: &Trace,
    policy: &mut dyn Policy,
) -> Result<Outcome, Stuck> {
    let cluster = play(settings, trace, policy)?;
    Ok(Outcome { records: cluster.jobs.into_iter().map(|job| job.record).collect() })
}

/// The cluster when all is done.
pub(super) fn play<'a>(
    settings: &'a Settings,
    trace: &'a Trace,
    policy: &mut dyn Policy,
) -> Result<Cluster<'a>, Stuck> {
    let mut run = Run {
        serving: Serving::new(settings, trace),
        policy,
        arriving: trace.requests.len(),
        held: 0,
        wake_ms: f64::INFINITY,
    };
    for (at, request) in trace.requests.iter().enumerate() {
        run.serving.events.plan(request.arrival_ms, Event::Arrive(at));
    }
    run.serving.events.plan(settings.report_ms, Event::Report);
    while let Some((now_ms, event)) = run.serving.events.next() {
        run.happen(now_ms, event);
        run.decide(now_ms);
        if run.arriving + run.held + run.serving.running == 0 {
            break;
        }
    }
    if run.held > 0 {
        return Err(Stuck(run.held));
    }
    Ok(run.serving.cluster)
}

struct Run<'a, 'p> {
    serving: Serving<'a>,
    policy: &'p mut dyn Policy,
    /// Requests yet to come.
    arriving: usize,
    /// Requests that the policy took and has not decided about.
    held: usize,
    /// The next planned `Event::Wake`.
    wake_ms: f64,
}

impl Run<'_, '_> {
    fn happen(&mut self, now_ms: f64, event: Event) {
        match event {
            Event::Arrive(request) => self.arrive(now_ms, request),
            Event::PrefillEnd(at) => self.serving.prefill_end(now_ms, at),
            Event::Batch(at, generation) => self.serving.batch_change(now_ms, at, generation),
            Event::Network(generation) => self.serving.network_change(now_ms, generation),
            Event::Tell(node, news) => self.serving.told.push((node, news)),
            Event::Report => self.report(now_ms),
            Event::Wake if now_ms >= self.wake_ms => self.wake_ms = f64::INFINITY,
            Event::Wake => {}
        }
        for (node, news) in std::mem::take(&mut self.serving.told) {
            self.policy.heard(now_ms, node, &news);
        }
    }

    fn arrive(&mut self, now_ms: f64, request: usize) {
        self.arriving -= 1;
        let cluster = &self.serving.cluster;
        // What can never be held is refused whatever the policy says.
        let holdable = cluster.decode.is_empty()
            || cluster.needed_blocks(request) <= cluster.settings.cache_blocks;
        if holdable && self.policy.arrive(now_ms, request, cluster) == Admission::Taken {
            self.held += 1;
        } else {
            self.serving.cluster.jobs[request].record.refused = true;
        }
    }

    /// Reports go on while anything else can happen.
    fn report(&mut self, now_ms: f64) {
        self.serving.report(now_ms);
        if self.arriving + self.serving.running > 0 {
            // The longer it has lasted already, the rarer: a year of nothing else ends, too.
            let pause = self.serving.cluster.settings.report_ms.max(now_ms / MOST_REPORTS);
            let next = now_ms + pause;
            self.serving.events.plan(next, Event::Report);
        }
    }

    fn decide(&mut self, now_ms: f64) {
        loop {
            while let Some(decision) = self.policy.next(now_ms, &self.serving.cluster) {
                self.held -= 1;
                match decision {
                    Decision::Dispatch(dispatch) => self.serving.dispatch(now_ms, dispatch),
                    Decision::Refuse(request) => {
                        self.serving.cluster.jobs[request].record.refused = true;
                    }
                }
            }
            // Dispatching may have caused news, and news another decision.
            if self.serving.told.is_empty() {
                break;
            }
            for (node, news) in std::mem::take(&mut self.serving.told) {
                self.policy.heard(now_ms, node, &news);
            }
        }
        if let Some(wake_ms) = self.policy.wake() {
            let wake_ms = wake_ms.max(now_ms + SHORTEST_SLEEP_MS);
            if wake_ms < self.wake_ms {
                self.wake_ms = wake_ms;
                self.serving.events.plan(wake_ms, Event::Wake);
            }
        }
    }
}
