//! Requests that wait, at the coordinator, for one node.
//!
//! A node is given work shortly before it runs out of it; the rest waits here, where it can still
//! be reordered, moved to another node, or withdrawn. Who is next:
//!
//! 1. the highest class, unless a lower one has had less than its guaranteed share of the nodes'
//!    time lately, or has waited so long that it counts as a higher one;
//! 2. in it, the tenant that has had the least of the nodes' time;
//! 3. of that tenant, the request that is due first. It is due some time after its arrival that
//!    is proportional to its own prefill time ([`DUE_PER_MS`]): short requests overtake longer
//!    ones, and nobody is overtaken by what comes more than that time later.

use std::cmp::Ordering;

use baton_proto::ids::RequestId;
use serde::Deserialize;

use super::tenants::{TenantId, Tenants};

/// A request is due so long after its arrival, in times of its own prefill.
const DUE_PER_MS: f64 = 10.0;
/// Who has waited so long counts as a class higher.
const AGING_MS: f64 = 60_000.0;

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Somebody waits for every token.
    Interactive,
    /// Neither.
    #[default]
    Standard,
    /// Any time will do.
    Batch,
}

impl Class {
    /// All, the highest first.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Standard, Self::Batch];
    /// Shares of the nodes' time that each gets if it has work, whatever the others have.
    pub const GUARANTEED: [f64; 3] = [0.6, 0.3, 0.1];

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Standard => "standard",
            Self::Batch => "batch",
        }
    }

    /// The class of this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "interactive" => Some(Self::Interactive),
            "standard" => Some(Self::Standard),
            "batch" => Some(Self::Batch),
            _ => None,
        }
    }
}

/// A waiting request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Entry {
    /// Which.
    pub(super) request: RequestId,
    /// Its class.
    pub(super) class: Class,
    /// Whose it is.
    pub(super) tenant: TenantId,
    /// When it arrived.
    pub(super) arrived: f64,
    /// When it is due, which orders those that wait.
    pub(super) due: f64,
    /// When it must have begun to answer, if ever.
    pub(super) deadline: f64,
    /// Predicted prefill time on this node.
    pub(super) ms: f64,
    /// Not before.
    pub(super) retry_at: f64,
}

impl Entry {
    /// When a request that takes `ms` to compute is due: at the latest when it must be begun so that
    /// it makes its deadline.
    #[must_use]
    pub(super) fn due(arrived: f64, ms: f64, deadline: f64) -> f64 {
        (arrived + DUE_PER_MS * ms).min(deadline - ms)
    }

    /// Who is first of two of any queues, by class and due time alone.
    pub(super) fn order(&self, other: &Self) -> Ordering {
        let by_class = self.class.cmp(&other.class);
        let by_due = self.due.total_cmp(&other.due);
        by_class.then(by_due).then(self.request.cmp(&other.request))
    }

    fn class_now(&self, now: f64) -> usize {
        (self.class as usize).saturating_sub(((now - self.arrived) / AGING_MS) as usize)
    }
}

/// What waits for one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    /// By class, then by when they are due.
    entries: Vec<Entry>,
}

/// What a request would find in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Place {
    /// Prefill time of those before it.
    pub(super) ahead_ms: f64,
    /// Requests after it.
    pub(super) behind: usize,
    /// Least time by which one of those after it makes its deadline.
    pub(super) slack_ms: f64,
}

impl Queue {
    /// Whether none waits.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Prefill time of all that wait.
    #[must_use]
    pub(super) fn ms(&self) -> f64 {
        self.entries.iter().map(|entry| entry.ms).sum()
    }

    /// Where this request would stand if the node starts on the queue at `start`; it may be in
    /// the queue already.
    #[must_use]
    pub(super) fn place(&self, entry: &Entry, start: f64) -> Place {
        let mut place = Place { slack_ms: f64::INFINITY, ..Place::default() };
        let mut end = start;
        for other in self.entries.iter().filter(|other| other.request != entry.request) {
            end += other.ms;
            if other.order(entry).is_lt() {
                place.ahead_ms += other.ms;
            } else {
                place.behind += 1;
                let slack = other.deadline - end;
                // Who will be late anyway is not made so by a newcomer.
                if slack >= 0.0 {
                    place.slack_ms = place.slack_ms.min(slack);
                }
            }
        }
        place
    }

    /// Adds a request.
    pub(super) fn insert(&mut self, entry: Entry) {
        let at = self.entries.partition_point(|other| other.order(&entry).is_lt());
        self.entries.insert(at, entry);
    }

    /// Takes a request out.
    pub(super) fn remove(&mut self, request: RequestId) -> Option<Entry> {
        let at = self.entries.iter().position(|entry| entry.request == request)?;
        Some(self.entries.remove(at))
    }

    /// All that wait, in order.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Who is next, of those that may go now.
    #[must_use]
    pub(super) fn next(&self, shares: &Shares, tenants: &Tenants, now: f64) -> Option<Entry> {
        let may = || self.entries.iter().filter(|entry| entry.retry_at <= now);
        let mut present = [false; 3];
        may().for_each(|entry| present[entry.class_now(now)] = true);
        let class = shares.turn(present)?;
        let theirs = may().filter(|entry| entry.class_now(now) == class);
        let served = |entry: &Entry| tenants.served(entry.tenant);
        let first =
            |a: &&Entry, b: &&Entry| served(a).total_cmp(&served(b)).then(a.due.total_cmp(&b.due));
        theirs.min_by(first).copied()
    }
}

