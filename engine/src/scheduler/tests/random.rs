//! Any order of inputs.

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Add {
        kind: Kind,
        prompt: Vec<u32>,
        max_tokens: u32,
        end: Option<u32>,
        deadline: Option<u64>,
        guided: bool,
    },
    Cancel(usize),
    Imported(usize),
    ReturnLease(usize),
    Hold(usize),
    Release(usize),
    Limit(usize),
    AskMasks,
    FindMask(usize),
    Step,
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![
        2 => Just(Kind::Local),
        2 => Just(Kind::Export),
        2 => Just(Kind::Import),
        1 => Just(Kind::Embed(Pooling::Last)),
        1 => Just(Kind::Embed(Pooling::Mean)),
        1 => Just(Kind::Serve),
        1 => Just(Kind::Fetch),
    ];
    // Few different tokens, so that prompts share prefixes.
    let tokens = prop::collection::vec(0..2_u32, 1..30);
    let end = prop::option::weighted(0.7, 0..8_u32);
    let deadline = prop::option::weighted(0.2, 1..40_u64);
    let guided = prop::bool::weighted(0.3);
    let add = (kind, tokens, 1..12_u32, end, deadline, guided);
    prop_oneof![
        3 => add.prop_map(|(kind, prompt, max_tokens, end, deadline, guided)| {
            Op::Add { kind, prompt, max_tokens, end, deadline, guided }
        }),
        1 => any::<usize>().prop_map(Op::Cancel),
        2 => any::<usize>().prop_map(Op::Imported),
        2 => any::<usize>().prop_map(Op::ReturnLease),
        1 => any::<usize>().prop_map(Op::Hold),
        1 => any::<usize>().prop_map(Op::Release),
        1 => (1..12_usize).prop_map(Op::Limit),
        3 => Just(Op::AskMasks),
        3 => any::<usize>().prop_map(Op::FindMask),
        8 => Just(Op::Step),
    ]
}

struct World {
    rig: Rig,
    prompts: BTreeMap<TransferId, (Vec<u32>, Kind)>,
    /// Of jobs that are to be served whole: how many tokens they generate.
    lengths: BTreeMap<TransferId, usize>,
    leased: BTreeMap<TransferId, Lent>,
    seen: usize,
}

/// A lease that is out.
struct Lent {
    kind: Kind,
    blocks: Vec<u32>,
    /// Leading blocks that were cached.
    held: usize,
}

impl World {
    fn apply(&mut self, op: Op) {
        match op {
            Op::Add { kind, prompt, max_tokens, end, deadline, guided } => {
                let n = self.prompts.len() as u128;
                let all = continuation(&prompt, max_tokens as usize);
                let end_at = all.iter().position(|token| Some(*token) == end);
                if kind == Kind::Local && deadline.is_none() {
                    self.lengths.insert(id(n), end_at.map_or(all.len(), |at| at + 1));
                }
                if matches!(kind, Kind::Embed(_)) && deadline.is_none() {
                    self.lengths.insert(id(n), 0);
                }
                self.prompts.insert(id(n), (prompt.clone(), kind));
                let deadline = deadline.map(Duration::from_millis);
                let mut job = Job { deadline, ..job(n, prompt, max_tokens) };
                job.sampling.eos_token_ids.extend(end);
                if guided {
                    guided::follow(&mut job, "[a-h]*");
                }
                self.rig.add(job, kind);
            }
            Op::Cancel(i) if !self.prompts.is_empty() => {
                let id = id((i % self.prompts.len()) as u128);
                self.lengths.remove(&id);
                self.rig.scheduler.cancel(id);
            }
            Op::Imported(i) if !self.prompts.is_empty() => {
                self.imported(id((i % self.prompts.len()) as u128));
            }
            Op::ReturnLease(i) if !self.leased.is_empty() => {
                let id = *self.leased.keys().nth(i % self.leased.len()).unwrap();
                self.return_lease(id);
            }
            Op::Hold(i) if !self.prompts.is_empty() => {
                self.rig.scheduler.hold(id((i % self.prompts.len()) as u128));
            }
            Op::Release(i) if !self.prompts.is_empty() => {
                self.rig.scheduler.release(id((i % self.prompts.len()) as u128));
            }
            Op::AskMasks => self.rig.masks.ask(&mut self.rig.scheduler),
            Op::FindMask(which) => self.rig.masks.find(which, &mut self.rig.scheduler),
            Op::Limit(tokens) => self.rig.scheduler.set_prefill_limit(tokens),
            _ => {
                self.rig.now += Duration::from_millis(1);
                self.rig.step();
                self.see();
                let plan = self.rig.steps.last().unwrap();
                assert!(plan.tokens() <= limits().max_batch_tokens);
                let ids: BTreeSet<_> = plan.chunks.iter().map(|chunk| chunk.id).collect();
                assert_eq!(ids.len(), plan.chunks.len(), "one chunk for a sequence");
            }
        }
        self.rig.scheduler.check();
        self.see();
    }

    fn imported(&mut self, id: TransferId) {
        self.transfer(id);
        if self.prompts[&id].1 == Kind::Fetch {
            return self.rig.scheduler.fetched(id);
        }
        let token = next_token(&self.prompts[&id].0);
        let first = FirstToken { token, logprobs: None, finish: None };
        self.rig.scheduler.imported(id, &first);
    }

