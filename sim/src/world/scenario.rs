//! A cluster, its clients and its faults, all from a seed.

use std::time::Duration;

use baton_coordinator::control::Options;
use baton_coordinator::orders::Order;
use baton_coordinator::placement::{self, Class, LocalPrefill, Standing, TenantId};
use baton_coordinator::requests::Limits as RequestLimits;
use baton_engine::EngineInfo;
use baton_engine::scheduler::Limits;
use baton_kvtransfer::Timing;
use baton_proto::embedding::Pooling;
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::ModelRoot;
use baton_proto::ids::Role;
use baton_proto::sampling::SamplingParams;
use fastrand::Rng;

use super::client::{Client, Ended, Plan, Question};
use super::faults::Fault;
use super::log::{Log, Logging};
use super::memory::{HIDDEN_SIZE, Oracle, made_up_tokens};
use super::net::{Net, Party, Quality};
use super::node::NodeSpec;
use super::{Device, Meddling, World};
use crate::replay::{DecodeCost, PrefillCost};

/// Clients ask, and things go wrong, within this time; then everything is mended.
const TROUBLE: Duration = Duration::from_secs(10);
/// When everything has been mended for so long, all must be done.
const PATIENCE: Duration = Duration::from_secs(900);
/// For what is still under way when all is done: cache events, reports, cancels.
const QUIET: Duration = Duration::from_secs(2);

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Requests by how they ended: complete, satisfied early, left, late.
    pub ended: [usize; 4],
    /// Faults, their mending not counted.
    pub faults: usize,
    /// Attempts that coordinators repeated.
    pub retried: u64,
    /// Times that a client had to ask again.
    pub asked_again: u32,
    /// Events.
    pub events: u64,
    /// Virtual time.
    pub lasted: Duration,
    /// Of the event log, if one was kept.
    pub log_hash: u64,
}

/// Runs the cluster of a seed to its end.
///
/// # Panics
/// If a client hears something wrong, a machine contradicts itself, or anything is left.
#[must_use]
pub fn run_seed(seed: u64, logging: Logging) -> Report {
    let mut dice = Rng::with_seed(seed);
    let scenario = Scenario::roll(&mut dice);
    let net = Net::new(dice.u64(..), scenario.quality, Log::new(logging));
    let mut world =
        World::new(net, scenario.specs.clone(), scenario.options.clone(), scenario.meddling);
    scenario.add_clients(&mut world, &mut dice);
    let faults = scenario.add_faults(&mut world, &mut dice);
    run(&mut world);
    world.check(scenario.indexed);
    let report = report(&world, faults);
    assert!(!scenario.gentle || report.retried == 0, "an attempt was lost for no good reason");
    report
}

fn run(world: &mut World) {
    let start = world.net.now();
    let (mended, end) = (start + TROUBLE, start + TROUBLE + PATIENCE);
    let mut idle_since = None;
    loop {
        let now = world.net.now();
        assert!(now < end, "not done {PATIENCE:?} after all was mended: {}", world.left());
        if now > mended {
            match idle_since {
                // Somebody may have noticed a loss meanwhile.
                Some(since) if now > since + QUIET && world.is_idle() => return,
                Some(since) if now > since + QUIET => idle_since = None,
                Some(_) => {}
                None if world.is_idle() => idle_since = Some(now),
                None => {}
            }
        }
        assert!(world.step(), "nothing is to come: {}", world.left());
    }
}

fn report(world: &World, faults: usize) -> Report {
    let mut report = Report { faults, ..Report::default() };
    for client in &world.clients {
        let kinds = [Ended::Complete, Ended::Satisfied, Ended::Left, Ended::Late];
        let kind = kinds.iter().position(|&kind| client.ended == Some(kind));
        report.ended[kind.expect("every client has ended")] += 1;
        report.asked_again += client.submissions.saturating_sub(1);
    }
    let totals = world.coordinators.iter().flatten().map(|c| c.control.totals());
    report.retried = totals.map(|totals| totals.retried).sum();
    report.events = world.net.timeline.made();
    report.lasted = world.net.timeline.elapsed();
    report.log_hash = world.net.log.hash();
    report
}

struct Scenario {
    quality: Quality,
    specs: Vec<NodeSpec>,
    options: Vec<Options>,
    max_model_len: usize,
    meddling: Meddling,
    /// Only connections between nodes break, and there is room for all: no attempt may be lost.
    gentle: bool,
    /// The index has room for all that the nodes may hold.
    indexed: bool,
}

fn one_of<T: Copy>(dice: &mut Rng, all: &[T]) -> T {
    all[dice.usize(..all.len())]
}

fn between(dice: &mut Rng, least: f64, most: f64) -> f64 {
    least + (most - least) * dice.f64()
}

fn millis(dice: &mut Rng, least: f64, most: f64) -> Duration {
    Duration::from_secs_f64(between(dice, least, most) / 1e3)
}

