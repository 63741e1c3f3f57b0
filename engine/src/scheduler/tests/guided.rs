//! Masks as the engine's threads compute them, but when the test wants.

use std::sync::{Arc, OnceLock};

use super::*;
use baton_grammar::{Ends, Grammars, Vocabulary};
use baton_proto::grammar::Grammar;

/// Tokens 0 to 7 are the letters from a on.
fn grammars() -> &'static Grammars {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    GRAMMARS.get_or_init(|| {
        let tokens = ["a", "b", "c", "d", "e", "f", "g", "h"].iter().enumerate();
        let vocab: serde_json::Map<_, _> =
            tokens.map(|(id, text)| ((*text).to_owned(), id.into())).collect();
        let file = serde_json::json!({"decoder": {"type": "ByteLevel"}, "model": {"vocab": vocab}});
        Grammars::new(&Vocabulary::parse(&file.to_string()).unwrap(), 8)
    })
}

pub(super) fn follow(job: &mut Job, regex: &str) {
    job.sampling.grammar = Some(Arc::new(Grammar::Regex(regex.to_owned())));
}

/// Masks that were asked for.
#[derive(Default)]
pub(super) struct Masks {
    asked: Vec<MaskWanted>,
    /// By sequence: the output that its guide has been told.
    told: BTreeMap<u64, Vec<u32>>,
}

impl Masks {
    pub(super) fn ask(&mut self, scheduler: &mut Scheduler) {
        for wanted in scheduler.masks_wanted() {
            assert!(self.asked.iter().all(|asked| asked.number != wanted.number), "one at a time");
            let told = self.told.entry(wanted.number).or_default();
            told.extend(&wanted.tokens);
            self.asked.push(wanted);
        }
    }

    /// Computes one of those that were asked for.
    pub(super) fn find(&mut self, which: usize, scheduler: &mut Scheduler) {
        if self.asked.is_empty() {
            return;
        }
        let wanted = self.asked.swap_remove(which % self.asked.len());
        let MaskWanted { number, grammar, guide, tokens, eos, stop, early } = wanted;
        let found = || {
            let mut guide = guide.map_or_else(|| grammars().guide(&grammar), Ok)?;
            guide.accept(&tokens)?;
            let mask = guide.mask(Ends { eos: &eos, stop: &stop, early })?;
            Ok((guide, mask))
        };
        scheduler.mask_found(MaskFound { number, outcome: found() });
    }

    pub(super) fn find_all(&mut self, scheduler: &mut Scheduler) {
        self.ask(scheduler);
        while !self.asked.is_empty() {
            self.find(0, scheduler);
            self.ask(scheduler);
        }
    }

    /// A token is sampled under the mask of all tokens before it.
    pub(super) fn check(&self, scheduler: &Scheduler, plan: &Plan) {
        for chunk in plan.chunks.iter().filter(|chunk| chunk.samples) {
            let sequence = scheduler.sequence(chunk);
            if let Some(following) = &sequence.following {
                assert!(following.mask().is_some() && chunk.pending.is_none());
                assert_eq!(self.told[&chunk.number], sequence.output());
            }
        }
    }
}

#[test]
fn prompts_are_computed_while_a_grammar_compiles_and_others_go_on() {
    let mut rig = Rig::new(limits());
    let mut guided = job(1, prompt(1, 7), 3);
    follow(&mut guided, "[a-h]*");
    rig.add(guided, Kind::Local);
    rig.add(job(2, prompt(2, 2), 4), Kind::Local);
    let tokens = |rig: &Rig, n: u128| {
        let plan = rig.steps.last().unwrap();
        plan.chunks.iter().find(|chunk| chunk.id == id(n)).map(|chunk| chunk.tokens)
    };
    rig.masks.ask(&mut rig.scheduler);
    rig.step();
    assert_eq!((tokens(&rig, 1), tokens(&rig, 2)), (Some(6), Some(2)), "all but the last token");
    rig.step();
    assert_eq!((tokens(&rig, 1), tokens(&rig, 2)), (None, Some(1)));
    assert_eq!(rig.scheduler.masks_awaited(), 0, "a grammar's compilation puts off no step");
    rig.masks.find_all(&mut rig.scheduler);
    rig.step();
    assert_eq!((tokens(&rig, 1), tokens(&rig, 2)), (Some(1), Some(1)));
    rig.masks.ask(&mut rig.scheduler);
    assert_eq!(rig.scheduler.masks_awaited(), 1);
    rig.step();
    assert_eq!((tokens(&rig, 1), tokens(&rig, 2)), (None, Some(1)));
    for _ in 0..2 {
        rig.masks.find_all(&mut rig.scheduler);
        rig.step();
    }
    rig.run();
    assert_eq!(rig.tokens(id(1)), continuation(&prompt(1, 7), 3));
    assert_eq!(rig.tokens(id(2)), continuation(&prompt(2, 2), 4));
}

#[test]
fn a_device_runs_ahead_only_if_that_takes_most_along() {
    for (guided, ahead) in [(1, true), (2, false)] {
        let mut rig = Rig::deep(limits(), 2, true);
        for n in 1..=3 {
            let mut job = job(n, prompt(n as u32, 2), 9);
            if n <= guided {
                follow(&mut job, "[a-h]*");
            }
            rig.add(job, Kind::Local);
        }
        rig.masks.find_all(&mut rig.scheduler);
        rig.step();
        rig.step();
        assert_eq!(rig.steps[0].chunks.len(), 3);
        assert_eq!(rig.steps[1].chunks.len(), if ahead { 2 } else { 0 }, "{guided} guided");
    }
}

#[test]
fn a_sequence_that_cannot_follow_fails_alone() {
    let mut rig = Rig::new(limits());
    for (n, regex) in [(1, "("), (2, "z"), (3, "a*")] {
        let mut job = job(n, prompt(1, 3), 5);
        follow(&mut job, regex);
        rig.add(job, Kind::Local);
    }
    rig.masks.find_all(&mut rig.scheduler);
    rig.run();
    let failed = |event: &Event| match event {
        Event::Failed { id, retry, .. } => Some((*id, *retry)),
        _ => None,
    };
    assert_eq!(
        rig.events.iter().filter_map(failed).collect::<Vec<_>>(),
        [(id(1), Retry::Never), (id(2), Retry::Never)]
    );
    assert_eq!(rig.tokens(id(3)).len(), 1, "it waits for its next mask");
    // The fake samples what the mask does not allow.
    rig.masks.find_all(&mut rig.scheduler);
    rig.see();
    assert_eq!(rig.events.last().and_then(failed), Some((id(3), Retry::OtherNode)));
}

#[test]
fn an_early_end_is_the_masks_to_forbid() {
    let mut rig = Rig::new(limits());
    let mut job = job(1, prompt(1, 3), 5);
    job.sampling.min_tokens = 3;
    job.sampling.eos_token_ids = vec![continuation(&prompt(1, 3), 1)[0]];
    follow(&mut job, "[a-h]*");
    rig.add(job, Kind::Local);
    let wanted = rig.scheduler.masks_wanted().remove(0);
    assert!(wanted.early);
    let mask = baton_grammar::TokenMask::of(&wanted.eos, 8);
    let guide = grammars().guide(&wanted.grammar).unwrap();
    rig.scheduler.mask_found(MaskFound { number: wanted.number, outcome: Ok((guide, mask)) });
    rig.masks.told.insert(wanted.number, Vec::new());
    rig.run();
    assert_eq!((rig.tokens(id(1)).len(), rig.ends(id(1))), (1, 1));
}
