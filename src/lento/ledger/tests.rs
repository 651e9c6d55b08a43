use std::sync::Arc;

use super::*;
use crate::kml::record::Seq;
use crate::lento::grant::{Grant, Kept};

const MIB: u64 = 1 << 20;
const KEEP: Duration = Duration::from_secs(100);

fn mib(n: u64) -> Room {
    Room::new(n * MIB, n)
}

fn ledger(free: u64) -> (Ledger, Instant) {
    let (mut ledger, now) = (Ledger::default(), Instant::now());
    ledger.add_volume(1, Saved { epoch_next: 70, nodes: Vec::new() }, now);
    ledger.set_free(0, mib(free));
    (ledger, now)
}

fn new_node(ledger: &mut Ledger, no: usize, node: u32) -> Arc<Grant> {
    let grant = Grant::new(Kept::default(), false);
    come(ledger, no, node, &grant);
    grant
}

fn come(ledger: &mut Ledger, no: usize, node: u32, grant: &Grant) {
    ledger.meet(no, node, &grant.hello().unwrap());
    grant.welcome(ledger.terms(no, node, false, KEEP).as_ref());
}

#[test]
fn volumes_share_the_room_of_their_disk_and_keep_to_their_quotas() {
    let (mut book, now) = ledger(100);
    book.add_volume(1, Saved::default(), now);
    book.add_volume(2, Saved::default(), now);
    book.set_free(2, mib(7));
    book.set_quota(1, Some(mib(30)));
    book.set_used(1, mib(10));
    assert_eq!([0, 1, 2].map(|no| book.available(no)), [mib(100), mib(20), mib(7)]);
    new_node(&mut book, 1, 5);
    assert!(!book.grant(1, 5, mib(21), false), "beyond the quota");
    assert_eq!(book.outstanding(1), Room::NONE);
    assert!(!book.grant(1, 5, mib(21), true));
    assert_eq!(book.outstanding(1), mib(20));
    assert_eq!([0, 1, 2].map(|no| book.available(no)), [mib(80), mib(0), mib(7)]);
    // it gives back what became of it: the disk has less, the quota counts it
    book.returned(1, 5, &RoomHeld { epoch: 1, granted: mib(20), returned: mib(15) });
    book.set_used(1, mib(25));
    book.set_free(0, mib(85));
    assert_eq!([0, 1, 2].map(|no| book.available(no)), [mib(80), mib(0), mib(7)]);
    assert_eq!(book.holders(1).collect::<Vec<_>>(), [(1, 5)]);
    book.remove_volume(1);
    assert_eq!((book.available(0), book.outstanding(1)), (mib(85), Room::NONE));
    assert_eq!((book.quota(1), book.save(1).nodes), (None, vec![]));
}

#[test]
fn much_is_granted_ahead_where_there_is_much() {
    let (mut book, _) = ledger(1 << 20);
    new_node(&mut book, 0, 1);
    assert!(book.grant(0, 1, mib(1), false));
    let first = book.outstanding(0);
    assert_eq!(first.bytes(), MIB + policy::AHEAD_MAX.bytes());
    assert!(book.terms(0, 1, false, KEEP).unwrap().ample);
    let (mut book, _) = ledger(10);
    new_node(&mut book, 0, 1);
    assert!(book.grant(0, 1, mib(1), false));
    assert!(book.outstanding(0).bytes() < 3 * MIB);
    assert!(!book.terms(0, 1, false, KEEP).unwrap().ample);
}

#[test]
fn a_restart_begins_with_no_less_than_was_heard_and_hears_the_rest() {
    let (mut book, now) = ledger(1000);
    let grant = new_node(&mut book, 0, 3);
    assert!(book.to_save(0).is_none(), "nothing was granted");
    book.grant(0, 3, mib(10), false);
    let saved = book.to_save(0).unwrap();
    assert!(book.to_save(0).is_none());
    grant.hear(&book.terms(0, 3, false, KEEP).unwrap());
    let heard = grant.figures().free;
    let mut next = Ledger::default();
    next.add_volume(1, saved, now);
    next.set_free(0, mib(1000));
    assert!(next.outstanding(0).covers(heard) && next.outstanding(0) != heard);
    assert!(next.holdings(0)[0].away);
    come(&mut next, 0, 3, &grant);
    assert_eq!((next.outstanding(0), grant.figures().free), (heard, heard));
    assert!(!next.holdings(0)[0].away);
}

