//! Faults that are planted on purpose: each is caught within 1,000 histories, or the simulation is
//! not worth its name.

use imz::lento::faults::{Fault, plant};

use crate::OPS;
use crate::plan::Plan;
use crate::shrink::{Ended, run};

/// A fault that is not caught by then goes unseen.
const HISTORIES_MAX: u64 = 1000;

fn is_caught(fault: Fault) {
    let with = |fault: Option<Fault>, seed: u64| {
        plant(fault);
        let ended = run(&Plan::of(seed, OPS));
        plant(None);
        ended
    };
    let caught = (0..HISTORIES_MAX).find_map(|seed| match with(Some(fault), seed) {
        // a history that fails anyway has not seen this fault
        Ended::Badly(why) if matches!(with(None, seed), Ended::Well { .. }) => Some((seed, why)),
        _ => None,
    });
    let (seed, why) = caught.unwrap_or_else(|| panic!("{fault:?} goes unseen"));
    println!("{fault:?}: caught by history {}: {why}", seed + 1);
}

#[test]
fn a_promise_broken_after_the_reply_is_caught() {
    is_caught(Fault::BreakAfterReply);
}

#[test]
fn a_permit_granted_twice_is_caught() {
    is_caught(Fault::PermitTwice);
}

#[test]
fn a_cursor_apart_from_its_records_is_caught() {
    is_caught(Fault::CursorApart);
}

#[test]
fn a_batch_applied_past_a_gap_is_caught() {
    is_caught(Fault::PastGap);
}

#[test]
fn an_unsynced_acknowledgement_is_caught() {
    is_caught(Fault::UnsyncedAck);
}

#[test]
fn an_eviction_of_dirty_data_is_caught() {
    is_caught(Fault::DirtyEvicted);
}
