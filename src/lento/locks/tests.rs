//! The table against a model that counts single bytes, and tables of who goes first.

use std::collections::HashSet;

use super::*;
use LockKind::{Read, Unlock, Write};

const X: Fid = Fid(70);
const Y: Fid = Fid(71);
const END: u64 = u64::MAX;

fn ask(fid: Fid, owner: u64, kind: LockKind, (start, end): (u64, u64), wait: bool) -> LockAsk {
    let pid = 1000 + owner as u32;
    LockAsk { fid, owner, flock: false, start, end, kind, pid, wait, test: false }
}

fn flock(fid: Fid, owner: u64, kind: LockKind, wait: bool) -> LockAsk {
    LockAsk { flock: true, ..ask(fid, owner, kind, (5, 5), wait) }
}

/// What an owner of node 1 holds, sorted.
fn held(table: &Table, owner: u64) -> Vec<(LockKind, u64, u64)> {
    let locks = table.locks(1, X).into_iter().filter(|lock| lock.owner == owner);
    let mut list: Vec<_> = locks.map(|l| (l.held.kind, l.held.start, l.held.end)).collect();
    list.sort_by_key(|l| l.1);
    list
}

fn ended(table: &mut Table) -> Vec<(Ticket, Result<(), Denied>)> {
    std::iter::from_fn(|| table.poll()).collect()
}

#[test]
fn ranges_are_cut_and_joined_as_fcntl_has_it() {
    type Steps = &'static [(LockKind, u64, u64)];
    let cases: [(Steps, Steps); 9] = [
        (&[(Read, 0, 9), (Read, 10, 19)], &[(Read, 0, 19)]),
        (&[(Read, 0, 9), (Read, 11, 19)], &[(Read, 0, 9), (Read, 11, 19)]),
        (&[(Read, 0, 9), (Read, 5, END)], &[(Read, 0, END)]),
        (&[(Read, 0, 99), (Write, 40, 49)], &[(Read, 0, 39), (Write, 40, 49), (Read, 50, 99)]),
        (&[(Write, 0, END), (Unlock, 10, 10)], &[(Write, 0, 9), (Write, 11, END)]),
        (&[(Write, 0, END), (Unlock, 10, END)], &[(Write, 0, 9)]),
        (&[(Read, 0, 4), (Write, 5, 9), (Read, 5, 9)], &[(Read, 0, 9)]),
        (
            &[(Read, 0, 4), (Read, 8, 9), (Write, 2, 8)],
            &[(Read, 0, 1), (Write, 2, 8), (Read, 9, 9)],
        ),
        (&[(Read, END, END), (Unlock, 0, END)], &[]),
    ];
    for (steps, want) in cases {
        let mut table = Table::default();
        for (kind, start, end) in steps {
            assert_eq!(table.set(1, &ask(X, 1, *kind, (*start, *end), false)), Ok(None));
        }
        assert_eq!(held(&table, 1), want, "{steps:?}");
        table.release_node(1);
        assert!(table.is_empty() && !table.knows(1), "{steps:?}");
    }
}

#[test]
fn who_is_in_the_way_is_said() {
    let mut table = Table::default();
    for (owner, kind, range) in [(2, Read, (50, 59)), (1, Write, (10, 19))] {
        assert_eq!(table.set(owner as u32, &ask(X, owner, kind, range, false)), Ok(None));
    }
    let test = |node, owner, kind, range| table.test(node, &ask(X, owner, kind, range, false));
    let first = LockHeld { kind: Write, start: 10, end: 19, pid: 1001 };
    assert_eq!(test(3, 3, Write, (0, END)), Some(first));
    assert_eq!(test(3, 3, Read, (15, END)), Some(first));
    assert_eq!(test(3, 3, Read, (20, END)), None);
    assert_eq!(test(1, 1, Write, (0, 49)), None, "its own");
    assert_eq!(test(2, 1, Write, (10, 10)), Some(first), "the same number on another node");
    assert_eq!(table.test(3, &flock(X, 3, Write, false)), None, "the other family");
}