/// How much of the nodes' time each class has had lately.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares {
    served: [f64; 3],
}

/// Time served after which older service counts half.
const SHARE_WINDOW_MS: f64 = 60_000.0;

impl Shares {
    /// A class got so much time.
    pub(super) fn serve(&mut self, class: Class, ms: f64) {
        self.served[class as usize] += ms;
        if self.served.iter().sum::<f64>() > SHARE_WINDOW_MS {
            self.served.iter_mut().for_each(|served| *served /= 2.0);
        }
    }

    /// Whose turn it is, of the classes that have work.
    fn turn(&self, present: [bool; 3]) -> Option<usize> {
        let all = self.served.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        let had = |class: usize| self.served[class] / all / Class::GUARANTEED[class];
        let waiting = || (0..3).filter(|&class| present[class]);
        let highest = waiting().next()?;
        let lower = waiting().skip(1).filter(|&class| had(class) < 1.0);
        Some(lower.min_by(|&a, &b| had(a).total_cmp(&had(b))).unwrap_or(highest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(request: u128, class: Class, arrived: f64, ms: f64) -> Entry {
        let due = Entry::due(arrived, ms, f64::INFINITY);
        let (request, tenant) = (RequestId(request), TenantId(0));
        Entry { request, class, tenant, arrived, due, deadline: f64::INFINITY, ms, retry_at: 0.0 }
    }

    fn drain(queue: &mut Queue, shares: &mut Shares, tenants: &mut Tenants) -> Vec<u128> {
        let mut order = Vec::new();
        while let Some(next) = queue.next(shares, tenants, 0.0) {
            queue.remove(next.request);
            shares.serve(next.class, next.ms);
            tenants.serve(next.tenant, next.ms);
            order.push(next.request.0);
        }
        order
    }

    #[test]
    fn short_ones_overtake_but_not_for_ever() {
        let mut queue = Queue::default();
        queue.insert(entry(1, Class::Standard, 0.0, 1500.0));
        queue.insert(entry(2, Class::Standard, 100.0, 50.0));
        queue.insert(entry(3, Class::Standard, 15_001.0, 1.0));
        let place = queue.place(&entry(4, Class::Standard, 200.0, 500.0), 0.0);
        assert_eq!(place, Place { ahead_ms: 50.0, behind: 2, slack_ms: f64::INFINITY });
        let order = drain(&mut queue, &mut Shares::default(), &mut Tenants::default());
        assert_eq!(order, [2, 1, 3]);
    }

    #[test]
    fn a_long_one_is_due_in_time_for_its_deadline() {
        assert_eq!(Entry::due(100.0, 5000.0, f64::INFINITY), 50_100.0);
        assert_eq!(Entry::due(100.0, 5000.0, 30_000.0), 25_000.0);
        assert_eq!(Entry::due(100.0, 50.0, 30_000.0), 600.0);
    }

    #[test]
    fn a_lower_class_gets_its_share() {
        let (mut queue, mut shares) = (Queue::default(), Shares::default());
        for n in 0..100 {
            queue.insert(entry(n, Class::Interactive, n as f64, 10.0));
            queue.insert(entry(1000 + n, Class::Batch, n as f64, 10.0));
        }
        let order = drain(&mut queue, &mut shares, &mut Tenants::default());
        let batch = order[..100].iter().filter(|&&n| n >= 1000).count();
        assert!((8..=12).contains(&batch), "{batch} of 100");
    }

    #[test]
    fn who_waits_long_rises() {
        let mut queue = Queue::default();
        queue.insert(entry(1, Class::Standard, 0.0, 10.0));
        queue.insert(entry(2, Class::Interactive, 59_000.0, 10.0));
        let mut shares = Shares::default();
        Class::ALL
            .iter()
            .for_each(|&class| shares.serve(class, 1000.0 * Class::GUARANTEED[class as usize]));
        let tenants = Tenants::default();
        let next = |now| queue.next(&shares, &tenants, now).map(|entry| entry.request.0);
        assert_eq!(next(59_500.0), Some(2));
        assert_eq!(next(60_000.0), Some(1));
    }

    #[test]
    fn tenants_share_in_time_and_not_in_requests() {
        let (mut queue, mut shares, mut tenants) =
            (Queue::default(), Shares::default(), Tenants::default());
        for n in 0..40 {
            let long = entry(n, Class::Standard, 0.0, 100.0);
            queue.insert(Entry { tenant: TenantId(1), ..long });
            let short = entry(1000 + n, Class::Standard, 0.0, 10.0);
            queue.insert(Entry { tenant: TenantId(2), ..short });
        }
        let order = drain(&mut queue, &mut shares, &mut tenants);
        let long = order[..44].iter().filter(|&&n| n < 1000).count();
        assert!((3..=5).contains(&long), "{long} long ones among the first 44");
    }

    #[test]
    fn says_what_a_newcomer_would_do_to_the_others() {
        let mut queue = Queue::default();
        let late = entry(1, Class::Standard, 0.0, 500.0);
        queue.insert(Entry { deadline: 600.0, ..late });
        let place = queue.place(&entry(2, Class::Standard, 0.0, 10.0), 0.0);
        assert_eq!(place.slack_ms, 100.0);
        assert_eq!(queue.place(&late, 0.0).slack_ms, f64::INFINITY, "not of itself");
    }
}
