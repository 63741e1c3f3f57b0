//! Decisions per second on one thread, and response times to requests that arrive on their own
//! schedule, while the index is full and changing.

use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use baton_coordinator::core::NewRequest;
use baton_coordinator::placement::Standing;
use baton_proto::hash::{BlockHash, CacheSalt};
use baton_proto::ids::RequestId;
use baton_proto::sampling::SamplingParams;
use baton_sim::trace::Trace;
use serde_json::json;

use super::caches::{Cache, Change, caches};
use super::cluster::{Cluster, MODEL, root};
use super::prompts::{BLOCK_TOKENS, PARTS, Prompts, Segment, mix};
use super::times::Times;
use super::{Figure, PlaceArgs};
use crate::commands::{CommandError, usage};
use crate::output::bytes;

/// Reports of each node per second.
const REPORTS: u32 = 10;
/// Prompts that are asked for, again and again with other ends.
const SAMPLES: usize = 10_000;
/// Requests that are handed over at once, and how many such heaps are ready.
const REQUESTS: usize = 64;
const REQUEST_HEAPS: usize = 8;
/// The same of cache events.
const CHANGES: usize = 1024;
const CHANGE_HEAPS: usize = 64;
/// Least blocks per node.
const LEAST_CACHE: u64 = 256;

/// A request and the hashes of its blocks, as the front hands them over.
type Arrival = (NewRequest, Vec<BlockHash>);

pub(super) fn run(args: &PlaceArgs) -> Result<Vec<Figure>, CommandError> {
    if args.blocks / u64::from(args.nodes) < LEAST_CACHE {
        return Err(usage(&format!("--blocks must be at least {LEAST_CACHE} per node")));
    }
    let prompts = Prompts::new(Trace::read(&args.trace, PARTS * BLOCK_TOKENS)?)?;
    let (nodes, blocks) = (args.nodes as usize, args.blocks as usize);
    let caches = caches(&prompts, nodes, blocks);
    let samples: Vec<_> = (0..SAMPLES).map(|number| sample(&caches, number)).collect();

    let empty = resident();
    let mut cluster = Cluster::new(nodes, blocks)?;
    caches.iter().enumerate().for_each(|(node, cache)| cluster.fill(node, cache));
    let (distinct, pairs, index_bytes) = cluster.index();
    let full = resident();
    let mut figures = vec![
        count("nodes", nodes as u64),
        count("pairs", pairs),
        count("blocks", distinct),
        size("index_bytes", index_bytes),
        size("resident_bytes", full.saturating_sub(empty)),
        number("bytes_per_pair", index_bytes as f64 / pairs as f64),
    ];
    std::thread::scope(|scope| {
        let (arrivals_out, arrivals) = sync_channel(REQUEST_HEAPS);
        let (changes_out, changes) = sync_channel(CHANGE_HEAPS);
        let (samples, prompts, event_blocks) = (&samples, &prompts, args.event_blocks.into());
        scope.spawn(move || make_arrivals(samples, &arrivals_out));
        scope.spawn(move || make_changes(caches, prompts, event_blocks, &changes_out));
        let mut bench =
            Bench { cluster, arrivals: Heap::new(arrivals), changes: Heap::new(changes) };
        figures.extend(measure(&mut bench, args)?);
        Ok::<_, CommandError>(())
    })?;
    figures.push(hashing(&samples));
    Ok(figures)
}

fn measure(bench: &mut Bench, args: &PlaceArgs) -> Result<Vec<Figure>, CommandError> {
    let time = Duration::from_secs(args.seconds.into());
    let most = bench.serve(None, args.events, time)?;
    let per_second = most.response.len() as f64 / time.as_secs_f64();
    let paced = bench.serve(Some(args.rate), args.events, time)?;
    let kept = paced.response.len() as f64 / time.as_secs_f64();
    let mut figures = vec![
        number("decisions_per_second", per_second),
        count("events_per_second", args.events.into()),
        count("rate", args.rate.into()),
        number("rate_kept", kept),
        paced.response.figure("response_us"),
        paced.service.figure("service_us"),
        count("failed", bench.cluster.failed()),
    ];
    if args.churn_hours > 0.0 {
        let events = (args.churn_hours * 3600.0 * f64::from(args.events)) as u64;
        let took = bench.churn(events)?;
        let (_, pairs, bytes) = bench.cluster.index();
        figures.extend([
            count("churn_events", events),
            number("churn_events_per_second", events as f64 / took.as_secs_f64()),
            size("after_churn_bytes", bytes),
            number("after_churn_bytes_per_pair", bytes as f64 / pairs as f64),
            size("after_churn_process_bytes", resident()),
        ]);
    }
    Ok(figures)
}