impl Scenario {
    fn roll(dice: &mut Rng) -> Self {
        let gentle = dice.u32(..6) == 0;
        let block_tokens = one_of(dice, &[2, 4, 8]);
        let head_dim = one_of(dice, &[1, 1024, 8192]);
        let (layers, dtype) = (dice.u32(2..4), KvDtype::F32);
        let geometry = KvGeometry { layers, kv_heads: 1, head_dim, dtype, block_tokens };
        let prefill = dice.usize(0..4);
        let roles = std::iter::repeat_n(Role::Prefill, prefill)
            .chain(std::iter::repeat_n(Role::Decode, dice.usize(1..4)));
        let roles: Vec<Role> = roles.collect();
        let sizes: &[usize] = if gentle { &[500] } else { &[8, 12, 20, 40, 200] };
        let blocks = || one_of(dice, sizes);
        let blocks: Vec<usize> = std::iter::repeat_with(blocks).take(roles.len()).collect();
        let least = *blocks.iter().min().expect("there are nodes");
        let max_model_len = (least * block_tokens as usize).min(120);
        let timing = if gentle { Timing::default() } else { Self::timing(dice) };
        let report = millis(dice, 20.0, 500.0);
        let vocab_size = dice.usize(20..1000);
        let info = |kv_blocks| EngineInfo {
            root: ModelRoot::new(&[7; 32], &geometry),
            geometry,
            vocab_size,
            hidden_size: HIDDEN_SIZE,
            max_model_len,
            kv_blocks,
        };
        let spec = |(role, kv_blocks): (Role, usize)| {
            let max_batch_tokens = one_of(dice, &[4, 16, 64, 256]);
            let limits = Limits {
                block_tokens: block_tokens as usize,
                kv_blocks,
                max_batch_tokens,
                max_sequences: one_of(dice, &[1, 2, 4, 16]).min(max_batch_tokens),
                max_model_len,
                vocab_size,
            };
            let max_waiting = if gentle { 64 } else { one_of(dice, &[2, 8, 64]) };
            let device = Self::device(dice);
            let (info, watched) = (info(kv_blocks), true);
            NodeSpec { role, info, limits, max_waiting, device, timing, report, watched }
        };
        let specs = roles.into_iter().zip(blocks).map(spec).collect();
        let indexed = dice.u32(..4) > 0;
        let requests = if gentle { 100 } else { one_of(dice, &[3, 100, 100]) };
        let options = Options {
            limits: RequestLimits { requests, tokens: 100_000 },
            index_blocks: if indexed { 10_000 } else { dice.usize(1..30) },
            placement: placement::Options {
                local_prefill: LocalPrefill::Auto,
                pulls: dice.bool(),
                most_wait: one_of(dice, &[None, None, Some(Duration::from_millis(500))]),
            },
        };
        let coordinators = one_of(dice, &[1, 1, 1, 2, 3]);
        let slowest_ms = if gentle { 50.0 } else { 5.0 };
        let piece_seconds = millis(dice, 0.01, slowest_ms).as_secs_f64();
        let quality = Quality {
            latency: millis(dice, 0.05, 3.0),
            jitter: Duration::from_millis(one_of(dice, &[0, 0, 1, 10, 100])),
            bytes_per_second: geometry.piece_bytes() as f64 / piece_seconds,
            damage: if gentle { 0.0 } else { one_of(dice, &[0.0, 0.0, 0.1]) },
            neighbours: one_of(dice, &[false, false, true]),
            copy: Duration::from_millis(one_of(dice, &[0, 5, 300])),
            unreadable: one_of(dice, &[0.0, 0.0, 0.2]),
        };
        let meddling = Meddling {
            pulls: one_of(dice, &[0.0, 0.0, 0.3, 0.8]),
            lost_events: one_of(dice, &[0.0, 0.0, 0.1]),
            roles: !gentle && dice.u32(..6) == 0,
        };
        Self {
            quality,
            meddling,
            gentle,
            specs,
            options: vec![options; coordinators],
            max_model_len,
            indexed,
        }
    }

    fn timing(dice: &mut Rng) -> Timing {
        let short = Timing {
            lease: Duration::from_secs(2),
            begin: Duration::from_secs(10),
            producer: Duration::from_secs(20),
            complete: Duration::from_secs(5),
            reconnect: Duration::from_secs(2),
            ..Timing::default()
        };
        one_of(dice, &[Timing::default(), short])
    }

    fn device(dice: &mut Rng) -> Device {
        let prefill = PrefillCost {
            start_ms: between(dice, 0.0, 10.0),
            token_ms: between(dice, 0.05, 2.0),
            square_ms: between(dice, 0.0, 0.001),
        };
        let decode = DecodeCost {
            step_ms: between(dice, 1.0, 20.0),
            sequence_ms: between(dice, 0.01, 1.0),
            kv_token_ms: between(dice, 0.0, 0.01),
        };
        Device { prefill, decode }
    }

