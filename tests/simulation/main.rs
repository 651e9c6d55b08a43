//! The simulation: several clients and a server in one process, on virtual time, from a seed.
//!
//! Real are the machines of lento, the optimiser, the encoding of records, the table of what pends,
//! certification and the rules of stamps. Models are the trees, the caches and the volume over them
//! (cache.rs, volume.rs), disks that lose what was not synced, the network and the clocks
//! (world.rs). What must hold is in check.rs and history.rs.
//!
//! `cargo test --test simulation` runs a fixed set of seeds. `IMZ_SEEDS=FROM..TO` runs these instead,
//! as many operations each as `IMZ_OPS` says, and prints histories per minute. A seed that fails is
//! shrunk, and its story printed.

#![allow(clippy::unwrap_used, clippy::expect_used)] // here they are the message

mod apps;
mod cache;
mod client;
mod history;
mod linear;
mod plan;
#[cfg(feature = "planted-faults")]
mod planted;
mod rng;
mod server;
mod shrink;
mod space;
mod tree;
mod volume;
mod world;

use std::time::Instant;

use plan::Plan;
use shrink::{Ended, fails, run};

/// Operations of a history, unless told otherwise.
const OPS: usize = 200;
/// Seeds that every run of the tests covers.
const SEEDS: std::ops::Range<u64> = 0..250;
/// Histories that failed once, each for a reason of its own.
const FOUND: [u64; 24] = [
    522, 707, 842, 991, 1026, 1057, 1202, 1546, 2304, 3364, 3822, 3940, 4990, 5177, 8000, 12114,
    13753, 14789, 16866, 23079, 51302, 56658, 61506, 80120,
];

/// After so many histories that fail, the rest is not run: one of them is told anyway.
const FAILURES_MAX: usize = 50;

fn number(text: &str) -> u64 {
    text.trim().parse().expect("a number")
}
fn ops() -> usize {
    std::env::var("IMZ_OPS").map_or(OPS, |ops| number(&ops) as usize)
}
fn seeds(unless_told: std::ops::Range<u64>) -> std::ops::Range<u64> {
    std::env::var("IMZ_SEEDS").map_or(unless_told, |seeds| {
        let (from, to) = seeds.split_once("..").expect("IMZ_SEEDS=FROM..TO");
        number(from)..number(to)
    })
}

/// Runs histories, and tells the first one that fails.
fn run_all(seeds: std::ops::Range<u64>, plan: impl Fn(u64) -> Plan) {
    let (begun, count) = (Instant::now(), seeds.end - seeds.start);
    let (mut events, mut failed) = (0, Vec::new());
    for seed in seeds {
        match run(&plan(seed)) {
            Ended::Well { events: count } => events += count,
            Ended::Badly(why) => {
                println!("seed {seed} fails: {why}");
                failed.push((seed, why));
            }
        }
        if failed.len() >= FAILURES_MAX {
            break;
        }
    }
    if let Some((seed, why)) = failed.first() {
        fails(&plan(*seed), why);
    }
    let minutes = begun.elapsed().as_secs_f64() / 60.0;
    let per_minute = count as f64 / minutes;
    println!("{count} histories, {events} events: {per_minute:.0} a minute");
}

#[test]
fn histories_keep_their_promises() {
    run_all(seeds(SEEDS), |seed| Plan::of(seed, ops()));
}

#[test]
fn a_block_is_a_register_in_strict_mode() {
    run_all(seeds(SEEDS), |seed| Plan::strict(seed, ops()));
}

#[test]
fn what_failed_once_does_so_no_more() {
    for seed in FOUND {
        if let Ended::Badly(why) = run(&Plan::of(seed, OPS)) {
            fails(&Plan::of(seed, OPS), &why);
        }
    }
}

#[test]
fn a_seed_is_the_same_history_for_ever() {
    for seed in 0..5 {
        let stories: Vec<Vec<String>> = (0..2)
            .map(|_| {
                let mut world = world::World::new(&Plan::of(seed, OPS), true);
                let _ = world.run();
                world.ctx.story.take().unwrap()
            })
            .collect();
        assert!(stories[0].len() > OPS);
        for (a, b) in stories[0].iter().zip(&stories[1]) {
            assert_eq!(a, b, "seed {seed}");
        }
        assert_eq!(stories[0].len(), stories[1].len(), "seed {seed}");
    }
}