#[test]
fn who_stays_away_loses_its_grant_and_its_old_words() {
    let (mut book, now) = ledger(100);
    let grant = new_node(&mut book, 0, 3);
    book.grant(0, 3, mib(10), false);
    grant.hear(&book.terms(0, 3, false, KEEP).unwrap());
    let old = grant.hello().unwrap();
    book.away(0, 3, now);
    assert_eq!(book.ends_at(KEEP), Some(now + KEEP));
    assert!(!book.end_old(KEEP, now + KEEP - Duration::from_secs(1)));
    assert!(book.end_old(KEEP, now + KEEP));
    assert_eq!(book.available(0), mib(100));
    come(&mut book, 0, 3, &grant);
    assert_eq!(grant.figures().free, Room::NONE);
    book.returned(0, 3, &old);
    assert_eq!(book.outstanding(0), Room::NONE);
    assert_ne!(grant.hello().unwrap().epoch, old.epoch);
}

#[test]
fn a_book_from_a_backup_agrees_with_its_clients_again() {
    let (mut book, now) = ledger(1000);
    let grant = new_node(&mut book, 0, 3);
    book.grant(0, 3, mib(10), false);
    let backup = book.to_save(0).unwrap();
    grant.hear(&book.terms(0, 3, false, KEEP).unwrap());
    for _ in 0..9 {
        book.grant(0, 3, mib(50), false);
    }
    grant.hear(&book.terms(0, 3, false, KEEP).unwrap());
    grant.give_back_all_but(mib(7));
    let kept = grant.charge(mib(7)).unwrap();
    let mut restored = Ledger::default();
    restored.add_volume(1, backup, now);
    restored.set_free(0, mib(1000));
    come(&mut restored, 0, 3, &grant);
    assert_eq!(grant.lacks(), mib(7));
    assert!(restored.grant(0, 3, grant.lacks(), false));
    grant.hear(&restored.terms(0, 3, false, KEEP).unwrap());
    assert_eq!(grant.lacks(), Room::NONE);
    assert!(restored.outstanding(0).covers(kept.room()));
}

/// Chance from a seed.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A client with its records, and what is on its way to and from the server.
struct Node {
    grant: Arc<Grant>,
    seq: u64,
    /// records that are not at the server: their charges and true sizes
    records: Vec<(u64, Room, Room)>,
    online: bool,
    to_server: Vec<Result<RoomHeld, (RoomHeld, Room)>>,
    to_client: Vec<RoomTerms>,
}

impl Node {
    /// The connection is gone; how many messages with it.
    fn cut(&mut self) -> usize {
        let count = self.to_server.len() + self.to_client.len();
        (self.online, self.to_server, self.to_client) = (false, Vec::new(), Vec::new());
        count
    }
}