    /// What a transfer writes is there, and nothing is written any more.
    fn transfer(&mut self, id: TransferId) {
        let prompt = &self.prompts[&id].0;
        if let Some(Lent { kind: Kind::Import | Kind::Fetch, blocks, held }) =
            self.leased.get_mut(&id)
        {
            let written = *held * BLOCK_TOKENS..prompt.len().min(blocks.len() * BLOCK_TOKENS);
            for position in written {
                *self.rig.device.slot(blocks, position) = prompt[position];
            }
            *held = blocks.len();
        }
    }

    fn return_lease(&mut self, id: TransferId) {
        self.transfer(id);
        let lent = self.leased.remove(&id).unwrap();
        let told = |event: &Event| match event {
            Event::Tokens(tokens) => tokens.iter().any(|token| token.id == id),
            _ => false,
        };
        let prompt = &self.prompts[&id].0;
        let readable = match lent.kind {
            Kind::Export if self.rig.events.iter().any(told) => prompt.len(),
            Kind::Serve => lent.blocks.len() * BLOCK_TOKENS,
            _ => 0,
        };
        for (position, token) in prompt[..readable].iter().enumerate() {
            let found = self.rig.device.slot(&lent.blocks, position);
            assert_eq!(found, token, "what is leased to be read is not overwritten");
        }
        self.rig.scheduler.lease_returned(id);
    }

    fn see(&mut self) {
        self.rig.see();
        for event in &self.rig.events[self.seen..] {
            let Event::Admitted { id, kind, lease, cached_blocks, .. } = event else { continue };
            let tokens = self.prompts[id].0.len();
            let (covered, cached) = match kind {
                Kind::Local | Kind::Embed(_) => continue,
                Kind::Export | Kind::Import => (tokens.div_ceil(BLOCK_TOKENS), 0..=tokens),
                Kind::Serve => (tokens / BLOCK_TOKENS, lease.len()..=lease.len()),
                Kind::Fetch => (tokens / BLOCK_TOKENS, 0..=lease.len() - 1),
            };
            let lent = Lent { kind: *kind, blocks: lease.clone(), held: *cached_blocks };
            self.leased.insert(*id, lent);
            assert_eq!(lease.len(), covered, "a lease covers the prompt, a pull its full blocks");
            assert!(cached.contains(cached_blocks));
        }
        self.seen = self.rig.events.len();
    }

    /// Everyone gets what he waits for; then nothing may be left.
    fn drain(&mut self) {
        for _ in 0..2_000 {
            for id in self.prompts.keys().copied().collect::<Vec<_>>() {
                self.imported(id);
                self.rig.scheduler.release(id);
            }
            while let Some(id) = self.leased.keys().next().copied() {
                self.return_lease(id);
            }
            self.rig.masks.find_all(&mut self.rig.scheduler);
            self.apply(Op::Step);
            let idle = self.rig.scheduler.sequences.is_empty() && self.leased.is_empty();
            if idle && self.rig.device.flying.is_empty() {
                return;
            }
        }
        panic!("it does not come to an end");
    }

    fn judge(&self) {
        let positions: BTreeMap<TransferId, Vec<(u32, u32)>> =
            self.rig.events.iter().fold(BTreeMap::new(), |mut all, event| {
                if let Event::Tokens(tokens) = event {
                    for t in tokens {
                        all.entry(t.id).or_insert_with(Vec::new).push((t.position, t.token));
                    }
                }
                all
            });
        for (id, (prompt, kind)) in &self.prompts {
            assert_eq!(self.rig.ends(*id), 1, "{id} ends once");
            let told = positions.get(id).cloned().unwrap_or_default();
            let first = u32::from(*kind == Kind::Import);
            let right = continuation(prompt, 40);
            for (i, (position, token)) in (first..).zip(&told) {
                assert_eq!((*position, *token), (i, right[i as usize]), "{id} goes its own way");
            }
            let whole = self.lengths.get(id);
            assert!(whole.is_none_or(|length| told.len() == *length), "{id} is cut off or goes on");
            let embedded = self.rig.embeddings(*id);
            if let Kind::Embed(pooling) = kind {
                let right = embed::expected(prompt, *pooling);
                assert!(told.is_empty() && embedded.iter().all(|values| *values == right), "{id}");
                assert!(embedded.len() <= 1 && embedded.len() >= usize::from(whole.is_some()));
            } else {
                assert!(embedded.is_empty(), "nobody asked for it");
            }
            if matches!(kind, Kind::Serve | Kind::Fetch) {
                assert!(told.is_empty(), "a pull computes nothing");
            }
            if *kind == Kind::Export {
                assert!(told.len() <= 1, "an export has one token");
            }
        }
        let BlockCounts { active, leased, .. } = self.rig.scheduler.blocks();
        assert_eq!((active, leased), (0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn budget_queues_blocks_and_tokens_hold(
        ops in prop::collection::vec(op(), 1..120),
        depth in 1..4_usize,
        lazy in any::<bool>(),
    ) {
        let mut world = World {
            rig: Rig::deep(limits(), depth, lazy),
            prompts: BTreeMap::new(),
            lengths: BTreeMap::new(),
            leased: BTreeMap::new(),
            seen: 0,
        };
        for op in ops {
            world.apply(op);
        }
        world.drain();
        world.judge();
    }
}
