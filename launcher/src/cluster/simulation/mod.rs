//! A whole cluster in one thread: the real coordinator, the real supervisors and leases, and a world that does its
//! worst. No clock, no network, no process: a seed gives the same run, every time.
//!
//! ```text
//! TSM_SIMULATE=100000 cargo test -p tsm-launch simulation   # so many runs
//! TSM_SEED=4711 cargo test -p tsm-launch simulation         # one, with its story
//! ```
//!
//! In every run:
//! - ranks of two generations never run at the same time, on whatever machine;
//! - every rank and every agent ends, and the coordinator finishes, after every rank unless it is hurried;
//! - a node that is gone is noticed within its lease, whatever the job is doing;
//! - where one thing went wrong, the report names it, with its exit code;
//! - where a rank saved by itself, nobody is blamed, and nothing is started again;
//! - nothing is started more often than is allowed, nor after the job was told to end;
//! - a node that was measured and found bad gets no ranks, and none that is well is taken for bad;
//! - the exit code is documented.

mod agent;
mod network;
mod plan;
mod random;
mod world;

use std::collections::BTreeSet;

use plan::Plan;
use world::World;

const RUNS: u64 = 3000;

/// What the runs together come to see.
const SEEN: [&str; 29] = [
    "cut in Gather",
    "cut in Form",
    "cut in Measure",
    "cut in Run",
    "cut in Stop",
    "cut in Pause",
    "cut in Leave",
    "silent in Gather",
    "silent in Form",
    "silent in Measure",
    "measured",
    "left out",
    "silent in Run",
    "silent in Stop",
    "silent in Pause",
    "silent in Leave",
    "the guard kills",
    "succeeded",
    "failed",
    "stopped",
    "saved",
    "saved by itself",
    "grown",
    "again",
    "code 0",
    "code 69",
    "code 75",
    "code 76",
    "code 143",
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn run(seed: u64) -> World {
    let mut world = World::new(Plan::new(seed), seed);
    world.run();
    world
}

#[test]
fn whatever_goes_wrong_the_rules_hold() {
    if let Some(seed) = number("TSM_SEED") {
        let world = run(seed);
        world.story.iter().for_each(|line| eprintln!("{line}"));
        assert!(world.broken.is_empty(), "{:#?}", world.broken);
        return;
    }
    let runs = number("TSM_SIMULATE").unwrap_or(RUNS);
    let (mut broken, mut seen) = (Vec::new(), BTreeSet::new());
    for seed in 0..runs {
        let mut world = run(seed);
        seen.append(&mut world.seen);
        if let Some(text) = world.broken.first() {
            broken.push(format!("TSM_SEED={seed}: {text}"));
        }
    }
    let shown = broken
        .iter()
        .take(40)
        .cloned()
        .collect::<Vec<_>>()
        .join("\n");
    assert!(
        broken.is_empty(),
        "{} of {runs} runs:\n{shown}",
        broken.len()
    );
    let missing: Vec<_> = SEEN.iter().filter(|what| !seen.contains(**what)).collect();
    assert!(
        runs < RUNS || missing.is_empty(),
        "{missing:?} did not come to pass, but {seen:?}"
    );
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in 0..20 {
        let (one, other) = (run(seed), run(seed));
        assert_eq!(one.story, other.story);
        assert_eq!((one.now, one.code), (other.now, other.code));
    }
}