#[test]
fn flock_is_one_lock_of_the_whole_object() {
    let mut table = Table::default();
    assert_eq!(table.set(1, &flock(X, 1, Read, false)), Ok(None));
    assert_eq!(table.set(2, &flock(X, 1, Read, false)), Ok(None));
    assert_eq!(table.set(3, &ask(X, 1, Write, (0, END), false)), Ok(None), "never in the way");
    assert_eq!(table.set(1, &flock(X, 1, Write, false)), Err(Denied::Busy));
    assert_eq!(held(&table, 1), [], "the lock that was there is gone, as flock(2) says");
    assert_eq!(table.set(2, &flock(X, 1, Write, false)), Ok(None), "alone");
    assert_eq!(table.set(1, &flock(X, 1, Read, false)), Err(Denied::Busy));
    assert_eq!(table.set(2, &flock(X, 1, Read, false)), Ok(None));
    assert_eq!(table.set(1, &flock(X, 1, Read, false)), Ok(None));
    assert_eq!(held(&table, 1), [(Read, 0, END)]);
}

#[test]
fn two_that_upgrade_a_flock_do_not_block_each_other() {
    let mut table = Table::default();
    for node in [1, 2] {
        assert_eq!(table.set(node, &flock(X, 1, Read, false)), Ok(None));
    }
    let first = table.set(1, &flock(X, 1, Write, true)).unwrap().unwrap();
    let second = table.set(2, &flock(X, 1, Write, true)).unwrap().unwrap();
    assert_eq!(ended(&mut table), [(first, Ok(()))], "when the second gave up its shared lock");
    table.set(1, &flock(X, 1, Unlock, false)).unwrap();
    assert_eq!(ended(&mut table), [(second, Ok(()))]);
}

/// One step of a table: an ask of (node = owner, kind, range, waits), and the tickets that it
/// lets go, by the order in which they began to wait.
type Row = (u32, LockKind, (u64, u64), bool, Is);

