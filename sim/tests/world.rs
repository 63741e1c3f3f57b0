//! Whole clusters under virtual time with faults, one for each seed.
//!
//! `BATON_SEEDS=N` runs N seeds; `SEED=n cargo test -p baton-sim --test world -- one_seed --nocapture`
//! runs one and prints all that happens.

use baton_sim::world::{Logging, Report, run_seed};

/// Seeds of a run without `BATON_SEEDS`.
const SEEDS: u64 = 2000;
/// Tests that share them, so that they run side by side.
const SHARES: u64 = 4;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().expect("a number"))
}

fn run(seed: u64, logging: Logging) -> Report {
    std::panic::catch_unwind(|| run_seed(seed, logging)).unwrap_or_else(|panic| {
        eprintln!(
            "seed {seed} fails; see it again with\n  SEED={seed} cargo test -p baton-sim \
             --test world -- one_seed --nocapture"
        );
        std::panic::resume_unwind(panic)
    })
}

fn share(number_of_share: u64) {
    let seeds = number("BATON_SEEDS").unwrap_or(SEEDS);
    let reports: Vec<Report> = (0..seeds)
        .filter(|seed| seed % SHARES == number_of_share)
        .map(|seed| run(seed, Logging::Off))
        .collect();
    let total = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    println!(
        "{} seeds: {} complete, {} satisfied, {} left, {} late; {} faults, {} attempts repeated, \
         {} asked again; {} events in {} s of virtual time",
        reports.len(),
        total(|r| r.ended[0] as u64),
        total(|r| r.ended[1] as u64),
        total(|r| r.ended[2] as u64),
        total(|r| r.ended[3] as u64),
        total(|r| r.faults as u64),
        total(|r| r.retried),
        total(|r| r.asked_again.into()),
        total(|r| r.events),
        total(|r| r.lasted.as_secs()),
    );
    assert!(total(|r| r.ended[0] as u64) > 5 * reports.len() as u64, "most requests complete");
}

#[test]
fn seeds_of_the_first_share() {
    share(0);
}

#[test]
fn seeds_of_the_second_share() {
    share(1);
}

#[test]
fn seeds_of_the_third_share() {
    share(2);
}

#[test]
fn seeds_of_the_fourth_share() {
    share(3);
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 0..40 {
        let (first, again) = (run(seed, Logging::Hash), run(seed, Logging::Hash));
        assert_eq!(first, again, "seed {seed}");
    }
}

#[test]
fn one_seed() {
    if let Some(seed) = number("SEED") {
        println!("{:?}", run(seed, Logging::Print));
    }
}