/// Requests, answers, records, cuts, deaths and restarts, each of which may fail at any point.
/// At every step: what clients hold and what is used are on the disk, and no record lacks room. In
/// the end both sides have the same figures. So many messages were lost, or came twice.
fn random_life(seed: u64, step_count: u64) -> usize {
    let (mut rng, now) = (Rng(seed | 1), Instant::now());
    let capacity = mib(64);
    let (mut book, mut used, mut saved) = (Ledger::default(), Room::NONE, Saved::default());
    book.add_volume(1, Saved::default(), now);
    book.set_free(0, capacity);
    let mut nodes: Vec<Node> = (0..3)
        .map(|node| {
            let grant = new_node(&mut book, 0, node);
            let (records, to_server, to_client) = (Vec::new(), Vec::new(), Vec::new());
            Node { grant, seq: 0, records, online: true, to_server, to_client }
        })
        .collect();
    let mut failures = 0;
    for step in 0..step_count {
        let nth = rng.below(3) as usize;
        let node = &mut nodes[nth];
        match rng.below(12) {
            0..=2 if node.online => {
                let need = Room::new(rng.below(4 * MIB), rng.below(3));
                node.to_server.push(Err((node.grant.hello().unwrap(), need)));
            }
            3..=4 => {
                let room = Room::new(rng.below(3 * MIB), rng.below(2));
                if let Some(charge) = node.grant.charge(room) {
                    node.seq += 1;
                    charge.bind(Seq(node.seq), None);
                    node.records.push((node.seq, room, room.part(1 + rng.below(3))));
                }
            }
            5..=6 if node.online && !node.records.is_empty() => {
                let (seq, _, size) = node.records.remove(0);
                used = used.plus(size);
                assert!(capacity.covers(used), "seed {seed} step {step}: a record lacks room");
                book.set_free(0, capacity.less(used));
                node.grant.acked(Seq(seq));
            }
            7 if node.online => {
                node.grant.give_back_all_but(Room::new(rng.below(MIB), 0));
                node.to_server.push(Ok(node.grant.hello().unwrap()));
            }
            8 => {
                // a cut, and back again: what was under way is lost, or some of it, in any order
                failures += node.cut();
                book.away(0, nth as u32, now);
            }
            9 if !node.online => {
                come(&mut book, 0, nth as u32, &node.grant);
                node.online = true;
            }
            10 => {
                // the client dies, and finds its records in the journal
                failures += node.cut();
                let grant = Grant::new(node.grant.kept(), false);
                node.records.iter().for_each(|(seq, room, _)| {
                    grant.charge_done(*room).bind(Seq(*seq), None); // as found in the journal
                });
                node.grant = grant;
            }
            11 if rng.below(4) == 0 => {
                let free = capacity.less(used);
                book = Ledger::default();
                book.add_volume(1, saved.clone(), now);
                book.set_free(0, free);
                failures += nodes.iter_mut().map(Node::cut).sum::<usize>();
            }
            _ => {}
        }
        let node = &mut nodes[nth];
        if !node.to_server.is_empty() && rng.below(2) == 0 {
            let at = rng.below(node.to_server.len() as u64) as usize;
            let message = match rng.below(4) {
                0 => {
                    failures += 1;
                    node.to_server[at] // and once more, later
                }
                _ => node.to_server.remove(at),
            };
            let (held, need) = message.map_or_else(|ask| ask, |held| (held, Room::NONE));
            book.returned(0, nth as u32, &held);
            if message.is_err() {
                book.grant(0, nth as u32, need, rng.below(2) == 0);
                saved = book.to_save(0).unwrap_or_else(|| book.save(0));
                node.to_client.extend(book.terms(0, nth as u32, false, KEEP));
            }
        }
        if !node.to_client.is_empty() && rng.below(2) == 0 {
            let at = rng.below(node.to_client.len() as u64) as usize;
            node.grant.hear(&node.to_client.remove(at));
        }
        let held: Room = nodes
            .iter()
            .map(|node| {
                let figures = node.grant.figures();
                figures.free.plus(figures.in_use)
            })
            .sum();
        assert!(capacity.less(used).covers(held), "seed {seed} step {step}: {held:?} held");
    }
    for (nth, node) in nodes.iter_mut().enumerate() {
        come(&mut book, 0, nth as u32, &node.grant);
        node.grant.acked(Seq(node.seq));
        node.grant.give_back_all_but(Room::NONE);
        book.returned(0, nth as u32, &node.grant.hello().unwrap());
        assert_eq!(node.grant.figures().granted, Room::NONE, "seed {seed}");
    }
    assert_eq!(book.outstanding(0), Room::NONE, "seed {seed}: a grant leaks");
    failures
}

#[test]
fn ten_thousand_failures_later_both_sides_agree() {
    let seeds = (1..=80).map(|seed| 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
    let failures: usize = seeds.map(|seed| random_life(seed, 2_500)).sum();
    assert!(failures >= 10_000, "only {failures} messages were lost, or came twice");
}

#[cfg(feature = "planted-faults")]
#[test]
fn what_must_never_be_done_is_seen() {
    use crate::lento::faults::plant;
    for fault in [Fault::RoomTwice, Fault::RoomForgotten] {
        let caught = std::panic::catch_unwind(|| {
            plant(Some(fault));
            for seed in 1..=40 {
                random_life(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed), 2_500);
            }
        });
        plant(None);
        assert!(caught.is_err(), "{fault:?} goes unseen");
    }
}