/// What one measurement saw.
#[derive(Default)]
struct Measured {
    /// From a request's scheduled arrival to its decision.
    response: Times,
    /// From the beginning of its decision.
    service: Times,
}

/// The coordinator, and what is ready to happen to it.
struct Bench {
    cluster: Cluster,
    arrivals: Heap<Arrival>,
    changes: Heap<(usize, Change)>,
}

/// Takes one by one what another thread hands over in heaps, so that this one is seldom disturbed.
struct Heap<T> {
    next: std::vec::IntoIter<T>,
    others: Receiver<Vec<T>>,
}

impl<T> Heap<T> {
    fn new(others: Receiver<Vec<T>>) -> Self {
        Self { next: Vec::new().into_iter(), others }
    }

    fn take(&mut self) -> Result<T, RecvError> {
        loop {
            if let Some(one) = self.next.next() {
                return Ok(one);
            }
            self.next = self.others.recv()?.into_iter();
        }
    }
}

impl Bench {
    /// Lets `rate` requests and `events` cache events arrive per second for a while, or as many
    /// requests as can be served.
    fn serve(
        &mut self,
        rate: Option<u32>,
        events: u32,
        time: Duration,
    ) -> Result<Measured, CommandError> {
        let mut measured = Measured::default();
        let begin = Instant::now();
        let nodes_reports = f64::from(REPORTS) * self.cluster.nodes() as f64;
        let mut event = Schedule::even(begin, f64::from(events));
        let mut report = Schedule::even(begin, nodes_reports);
        let mut arrival = rate.map(|rate| Schedule::random(begin, f64::from(rate)));
        loop {
            let now = Instant::now();
            if now.duration_since(begin) >= time {
                return Ok(measured);
            }
            self.cluster.handle_timeout(now);
            let answer = self.cluster.next_answer().unwrap_or(now + time);
            let request = arrival.as_ref().map_or(now, |schedule| schedule.next);
            let first = event.next.min(report.next).min(answer).min(request);
            if first > now {
                std::hint::spin_loop();
            } else if first == answer {
                self.cluster.answer(now);
            } else if first == event.next {
                event.advance();
                self.change(now)?;
            } else if first == report.next {
                report.advance();
                self.cluster.report(now);
            } else {
                arrival.iter_mut().for_each(Schedule::advance);
                self.submit(rate.map(|_| request), &mut measured)?;
            }
        }
    }

    fn submit(
        &mut self,
        scheduled: Option<Instant>,
        measured: &mut Measured,
    ) -> Result<(), CommandError> {
        let (new, chain) = self.arrivals.take()?;
        let begin = Instant::now();
        let scheduled = scheduled.unwrap_or(begin);
        self.cluster.submit(new, chain, scheduled)?;
        let end = Instant::now();
        measured.service.add(end - begin);
        measured.response.add(end - scheduled);
        Ok(())
    }

    /// The next cache event.
    fn change(&mut self, now: Instant) -> Result<(), CommandError> {
        let (node, change) = self.changes.take()?;
        self.cluster.change(node, change, now);
        Ok(())
    }

    /// Applies so many cache events as fast as possible; how long that took.
    fn churn(&mut self, events: u64) -> Result<Duration, CommandError> {
        let begin = Instant::now();
        (0..events).try_for_each(|_| self.change(begin))?;
        Ok(begin.elapsed())
    }
}

/// When something happens again and again.
struct Schedule {
    next: Instant,
    gap: Duration,
    /// Gaps are random with mean `gap`.
    random: Option<u64>,
}