#[derive(Debug)]
enum Is {
    Held(&'static [usize]),
    Waits,
    Denied(Denied),
}

fn run(name: &str, rows: &[Row]) {
    let (mut table, mut tickets) = (Table::default(), Vec::new());
    for (n, (node, kind, range, wait, is)) in rows.iter().enumerate() {
        let got = table.set(*node, &ask(X, u64::from(*node), *kind, *range, *wait));
        let let_go: Vec<usize> = ended(&mut table)
            .iter()
            .map(|(ticket, how)| {
                assert_eq!(*how, Ok(()), "{name} {n}");
                tickets.iter().position(|t| t == ticket).unwrap()
            })
            .collect();
        match is {
            Is::Held(want) => {
                assert_eq!(got, Ok(None), "{name}, row {n}");
                assert_eq!(let_go, *want, "{name}, row {n}");
            }
            Is::Waits => {
                tickets.push(got.unwrap().unwrap_or_else(|| panic!("{name}, row {n}: granted")));
                assert!(let_go.is_empty(), "{name}, row {n}");
            }
            Is::Denied(why) => assert_eq!(got, Err(*why), "{name}, row {n}"),
        }
    }
}

#[test]
fn who_waits_goes_in_order() {
    let all = (0, END);
    run(
        "a later reader does not overtake a writer",
        &[
            (1, Read, all, false, Is::Held(&[])),
            (2, Write, all, true, Is::Waits),
            (3, Read, all, true, Is::Waits),
            (4, Read, all, true, Is::Waits),
            (1, Unlock, all, false, Is::Held(&[0])),
            (2, Unlock, all, false, Is::Held(&[1, 2])),
        ],
    );
    run(
        "who does not wait takes what is free",
        &[
            (1, Read, all, false, Is::Held(&[])),
            (2, Write, all, true, Is::Waits),
            (3, Read, all, false, Is::Held(&[])),
            (1, Unlock, all, false, Is::Held(&[])),
            (3, Unlock, all, false, Is::Held(&[0])),
        ],
    );
    run(
        "only who is in the way counts",
        &[
            (1, Write, (0, 9), false, Is::Held(&[])),
            (2, Write, (0, 4), true, Is::Waits),
            (3, Write, (10, 19), true, Is::Held(&[])),
            (4, Write, (5, 14), true, Is::Waits),
            (5, Read, (12, 12), true, Is::Waits),
            (1, Unlock, (0, 9), false, Is::Held(&[0])),
            (3, Unlock, all, false, Is::Held(&[1])),
            (4, Unlock, (12, 12), false, Is::Held(&[2])),
        ],
    );
    run(
        "a holder is not behind those who wait for it",
        &[
            (1, Read, (0, 9), false, Is::Held(&[])),
            (2, Write, all, true, Is::Waits),
            (1, Read, (20, 29), true, Is::Held(&[])),
            (1, Write, (0, 9), true, Is::Held(&[])),
            (1, Unlock, all, false, Is::Held(&[0])),
        ],
    );
    run(
        "nor behind those who wait for them",
        &[
            (1, Write, (0, 9), false, Is::Held(&[])),
            (2, Write, (20, 29), false, Is::Held(&[])),
            (2, Write, (0, 9), true, Is::Waits),
            (3, Write, (20, 39), true, Is::Waits),
            (1, Write, (30, 39), true, Is::Held(&[])),
            (1, Unlock, (0, 9), false, Is::Held(&[0])),
        ],
    );
    run(
        "an upgrade waits for the other readers alone",
        &[
            (1, Read, all, false, Is::Held(&[])),
            (2, Read, all, false, Is::Held(&[])),
            (3, Write, all, true, Is::Waits),
            (1, Write, all, true, Is::Waits),
            (2, Unlock, all, false, Is::Held(&[1])),
            (1, Unlock, all, false, Is::Held(&[0])),
        ],
    );
}

#[test]
fn circles_are_refused_to_the_one_who_closes_them() {
    let (a, b, c) = ((0, 0), (1, 1), (2, 2));
    run(
        "two",
        &[
            (1, Write, a, false, Is::Held(&[])),
            (2, Write, b, false, Is::Held(&[])),
            (1, Write, b, true, Is::Waits),
            (2, Write, a, true, Is::Denied(Denied::Deadlock)),
            (2, Write, a, false, Is::Denied(Denied::Busy)),
            (2, Unlock, b, false, Is::Held(&[0])),
        ],
    );
    run(
        "three",
        &[
            (1, Write, a, false, Is::Held(&[])),
            (2, Write, b, false, Is::Held(&[])),
            (3, Write, c, false, Is::Held(&[])),
            (1, Write, b, true, Is::Waits),
            (2, Write, c, true, Is::Waits),
            (3, Read, a, true, Is::Denied(Denied::Deadlock)),
        ],
    );
    run(
        "two upgrades of one range",
        &[
            (1, Read, a, false, Is::Held(&[])),
            (2, Read, a, false, Is::Held(&[])),
            (1, Write, a, true, Is::Waits),
            (2, Write, a, true, Is::Denied(Denied::Deadlock)),
            (2, Unlock, a, false, Is::Held(&[0])),
        ],
    );
    run(
        "a chain is no circle",
        &[
            (1, Write, a, false, Is::Held(&[])),
            (2, Write, b, false, Is::Held(&[])),
            (2, Write, a, true, Is::Waits),
            (3, Write, b, true, Is::Waits),
            (3, Write, c, false, Is::Held(&[])),
        ],
    );
}

#[test]
fn a_circle_goes_over_two_objects_and_is_closed_by_a_thread() {
    let mut table = Table::default();
    let all = (0, END);
    table.set(1, &ask(X, 1, Write, all, false)).unwrap();
    let waits = table.set(2, &ask(X, 2, Write, all, true)).unwrap().unwrap();
    // while one thread of 2 waits for 1, another one takes what 1 then waits for
    table.set(2, &ask(Y, 2, Write, all, false)).unwrap();
    assert_eq!(table.set(1, &ask(Y, 1, Write, all, true)), Err(Denied::Deadlock));
    // and here the circle is closed by a lock that is granted, not by an ask
    table.set(2, &ask(Y, 2, Unlock, all, false)).unwrap();
    table.set(3, &ask(Y, 3, Write, all, false)).unwrap();
    let behind = table.set(1, &ask(Y, 1, Read, all, true)).unwrap().unwrap();
    assert_eq!(ended(&mut table), []);
    table.set(3, &ask(Y, 3, Read, all, false)).unwrap();
    assert_eq!(ended(&mut table), [(behind, Ok(()))]);
    table.set(1, &ask(Y, 1, Unlock, all, false)).unwrap();
    let behind = table.set(1, &ask(Y, 1, Write, all, true)).unwrap().unwrap();
    table.set(2, &ask(Y, 2, Read, all, false)).unwrap();
    assert_eq!(ended(&mut table), [(waits, Err(Denied::Deadlock))]);
    table.release_owner(Owner { node: 2, owner: 2, flock: false });
    table.release_node(3);
    assert_eq!(ended(&mut table), [(behind, Ok(()))]);
}

#[test]
fn who_waits_may_go_away_or_die() {
    let all = (0, END);
    let mut table = Table::default();
    table.set(1, &ask(X, 1, Write, all, false)).unwrap();
    let second = table.set(2, &ask(X, 2, Write, all, true)).unwrap().unwrap();
    let third = table.set(3, &ask(X, 3, Read, all, true)).unwrap().unwrap();
    let fourth = table.set(4, &ask(X, 4, Read, all, true)).unwrap().unwrap();
    table.cancel(third);
    table.cancel(third);
    assert_eq!(ended(&mut table), [(third, Err(Denied::Interrupted))]);
    table.set(1, &ask(X, 1, Read, all, false)).unwrap();
    assert_eq!(ended(&mut table), [], "the second is a writer");
    assert!(table.has_others(1, X) && !table.has_others(1, Y));
    assert!(table.forget(second));
    assert_eq!(ended(&mut table), [(fourth, Ok(()))], "nobody stands before it any more");
    table.release_node(1);
    table.release_node(4);
    assert!(table.is_empty());
}

#[test]
fn bounds_are_kept_and_the_end_always_works() {
    let mut table = Table::default();
    let at = |n: usize| (2 * n as u64, 2 * n as u64);
    for n in 0..LOCKS_MAX - 1 {
        assert_eq!(table.set(1, &ask(X, 1, Read, at(n), false)), Ok(None));
    }
    assert_eq!(table.set(1, &ask(X, 1, Read, at(LOCKS_MAX), false)), Err(Denied::NoRoom));
    assert_eq!(table.set(2, &ask(X, 1, Read, at(0), false)), Ok(None), "another node's");
    let all = table.locks(1, X);
    assert_eq!(table.claim(1, true, &all), [] as [usize; 0]);
    assert_eq!(table.locks(1, X).len(), all.len());
    assert_eq!(table.set(1, &ask(X, 1, Unlock, (0, END), false)), Ok(None));
    assert!(!table.knows(1));

    table.set(2, &ask(X, 1, Write, (0, END), false)).unwrap();
    for n in 0..WAITERS_MAX as u64 {
        assert!(matches!(table.set(1, &ask(X, n, Write, (n, n), true)), Ok(Some(_))));
    }
    assert_eq!(table.set(1, &ask(X, 1, Write, (0, 0), true)), Err(Denied::NoRoom));
    assert_eq!(table.withdraw(X).len(), WAITERS_MAX);
    assert!(!table.knows(1));
}

#[test]
fn a_claim_takes_over_what_is_still_free() {
    let mut table = Table::default();
    table.set(1, &ask(X, 1, Write, (0, 9), false)).unwrap();
    table.set(1, &ask(Y, 1, Write, (0, 9), false)).unwrap();
    table.set(2, &ask(X, 2, Write, (20, 29), false)).unwrap();
    let waits = table.set(2, &ask(Y, 2, Read, (9, 9), true)).unwrap().unwrap();
    let lock = |fid, owner, start, end| Lock {
        fid,
        owner,
        flock: false,
        held: LockHeld { kind: Write, start, end, pid: 7 },
    };
    let locks = [lock(X, 1, 0, 9), lock(X, 1, 15, 25), lock(X, 3, 5, 6), lock(Y, 3, 0, 0)];
    assert_eq!(table.claim(1, true, &locks), [1, 2], "taken by others, of whatever node");
    assert_eq!(ended(&mut table), [(waits, Ok(()))], "what was not claimed is free");
    assert_eq!(table.claim(1, false, &[lock(X, 1, 40, 49)]), [] as [usize; 0]);
    assert_eq!(held(&table, 1), [(Write, 0, 9), (Write, 40, 49)]);
}

// The table against a model of single bytes.

const BYTES: u64 = 10;
const NODES: u32 = 3;
const OWNERS: u64 = 2;
const FILES: [Fid; 2] = [X, Y];

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Of each byte of a family of a file: which owners of which nodes hold it.
type Bytes = HashMap<(Fid, bool, u64), HashMap<(u32, u64), LockKind>>;

/// Who holds what of each byte, and who waits, oldest first.
#[derive(Default)]
struct Model {
    bytes: Bytes,
    waiting: BTreeMap<Ticket, (u32, LockAsk)>,
    /// a flock lock is being exchanged: what is let go before its new kind stands, and what after
    /// it, cannot be told apart from here, nor who may overtake whom
    exchanging: bool,
}

fn range(ask: &LockAsk) -> std::ops::Range<u64> {
    if ask.flock { 0..BYTES } else { ask.start..ask.end.min(BYTES - 1) + 1 }
}

fn excludes(a: &(u32, LockAsk), b: &(u32, LockAsk)) -> bool {
    let (ra, rb) = (range(&a.1), range(&b.1));
    (a.1.fid, a.1.flock) == (b.1.fid, b.1.flock)
        && (a.0, a.1.owner) != (b.0, b.1.owner)
        && ra.start < rb.end
        && rb.start < ra.end
        && (a.1.kind == Write || b.1.kind == Write)
}

impl Model {
    fn set(&mut self, node: u32, ask: &LockAsk) {
        for byte in range(ask) {
            let at = self.bytes.entry((ask.fid, ask.flock, byte)).or_default();
            match ask.kind {
                Unlock => at.remove(&(node, ask.owner)),
                kind => at.insert((node, ask.owner), kind),
            };
        }
    }
    /// Owners that hold what excludes this.
    fn holders(&self, node: u32, ask: &LockAsk) -> HashSet<(u32, u64)> {
        let at = |byte| self.bytes.get(&(ask.fid, ask.flock, byte));
        let all = range(ask).filter_map(at).flatten();
        all.filter(|(who, kind)| {
            **who != (node, ask.owner) && (ask.kind == Write || **kind == Write)
        })
        .map(|(who, _)| *who)
        .collect()
    }
    /// Whether the wait of `from` leads to the owner of `to`: by locks alone, or over those who
    /// came before, too.
    fn leads(&self, from: Ticket, to: (u32, u64), by_order: bool) -> bool {
        let (mut todo, mut seen) = (vec![from], HashSet::new());
        while let Some(ticket) = todo.pop() {
            if !seen.insert(ticket) {
                continue;
            }
            let (node, ask) = &self.waiting[&ticket];
            let mut owners = self.holders(*node, ask);
            if by_order {
                let earlier = self.waiting.range(..ticket).map(|w| w.1);
                let earlier = earlier.filter(|other| excludes(other, &self.waiting[&ticket]));
                owners.extend(earlier.map(|(node, ask)| (*node, ask.owner)));
            }
            if owners.contains(&to) {
                return true;
            }
            // flock and fcntl owners of one number are one process here, as in the asks below
            let theirs = |(_, w): &(&Ticket, &(u32, LockAsk))| {
                owners.contains(&(w.0, w.1.owner)) && (by_order || !w.1.flock)
            };
            todo.extend(self.waiting.iter().filter(theirs).map(|(t, _)| *t));
        }
        false
    }
    /// Why nobody who waits could go on, for each of them.
    fn check(&self, what: &str) {
        for (ticket, waiter) in &self.waiting {
            let (node, ask) = waiter;
            let fenced = self.waiting.range(..*ticket).any(|(t, other)| {
                excludes(other, waiter) && !self.leads(*t, (*node, ask.owner), true)
            });
            let held = !self.holders(*node, ask).is_empty();
            assert!(held || fenced, "{what}: {ticket} {waiter:?} waits for nothing");
            let circle = !ask.flock && self.leads(*ticket, (*node, ask.owner), false);
            assert!(!circle, "{what}: {ticket} {waiter:?} waits for itself");
        }
    }
    /// The table says that a wait has ended.
    fn end(&mut self, ticket: Ticket, how: Result<(), Denied>, what: &str) {
        let waiter = self.waiting[&ticket].clone();
        let (node, ask) = &waiter;
        match how {
            Ok(()) => {
                assert!(self.holders(*node, ask).is_empty(), "{what}: {waiter:?} is in the way");
                for (t, other) in self.waiting.range(..ticket) {
                    let overtaken = excludes(other, &waiter);
                    assert!(
                        !overtaken || self.exchanging || self.leads(*t, (*node, ask.owner), true),
                        "{what}: {waiter:?} overtakes {other:?}"
                    );
                }
                self.waiting.remove(&ticket);
                self.set(*node, ask);
            }
            Err(why) => {
                let circle = self.leads(ticket, (*node, ask.owner), false);
                assert!(
                    why == Denied::Interrupted || (why == Denied::Deadlock && circle),
                    "{what}"
                );
                self.waiting.remove(&ticket);
            }
        }
    }
}

fn random_ask(rng: &mut Rng) -> (u32, LockAsk) {
    let (a, b) = (rng.below(BYTES), rng.below(BYTES));
    // the last byte of the model stands for all that follow, too
    let end = if a.max(b) == BYTES - 1 { END } else { a.max(b) };
    let kind = [Read, Read, Write, Write, Write, Unlock, Unlock][rng.below(7) as usize];
    let (node, owner) = (1 + rng.below(u64::from(NODES)) as u32, rng.below(OWNERS));
    let fid = FILES[rng.below(2) as usize];
    let plain = ask(fid, owner, kind, (a.min(b), end), rng.below(3) > 0);
    (node, LockAsk { flock: rng.below(5) == 0, ..plain })
}

fn ask_both(table: &mut Table, model: &mut Model, rng: &mut Rng, what: &str) {
    let (node, ask) = random_ask(rng);
    let what = format!("{what}: {node} {ask:?}");
    let free = model.holders(node, &ask).is_empty();
    if ask.kind != Unlock {
        assert_eq!(table.test(node, &ask).is_none(), free, "{what}");
    }
    let old = (ask.flock && ask.kind != Unlock)
        .then(|| model.bytes.get(&(ask.fid, true, 0)).and_then(|at| at.get(&(node, ask.owner))))
        .flatten();
    if old.is_some_and(|old| *old != ask.kind) {
        model.set(node, &LockAsk { kind: Unlock, ..ask.clone() });
    }
    let got = table.set(node, &ask);
    if ask.flock {
        // what was let go when a lock of the other kind was given up comes first
        let (early, late): (Vec<_>, Vec<_>) = ended(table).into_iter().partition(|(ticket, _)| {
            let waiter = model.waiting.get(ticket);
            waiter.is_some_and(|(_, w)| ask.kind != Unlock && (w.fid, w.flock) == (ask.fid, true))
        });
        table.ended.extend(late);
        model.exchanging = true;
        early.into_iter().for_each(|(ticket, how)| model.end(ticket, how, &what));
        model.exchanging = false;
    }
    match got {
        Ok(None) => {
            assert!(ask.kind == Unlock || model.holders(node, &ask).is_empty(), "{what}");
            model.set(node, &ask);
            drain(table, model, &what);
        }
        Ok(Some(ticket)) => {
            model.waiting.insert(ticket, (node, ask));
            drain(table, model, &what);
        }
        Err(Denied::Busy) => {
            assert!(!ask.wait && !model.holders(node, &ask).is_empty(), "{what}");
            drain(table, model, &what);
        }
        Err(Denied::Deadlock) => {
            drain(table, model, &what);
            model.waiting.insert(Ticket::MAX, (node, ask.clone()));
            assert!(model.leads(Ticket::MAX, (node, ask.owner), false), "{what}");
            model.waiting.remove(&Ticket::MAX);
        }
        Err(why) => panic!("{what}: {why}"),
    }
}

fn drain(table: &mut Table, model: &mut Model, what: &str) {
    while let Some((ticket, how)) = table.poll() {
        model.end(ticket, how, what);
    }
}

fn compare(table: &Table, model: &Model, what: &str) {
    let mut bytes = Bytes::new();
    for node in 1..=NODES {
        let mut count = 0;
        for lock in FILES.iter().flat_map(|fid| table.locks(node, *fid)) {
            count += 1;
            for byte in lock.held.start..lock.held.end.min(BYTES - 1) + 1 {
                let at = bytes.entry((lock.fid, lock.flock, byte)).or_default();
                let before = at.insert((node, lock.owner), lock.held.kind);
                assert_eq!(before, None, "{what}: two locks of one owner overlap");
            }
        }
        let known = table.nodes.get(&node).map_or(0, |node| node.lock_count);
        assert_eq!(known, count, "{what}");
    }
    let full = model.bytes.iter().filter(|(_, owners)| !owners.is_empty());
    let full: HashMap<_, _> = full.map(|(at, owners)| (*at, owners.clone())).collect();
    assert_eq!(bytes, full, "{what}");
}

fn history(seed: u64) {
    let (mut table, mut model, mut rng) = (Table::default(), Model::default(), Rng(seed | 1 << 40));
    let mut waited = 0;
    for step in 0..120 {
        let what = format!("seed {seed} step {step}");
        match rng.below(40) {
            0..34 => ask_both(&mut table, &mut model, &mut rng, &what),
            34..37 => {
                let nth = rng.below(model.waiting.len() as u64 + 1) as usize;
                let ticket = model.waiting.keys().nth(nth).copied().unwrap_or(Ticket::MAX);
                table.cancel(ticket);
                drain(&mut table, &mut model, &what);
            }
            37 => {
                let node = 1 + rng.below(u64::from(NODES)) as u32;
                let locks: Vec<Lock> = FILES.iter().flat_map(|f| table.locks(node, *f)).collect();
                assert_eq!(table.claim(node, true, &locks), [] as [usize; 0], "{what}");
                drain(&mut table, &mut model, &what);
            }
            die => {
                let node = 1 + rng.below(u64::from(NODES)) as u32;
                let owner = Owner { node, owner: rng.below(OWNERS), flock: rng.below(2) == 0 };
                let gone = |of: (u32, u64), flock| {
                    of.0 == node && (die == 38 || (of.1, flock) == (owner.owner, owner.flock))
                };
                for ((_, flock, _), owners) in &mut model.bytes {
                    owners.retain(|of, _| !gone(*of, *flock));
                }
                model.waiting.retain(|_, (node, ask)| !gone((*node, ask.owner), ask.flock));
                if die == 38 {
                    table.release_node(node)
                } else {
                    table.release_owner(owner)
                }
                drain(&mut table, &mut model, &what);
            }
        }
        model.check(&what);
        compare(&table, &model, &what);
        waited = waited.max(model.waiting.len());
    }
    assert!(waited > 1, "seed {seed}: nobody ever waited");
    for node in 1..=NODES {
        table.release_node(node);
    }
    assert!(table.is_empty() && table.nodes.is_empty() && table.waiters.is_empty());
}

#[test]
fn the_table_is_as_the_model() {
    for seed in 1..=600 {
        history(seed);
    }
}