    fn add_clients(&self, world: &mut World, dice: &mut Rng) {
        let vocab = world.specs[0].info.vocab_size as u32;
        let layers = world.specs[0].info.geometry.layers as usize;
        for _ in 0..dice.usize(3..40) {
            let prompt = self.prompt(dice, vocab);
            let question = self.question(dice, prompt, vocab);
            let at = world.net.now() + TROUBLE.mul_f64(dice.f64() * 0.8);
            let oracle = Oracle::new(layers, world.block_tokens, vocab);
            world.add_client(at, Client::new(question, oracle, self.max_model_len, at));
        }
    }

    /// One of a few beginnings, and something of its own.
    fn prompt(&self, dice: &mut Rng, vocab: u32) -> Vec<u32> {
        let most = (self.max_model_len - 2).min(60);
        let shared = dice.usize(..most + 1);
        let family = dice.u64(..3);
        let own = dice.u64(..);
        let length = dice.usize(1..=most);
        let tokens = made_up_tokens(family, shared.min(length), vocab);
        tokens.chain(made_up_tokens(own, length.saturating_sub(shared), vocab)).collect()
    }

    fn question(&self, dice: &mut Rng, prompt: Vec<u32>, vocab: u32) -> Question {
        let max_tokens = dice.u32(1..25);
        let sampling = SamplingParams {
            max_tokens,
            min_tokens: dice.u32(..max_tokens),
            eos_token_ids: (0..dice.u32(..4)).map(|_| dice.u32(..vocab)).collect(),
            prompt_logprobs: (prompt.len() > 1 && dice.u32(..10) == 0).then_some(0),
            ..SamplingParams::default()
        };
        let wanted = dice.usize(1..=max_tokens as usize);
        let plan = match dice.u32(..12) {
            0 => Plan::LeaveAfter(millis(dice, 0.0, 1000.0)),
            1 => Plan::LeaveAt(wanted),
            2 => Plan::SatisfiedAt(wanted),
            _ => Plan::Stay,
        };
        let deadline = (dice.u32(..12) == 0).then(|| millis(dice, 10.0, 8000.0));
        let class = one_of(dice, &Class::ALL);
        let standing = Standing { class, tenant: TenantId(dice.u64(..4)) };
        let pooling = one_of(dice, &[Pooling::Last, Pooling::Mean]);
        let embed = (dice.u32(..8) == 0).then_some(pooling);
        let of_embedding = SamplingParams { max_tokens: 1, ..SamplingParams::default() };
        let sampling = if embed.is_some() { of_embedding } else { sampling };
        Question { prompt, sampling, embed, standing, deadline, plan }
    }

    /// Returns how many.
    fn add_faults(&self, world: &mut World, dice: &mut Rng) -> usize {
        let count = if self.gentle { 12 } else { one_of(dice, &[0, 1, 2, 3, 4, 6, 8]) };
        for _ in 0..count {
            let at = TROUBLE.mul_f64(dice.f64() * 0.9);
            let (fault, mending) = self.fault(dice);
            world.arrange(at, fault);
            if let Some(mending) = mending {
                world.arrange(at + millis(dice, 50.0, 8000.0), mending);
            }
        }
        world.arrange(TROUBLE, Fault::Mend);
        for seconds in [5, 15] {
            world.arrange(TROUBLE + Duration::from_secs(seconds), Fault::RestoreOrders);
        }
        count
    }

    fn fault(&self, dice: &mut Rng) -> (Fault, Option<Fault>) {
        let node = dice.usize(..self.specs.len());
        let coordinator = Party::Coordinator(dice.usize(..self.options.len()));
        let other = (node + dice.usize(..self.specs.len())) % self.specs.len();
        let other = if other == node { coordinator } else { Party::Node(other) };
        let (party, dark) = (Party::Node(node), dice.bool());
        let kind = match (self.gentle, other) {
            (false, _) => dice.u32(..12),
            (true, Party::Node(_)) => 6,
            (true, Party::Coordinator(_)) => 5,
        };
        match kind {
            0 | 1 => (Fault::Die { party, dark }, Some(Fault::Start(party))),
            2 => (Fault::Die { party: coordinator, dark }, Some(Fault::Start(coordinator))),
            3 | 4 => (Fault::Cut(party, other), Some(Fault::Heal(party, other))),
            5 => (Fault::Slow { node, times: 10.0 }, Some(Fault::Slow { node, times: 1.0 })),
            6 | 7 => (Fault::Break(party, other), None),
            8 => {
                let drain = |draining| Fault::Order { node, order: Order::Drain(draining) };
                (drain(true), Some(drain(false)))
            }
            9 => {
                let role = one_of(dice, &[Role::Prefill, Role::Decode]);
                (Fault::Order { node, order: Order::Role(role) }, None)
            }
            _ => (
                Fault::Freeze(one_of(dice, &[party, coordinator]), millis(dice, 50.0, 8000.0)),
                None,
            ),
        }
    }
}