impl Schedule {
    fn even(begin: Instant, per_second: f64) -> Self {
        Self { next: begin, gap: Duration::from_secs_f64(1.0 / per_second), random: None }
    }

    /// A Poisson process.
    fn random(begin: Instant, per_second: f64) -> Self {
        Self { random: Some(0), ..Self::even(begin, per_second) }
    }

    fn advance(&mut self) {
        let Some(number) = &mut self.random else { return self.next += self.gap };
        *number += 1;
        let chance = ((mix(*number) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        self.next += self.gap.mul_f64(-chance.ln());
    }
}

/// A prompt as some cache holds it, and how many of its segments are to be asked for; the others will
/// be new. So a lookup ends anywhere.
fn sample(caches: &[Cache], number: usize) -> (Vec<Segment>, usize) {
    let chance = mix(number as u64);
    let segments = caches[chance as usize % caches.len()].prompt(chance >> 32).to_vec();
    let known = 1 + mix(chance) as usize % segments.len().max(1);
    (segments, known)
}

/// Makes requests as the front does, until nobody wants more.
fn make_arrivals(samples: &[(Vec<Segment>, usize)], out: &SyncSender<Vec<Arrival>>) {
    let longest = samples.iter().map(|(segments, _)| segments.len()).max().unwrap_or_default();
    let tokens = vec![1; longest * (PARTS * BLOCK_TOKENS) as usize];
    let mut numbers = 0..;
    loop {
        let some = numbers.by_ref().take(REQUESTS);
        if out.send(some.map(|number| arrival(samples, &tokens, number)).collect()).is_err() {
            return;
        }
    }
}

fn arrival(samples: &[(Vec<Segment>, usize)], tokens: &[u32], number: u64) -> Arrival {
    let (segments, known) = &samples[number as usize % samples.len()];
    let new = (*known..segments.len()).map(|at| Segment::new(number << 16 | at as u64));
    let segments = segments[..*known].iter().copied().chain(new);
    let blocks = segments.flat_map(|segment| (0..PARTS).map(move |part| segment.block(part)));
    let chain: Vec<_> = blocks.collect();
    let request = NewRequest {
        id: RequestId(number.into()),
        model: MODEL.to_owned(),
        tokens: tokens[..chain.len() * BLOCK_TOKENS as usize].into(),
        embed: None,
        sampling: SamplingParams { max_tokens: 2, ..SamplingParams::default() },
        salt: CacheSalt::default(),
        standing: Standing::default(),
        tenant: Default::default(),
        deadline: None,
        trace: None,
    };
    (request, chain)
}

/// Lets the caches turn over, each in turn, until nobody wants to know.
fn make_changes(
    mut caches: Vec<Cache>,
    prompts: &Prompts,
    blocks: usize,
    out: &SyncSender<Vec<(usize, Change)>>,
) {
    let count = caches.len();
    let mut nodes = (0..count).cycle();
    loop {
        let some = nodes.by_ref().take(CHANGES);
        let changes = some.map(|node| (node, caches[node].turn_over(prompts, blocks)));
        if out.send(changes.collect()).is_err() {
            return;
        }
    }
}

/// What hashing the blocks of a prompt costs, which the front does for each before it is decided on.
fn hashing(samples: &[(Vec<Segment>, usize)]) -> Figure {
    let mut times = Times::default();
    for (segments, _) in samples.iter().take(200) {
        let tokens = vec![1; segments.len() * (PARTS * BLOCK_TOKENS) as usize];
        let begin = Instant::now();
        let chain = root().chain(CacheSalt::default(), &tokens, BLOCK_TOKENS as usize);
        std::hint::black_box(chain);
        times.add(begin.elapsed());
    }
    times.figure("hashing_us")
}

/// Memory of this process, in bytes; 0 where that is not known.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

pub(super) fn count(key: &'static str, value: u64) -> Figure {
    Figure { key, value: json!(value), words: value.to_string() }
}

fn size(key: &'static str, value: u64) -> Figure {
    Figure { key, value: json!(value), words: bytes(value) }
}

pub(super) fn number(key: &'static str, value: f64) -> Figure {
    let value = (value * 10.0).round() / 10.0;
    Figure { key, value: json!(value), words: value.to_string() }
}
