//! What happens in the cluster.

mod decode;
mod prefill;
mod transfer;

use std::collections::BTreeMap;

use super::events::{Event, Events};
use super::network::Network;
use super::{Changes, Cluster, Dispatch, News, Node, Settings};
use crate::trace::Trace;
use transfer::Flow;

/// The cluster, and what will happen in it.
pub(super) struct Serving<'a> {
    pub(super) cluster: Cluster<'a>,
    pub(super) events: Events,
    /// What nodes say that is heard at once.
    pub(super) told: Vec<(Node, News)>,
    /// Requests that were dispatched and have not ended.
    pub(super) running: usize,
    network: Option<Network>,
    flows: BTreeMap<u64, Flow>,
    network_generation: u64,
    /// Factor on the prefill of each request.
    noise: Vec<f64>,
}

impl<'a> Serving<'a> {
    pub(super) fn new(settings: &'a Settings, trace: &'a Trace) -> Self {
        let mut random = fastrand::Rng::with_seed(settings.seed);
        let sigma = settings.disturbance.noise;
        let noise = trace.requests.iter().map(|_| factor(&mut random, sigma)).collect();
        Self {
            cluster: Cluster::new(settings, trace),
            events: Events::default(),
            told: Vec::new(),
            running: 0,
            network: settings.link.map(|link| Network::new(link.gbps)),
            flows: BTreeMap::new(),
            network_generation: 0,
            noise,
        }
    }

    /// Sends a request to its nodes.
    pub(super) fn dispatch(&mut self, now_ms: f64, dispatch: Dispatch) {
        let Dispatch { request, prefill, decode, .. } = dispatch;
        let nodes = self.cluster.decode.len();
        assert_eq!(decode.is_some(), nodes > 0, "a decode node where there are any");
        assert!(prefill.is_some() || nodes > 0, "somebody computes the prompt");
        let job = &mut self.cluster.jobs[request];
        assert!(job.dispatch.replace(dispatch).is_none(), "a request is dispatched once");
        job.record.remote = prefill.is_some();
        self.running += 1;
        if let Some(at) = decode {
            self.promise(at, request);
        }
        match (prefill, decode) {
            (Some(at), _) => self.enqueue(now_ms, at, request),
            (None, Some(at)) => self.want_room(now_ms, at, request),
            (None, None) => {}
        }
    }

    /// Everybody says how it is doing.
    pub(super) fn report(&mut self, now_ms: f64) {
        for node in self.cluster.nodes() {
            let news = self.cluster.report(node);
            self.tell_late(now_ms, node, news);
        }
    }

    fn ended(&mut self, now_ms: f64, node: Node, request: usize) {
        self.cluster.jobs[request].record.end_ms = Some(now_ms);
        self.running -= 1;
        self.told.push((node, News::Ended { request }));
    }

    fn tell_changes(&mut self, now_ms: f64, node: Node, changes: Changes) {
        if changes != Changes::default() {
            self.tell_late(now_ms, node, News::Cache(changes));
        }
    }

    fn tell_late(&mut self, now_ms: f64, node: Node, news: News) {
        let lag = self.cluster.settings.disturbance.event_lag_ms;
        if lag > 0.0 {
            self.events.plan(now_ms + lag, Event::Tell(node, news));
        } else {
            self.told.push((node, news));
        }
    }
}

/// A factor of mean 1 whose logarithm is normally distributed with this deviation.
fn factor(random: &mut fastrand::Rng, sigma: f64) -> f64 {
    // Box and Muller's transformation; 1 - u is never 0.
    let (u, angle) = (1.0 - random.f64(), std::f64::consts::TAU * random.f64());
    let normal = (-2.0 * u.ln()).sqrt() * angle.cos();
    (sigma * normal - sigma * sigma / 2.0).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_mean_one_and_the_given_spread() {
        let mut random = fastrand::Rng::with_seed(1);
        let factors: Vec<f64> = (0..100_000).map(|_| factor(&mut random, 0.5)).collect();
        let mean = |values: &dyn Fn(f64) -> f64| {
            factors.iter().map(|&f| values(f)).sum::<f64>() / factors.len() as f64
        };
        assert!((mean(&|f| f) - 1.0).abs() < 0.01);
        let centre = mean(&|f| f.ln());
        let spread = mean(&|f| (f.ln() - centre).powi(2)).sqrt();
        assert!((spread - 0.5).abs() < 0.01);
        assert_eq!(factor(&mut random, 0.0), 1.0);
    }
}
