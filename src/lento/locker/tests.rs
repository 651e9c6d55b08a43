//! Clients and a server, the real machines, in virtual time and without sockets.

use std::time::{Duration, Instant};

use super::super::client::{Client, Settings, Who};
use super::super::message::{Changes, Message};
use super::super::promises::ConnId;
use super::super::rights::Mode;
use super::super::server;
use super::*;
use crate::kml::record::{Seq, Stamp};
use LockKind::{Read, Unlock, Write};

const X: Fid = Fid(70);
const Y: Fid = Fid(71);
const ALL: (u64, u64) = (0, u64::MAX);

type How = Result<Option<LockHeld>, Denied>;
const GRANTED: Option<How> = Some(Ok(None));

struct Rig {
    server: server::Server,
    clients: Vec<Client>,
    conns: Vec<Option<ConnId>>,
    reachable: Vec<bool>,
    now: Instant,
    last_conn: u32,
    last_number: Number,
    ended: HashMap<(usize, Number), How>,
    lost: Vec<(usize, Lock)>,
    /// of clients, about locks
    messages: Vec<(usize, Message)>,
}

fn client(nth: usize, now: Instant) -> Client {
    let (volume_id, volume) = ([7; 16], "v".to_owned());
    let incarnation = [nth as u8 + 1; 16];
    let node = nth as u32 + 1;
    let (host, keeps) = ("h".into(), false);
    let who = Who { volume, incarnation, node, volume_id, host, keeps };
    Client::new(who, Stamp(100), Seq(0), Settings::default(), nth as u64 + 77, now)
}

fn new_server() -> server::Server {
    let mut server = server::Server::new(server::Settings::default());
    server.add_volume("v", [7; 16], Stamp(100));
    server
}

fn ask(fid: Fid, owner: u64, kind: LockKind, (start, end): (u64, u64)) -> LockAsk {
    let pid = 1000 + owner as u32;
    LockAsk { fid, owner, flock: false, start, end, kind, pid, wait: false, test: false }
}

impl Rig {
    fn new(count: usize) -> Rig {
        let now = Instant::now();
        let mut rig = Rig {
            server: new_server(),
            clients: (0..count).map(|nth| client(nth, now)).collect(),
            conns: vec![None; count],
            reachable: vec![true; count],
            now,
            last_conn: 0,
            last_number: 0,
            ended: HashMap::new(),
            lost: Vec::new(),
            messages: Vec::new(),
        };
        rig.pass(500);
        assert!(rig.clients.iter().all(Client::is_online));
        rig
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(100) {
            self.now += Duration::from_millis(100);
            for client in &mut self.clients {
                client.on_wake(self.now);
            }
            self.server.wake(self.now);
            self.run();
        }
    }

    /// Carries out what the machines want, until they want nothing more.
    fn run(&mut self) {
        loop {
            let mut quiet = true;
            for nth in 0..self.clients.len() {
                while let Some(effect) = self.clients[nth].poll() {
                    quiet = false;
                    self.of_client(nth, effect);
                }
            }
            while let Some(effect) = self.server.poll() {
                quiet = false;
                self.of_server(effect);
            }
            if quiet {
                return;
            }
        }
    }

    fn of_client(&mut self, nth: usize, effect: Effect) {
        match effect {
            Effect::Connect if self.reachable[nth] => {
                self.last_conn += 1;
                let conn = ConnId(self.last_conn);
                self.conns[nth] = Some(conn);
                self.server.on_connect(conn, self.now);
                self.clients[nth].on_connected(self.now);
            }
            Effect::Connect => self.clients[nth].on_closed(self.now),
            Effect::Close { .. } => {
                if let Some(conn) = self.conns[nth].take() {
                    self.server.on_closed(conn, self.now);
                }
            }
            Effect::Send { id, answer, message, .. } => {
                let Some(conn) = self.conns[nth] else { return };
                if (44..50).contains(&message.op()) {
                    self.messages.push((nth, message.clone()));
                }
                // as over a wire
                let message = Message::decode(message.op(), &message.encode()).unwrap();
                self.server.on_message(conn, id, answer, message, self.now);
            }
            Effect::LockEnded { number, how } => {
                let before = self.ended.insert((nth, number), how);
                assert_eq!(before, None, "{nth} hears twice of {number}");
            }
            Effect::LockLost { lock } => self.lost.push((nth, lock)),
            _ => {}
        }
    }

    fn of_server(&mut self, effect: server::Effect) {
        let client = |rig: &Rig, conn| rig.conns.iter().position(|c| *c == Some(conn));
        match effect {
            server::Effect::Send { conn, id, answer, message, .. } => {
                if let Some(nth) = client(self, conn) {
                    let message = Message::decode(message.op(), &message.encode()).unwrap();
                    self.clients[nth].on_message(id, answer, message, self.now);
                }
            }
            server::Effect::Close { conn, why } => {
                assert!(matches!(why, server::Why::Silent | server::Why::Replaced), "{why}");
                if let Some(nth) = client(self, conn) {
                    self.conns[nth] = None;
                    self.clients[nth].on_closed(self.now);
                }
            }
            server::Effect::Meet { conn, hello, .. } => {
                self.server.on_met(conn, hello.node, Seq(0), self.now);
            }
            server::Effect::Ask { conn, id, request, .. } => {
                let (upto, volume) = (Stamp(100), Mode::None);
                let changes = Changes { fids: vec![], upto, more: false, lost: false, volume };
                self.server.on_answer(conn, id, (&request, changes.into()), &[], self.now);
            }
            effect => panic!("{effect:?}"),
        }
    }

    fn put(&mut self, nth: usize, ask: LockAsk) -> Number {
        self.last_number += 1;
        self.clients[nth].on_lock(self.last_number, ask, self.now);
        self.last_number
    }
    /// Asks, and says what came of it at once.
    fn ask(&mut self, nth: usize, ask: LockAsk) -> Option<How> {
        let number = self.put(nth, ask);
        self.run();
        self.how(nth, number)
    }
    fn wait(&mut self, nth: usize, ask: LockAsk) -> Number {
        let number = self.put(nth, LockAsk { wait: true, ..ask });
        self.run();
        number
    }
    fn test(&mut self, nth: usize, ask: LockAsk) -> How {
        self.ask(nth, LockAsk { test: true, ..ask }).unwrap()
    }
    fn how(&self, nth: usize, number: Number) -> Option<How> {
        self.ended.get(&(nth, number)).copied()
    }
    /// The connection breaks; both sides notice.
    fn cut(&mut self, nth: usize) {
        if let Some(conn) = self.conns[nth].take() {
            self.server.on_closed(conn, self.now);
            self.clients[nth].on_closed(self.now);
            self.run();
        }
    }
    fn leave(&mut self, nth: usize) {
        self.reachable[nth] = false;
        self.cut(nth);
    }
    fn come_back(&mut self, nth: usize) {
        self.reachable[nth] = true;
        self.pass(11_000);
        assert!(self.clients[nth].is_online());
    }
    fn at_server(&self, nth: usize) -> Vec<Lock> {
        let table = &self.server.volumes[0].locking.table;
        table.objects().iter().flat_map(|fid| table.locks(nth as u32 + 1, *fid)).collect()
    }
    fn at_client(&self, nth: usize) -> Vec<Lock> {
        let table = &self.clients[nth].locker.table;
        table.objects().iter().flat_map(|fid| table.locks(US, *fid)).collect()
    }
}

#[test]
fn what_one_holds_the_other_does_not_get() {
    let mut rig = Rig::new(2);
    assert_eq!(rig.ask(0, ask(X, 1, Write, (0, 9))), GRANTED);
    assert_eq!(rig.ask(1, ask(X, 1, Read, (9, 9))), Some(Err(Denied::Busy)));
    let held = LockHeld { kind: Write, start: 0, end: 9, pid: 1001 };
    assert_eq!(rig.test(1, ask(X, 1, Read, (5, 20))), Ok(Some(held)));
    assert_eq!(rig.test(0, ask(X, 1, Write, ALL)), Ok(None), "its own");
    assert_eq!(rig.ask(1, ask(X, 1, Write, (10, 19))), GRANTED);
    assert_eq!(rig.ask(1, ask(Y, 1, Write, (0, 9))), GRANTED);
    let flock = LockAsk { flock: true, ..ask(X, 1, Write, (0, 0)) };
    assert_eq!(rig.ask(1, flock.clone()), GRANTED, "the other family");
    assert_eq!(rig.ask(0, flock), Some(Err(Denied::Busy)));
    assert_eq!(rig.ask(0, ask(X, 1, Read, (0, 9))), GRANTED);
    assert_eq!(rig.ask(1, ask(X, 1, Read, (5, 9))), GRANTED);
    for nth in [0, 1] {
        assert_eq!(rig.at_client(nth), rig.at_server(nth));
    }
    // two owners of one client exclude each other just so
    assert_eq!(rig.ask(0, ask(Y, 7, Read, (0, 0))), Some(Err(Denied::Busy)));
    assert_eq!(rig.ask(1, ask(Y, 7, Read, (0, 0))), Some(Err(Denied::Busy)));
}

#[test]
fn who_waits_is_told_when_it_is_free_and_in_order() {
    let mut rig = Rig::new(4);
    assert_eq!(rig.ask(0, ask(X, 1, Read, ALL)), GRANTED);
    let writer = rig.wait(1, ask(X, 1, Write, (5, 5)));
    let reader = rig.wait(2, ask(X, 1, Read, ALL));
    let behind = rig.wait(3, ask(X, 1, Read, (0, 5)));
    rig.pass(60_000);
    assert!(rig.ended.len() == 1 && rig.clients.iter().all(Client::is_online), "patiently");
    assert_eq!(rig.ask(0, ask(X, 1, Unlock, ALL)), GRANTED);
    assert_eq!(rig.how(1, writer), GRANTED);
    assert_eq!((rig.how(2, reader), rig.how(3, behind)), (None, None));
    assert_eq!(rig.ask(1, ask(X, 1, Read, (5, 5))), GRANTED, "a downgrade");
    assert_eq!((rig.how(2, reader), rig.how(3, behind)), (GRANTED, GRANTED));
}

#[test]
fn a_wait_can_be_ended() {
    let mut rig = Rig::new(3);
    rig.ask(0, ask(X, 1, Write, ALL));
    let second = rig.wait(1, ask(X, 1, Write, ALL));
    let third = rig.wait(2, ask(X, 1, Write, ALL));
    rig.clients[1].on_lock_cancel(second);
    rig.clients[1].on_lock_cancel(second);
    rig.run();
    assert_eq!(rig.how(1, second), Some(Err(Denied::Interrupted)));
    assert_eq!(rig.how(2, third), None);
    // the server grants it at the moment at which nobody wants to wait any more: then it is held
    rig.put(0, ask(X, 1, Unlock, ALL));
    rig.clients[2].on_lock_cancel(third);
    rig.run();
    assert_eq!(rig.how(2, third), GRANTED);
    assert_eq!(rig.at_client(2), rig.at_server(2));
    assert_eq!(rig.at_server(2).len(), 1);
    rig.clients[2].on_lock_cancel(third);
    rig.run();
    // away from the server nobody is asked
    let again = rig.wait(1, ask(X, 1, Write, ALL));
    rig.leave(1);
    rig.clients[1].on_lock_cancel(again);
    rig.run();
    assert_eq!(rig.how(1, again), Some(Err(Denied::Interrupted)));
}

#[test]
fn a_circle_over_two_clients_is_refused() {
    let mut rig = Rig::new(3);
    for (nth, fid) in [(0, X), (1, Y)] {
        assert_eq!(rig.ask(nth, ask(fid, 1, Write, ALL)), GRANTED);
    }
    assert_eq!(rig.ask(2, ask(X, 9, Write, ALL)), Some(Err(Denied::Busy)));
    let first = rig.wait(0, ask(Y, 1, Write, ALL));
    let second = rig.wait(1, ask(X, 1, Read, (0, 0)));
    assert_eq!(rig.how(1, second), Some(Err(Denied::Deadlock)));
    assert_eq!(rig.how(0, first), None);
    rig.ask(1, ask(Y, 1, Unlock, ALL));
    assert_eq!(rig.how(0, first), GRANTED);
}

#[test]
fn the_locks_of_a_dead_client_end_after_the_grace() {
    let mut rig = Rig::new(3);
    rig.ask(0, ask(X, 1, Write, ALL));
    rig.wait(0, ask(Y, 1, Write, ALL));
    rig.ask(1, ask(X, 1, Write, ALL));
    let waits = rig.wait(1, ask(X, 1, Write, ALL));
    let dead = rig.wait(2, ask(X, 1, Write, ALL));
    rig.leave(0);
    rig.leave(2);
    rig.pass(9_500);
    assert_eq!(rig.how(1, waits), None);
    rig.pass(1_000);
    assert_eq!(rig.how(1, waits), GRANTED);
    assert_eq!(rig.how(2, dead), Some(Err(Denied::Away)));
    assert_eq!(rig.ask(1, ask(Y, 1, Write, ALL)), GRANTED);
}

#[test]
fn who_comes_back_in_time_keeps_its_locks() {
    let mut rig = Rig::new(2);
    rig.ask(0, ask(X, 1, Write, (0, 9)));
    rig.ask(0, ask(X, 1, Write, (20, 29)));
    let waits = rig.wait(1, ask(X, 1, Write, (0, 9)));
    rig.leave(0);
    let late = rig.put(0, ask(Y, 1, Write, ALL));
    assert_eq!(rig.ask(0, ask(X, 1, Unlock, (20, 29))), GRANTED, "at once");
    rig.pass(5_000);
    assert_eq!(rig.how(0, late), None);
    rig.reachable[0] = true;
    let now = rig.now;
    rig.clients[0].on_ship_now(now); // tries at once
    rig.pass(1_000);
    assert_eq!((rig.how(0, late), rig.how(1, waits)), (GRANTED, None));
    assert_eq!(rig.ask(1, ask(X, 1, Write, (20, 29))), GRANTED, "what was given up away is free");
    rig.pass(20_000);
    assert_eq!((rig.how(1, waits), &rig.lost[..]), (None, &[][..]), "the grace is over, but ...");
    assert_eq!(rig.at_client(0), rig.at_server(0));
    // its own wait survives just so, at the end of the queue
    rig.cut(1);
    rig.pass(2_000);
    rig.ask(0, ask(X, 1, Unlock, ALL));
    assert_eq!(rig.how(1, waits), GRANTED);
}

#[test]
fn who_comes_back_too_late_is_told_of_what_it_lost() {
    let mut rig = Rig::new(2);
    rig.ask(0, ask(X, 1, Write, (0, 9)));
    rig.ask(0, ask(X, 2, Write, (10, 19)));
    rig.leave(0);
    rig.pass(11_000);
    assert_eq!(rig.ask(1, ask(X, 1, Write, (5, 5))), GRANTED);
    // offline, locks hold among its own processes
    assert_eq!(rig.ask(0, ask(X, 3, Write, (15, 15))), Some(Err(Denied::Busy)));
    assert_eq!(rig.ask(0, ask(X, 3, Write, (5, 5))), Some(Err(Denied::Busy)));
    assert_eq!(rig.ask(0, ask(Y, 3, Write, ALL)), GRANTED);
    let waits = rig.wait(0, ask(Y, 4, Write, ALL));
    rig.come_back(0);
    let lost: Vec<u64> = rig.lost.iter().map(|(_, lock)| lock.owner).collect();
    assert_eq!(lost, [1]);
    assert_eq!(rig.at_client(0), rig.at_server(0));
    assert_eq!(rig.at_server(0).len(), 2);
    assert_eq!(rig.ask(1, ask(Y, 1, Read, ALL)), Some(Err(Denied::Busy)));
    assert_eq!(rig.ask(0, ask(X, 1, Read, (0, 0))), Some(Err(Denied::Lost)));
    assert_eq!(rig.ask(0, ask(X, 1, Read, (0, 0))), GRANTED, "it was told");
    assert_eq!(rig.how(0, waits), None);
    rig.ask(0, ask(Y, 3, Unlock, ALL));
    assert_eq!(rig.how(0, waits), GRANTED, "the wait was handed over, too");
}

#[test]
fn a_loss_is_told_by_unlocking_which_works_all_the_same() {
    let mut rig = Rig::new(2);
    rig.ask(0, ask(X, 1, Write, (0, 9)));
    rig.ask(0, ask(X, 1, Write, (20, 29)));
    rig.leave(0);
    rig.pass(11_000);
    rig.ask(1, ask(X, 1, Write, (5, 5)));
    rig.come_back(0);
    assert_eq!(rig.at_server(0).len(), 1);
    assert_eq!(rig.ask(0, ask(X, 1, Unlock, ALL)), Some(Err(Denied::Lost)));
    assert!(rig.at_server(0).is_empty() && rig.at_client(0).is_empty());
    assert_eq!(rig.ask(0, ask(X, 1, Unlock, ALL)), GRANTED);
}

#[test]
fn a_client_that_starts_anew_holds_nothing() {
    let mut rig = Rig::new(2);
    rig.ask(0, ask(X, 1, Write, ALL));
    let waits = rig.wait(1, ask(X, 1, Write, ALL));
    rig.cut(0);
    rig.clients[0] = client(0, rig.now);
    rig.pass(2_000);
    assert_eq!(rig.how(1, waits), None);
    assert_eq!(rig.ask(0, ask(Y, 1, Write, ALL)), GRANTED);
    assert_eq!(rig.how(1, waits), GRANTED, "its first word was that it holds nothing");
    rig.pass(20_000);
    assert_eq!(rig.at_server(0).len(), 1, "and the grace of its former life is no matter any more");
}

#[test]
fn a_server_that_starts_anew_learns_what_is_held() {
    let mut rig = Rig::new(2);
    rig.ask(0, ask(X, 1, Write, ALL));
    let waits = rig.wait(1, ask(X, 1, Read, ALL));
    rig.server = new_server();
    for nth in [0, 1] {
        rig.conns[nth] = None;
        let now = rig.now;
        rig.clients[nth].on_closed(now);
    }
    rig.pass(2_000);
    assert_eq!(rig.how(1, waits).is_some(), rig.at_server(0).is_empty(), "who comes first");
    let lost = rig.lost.len();
    assert_eq!(rig.at_server(0).len() + lost, 1);
}

#[test]
fn who_never_locks_never_says_a_word() {
    let mut rig = Rig::new(2);
    rig.cut(1);
    rig.pass(30_000);
    assert!(rig.messages.is_empty());
}

// The locker alone, with a write permit.

#[derive(Default)]
struct Alone {
    locker: Locker,
    line: Line,
}

impl Alone {
    fn online() -> Alone {
        let mut alone = Alone::default();
        alone.locker.on_online(|_| true, &mut alone.line);
        alone
    }
    fn ask(&mut self, number: Number, ask: LockAsk) {
        self.locker.on_ask(number, ask, true, &mut self.line);
    }
    fn sent(&mut self) -> Vec<Message> {
        let effects = std::iter::from_fn(|| self.line.poll());
        let sent = effects.filter_map(|effect| match effect {
            Effect::Send { message, foreground, .. } => {
                assert!(foreground, "locks keep their order");
                Some(message)
            }
            _ => None,
        });
        sent.collect()
    }
    fn ended(&mut self) -> Vec<(Number, How)> {
        let effects = std::iter::from_fn(|| self.line.poll());
        let ended = effects.map(|effect| match effect {
            Effect::LockEnded { number, how } => (number, how),
            effect => panic!("{effect:?}"),
        });
        ended.collect()
    }
}

#[test]
fn alone_nobody_is_asked() {
    let mut alone = Alone::online();
    alone.ask(1, ask(X, 1, Write, ALL));
    alone.ask(2, ask(X, 2, Write, ALL));
    alone.ask(3, LockAsk { wait: true, ..ask(X, 3, Read, ALL) });
    alone.ask(4, ask(Y, 3, Write, ALL));
    alone.ask(5, LockAsk { wait: true, ..ask(Y, 1, Write, ALL) });
    alone.ask(6, ask(X, 1, Unlock, ALL));
    let want = [
        (1, Ok(None)),
        (2, Err(Denied::Busy)),
        (4, Ok(None)),
        (5, Err(Denied::Deadlock)),
        (6, Ok(None)),
        (3, Ok(None)),
    ];
    assert_eq!(alone.ended(), want);
}

#[test]
fn a_recall_hands_over_what_is_held_and_what_is_waited_for() {
    let mut alone = Alone::online();
    alone.ask(1, ask(X, 1, Write, (0, 9)));
    alone.ask(2, ask(Y, 2, Read, (0, 0)));
    alone.ask(3, LockAsk { wait: true, ..ask(X, 2, Read, ALL) });
    assert_eq!(alone.ended(), [(1, Ok(None)), (2, Ok(None))]);
    assert_eq!(alone.locker.decided_here(), BTreeSet::from([X, Y]));
    alone.locker.hand_over([X, Fid(99)], &mut alone.line);
    let locks = vec![Lock {
        fid: X,
        owner: 1,
        flock: false,
        held: LockHeld { kind: Write, start: 0, end: 9, pid: 1001 },
    }];
    let wait = LockAsk { wait: true, ..ask(X, 2, Read, ALL) };
    assert_eq!(alone.sent(), [Claim { fresh: true, locks }.into(), wait.into()]);
    assert_eq!(alone.locker.decided_here(), BTreeSet::from([Y]));
    alone.locker.hand_over([X], &mut alone.line);
    assert_eq!(alone.sent(), [], "once");
    // Y is still decided here, but for waits: they are all where one of them is
    alone.ask(4, ask(Y, 2, Write, (0, 0)));
    assert_eq!(alone.ended(), [(4, Ok(None))]);
    alone.ask(5, LockAsk { wait: true, ..ask(Y, 1, Write, (0, 0)) });
    let sent = alone.sent();
    let handed = |m: &Message| matches!(m, Message::Claim(c) if !c.fresh && c.locks[0].fid == Y);
    assert!(handed(&sent[0]), "{sent:?}");
    assert_eq!(sent[1], LockAsk { wait: true, ..ask(Y, 1, Write, (0, 0)) }.into());
    // the server answers; when nothing is left of X, the client decides again
    let done = LockAnswer { why: None, held: None, others: true };
    alone.ask(6, ask(X, 1, Unlock, ALL));
    alone.locker.on_answer(6, &done, &mut alone.line);
    alone.locker.on_answer(3, &done, &mut alone.line);
    alone.ask(7, ask(X, 2, Unlock, ALL));
    alone.locker.on_answer(7, &LockAnswer { others: false, ..done }, &mut alone.line);
    alone.sent();
    alone.ask(8, ask(X, 1, Write, ALL));
    assert_eq!(alone.ended(), [(8, Ok(None))]);
}

#[test]
fn others_are_asked_after_in_spite_of_a_permit() {
    let mut alone = Alone::online();
    alone.locker.note_others(&[X], &mut alone.line);
    alone.ask(1, ask(X, 1, Write, ALL));
    assert_eq!(alone.sent().len(), 2, "a claim of nothing, and the lock");
    let busy = LockAnswer { why: Some(Denied::Busy), held: None, others: true };
    alone.locker.on_answer(1, &busy, &mut alone.line);
    assert_eq!(alone.ended(), [(1, Err(Denied::Busy))]);
    alone.ask(2, ask(X, 1, Write, ALL));
    assert_eq!(alone.sent().len(), 1);
}

// Random histories.

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn random_ask(rng: &mut Rng) -> LockAsk {
    let (a, b) = (rng.below(6), rng.below(6));
    let kind = [Read, Write, Write, Unlock, Unlock][rng.below(5) as usize];
    let fid = [X, Y][rng.below(2) as usize];
    let plain = ask(fid, rng.below(2), kind, (a.min(b), a.max(b)));
    LockAsk { flock: rng.below(4) == 0, wait: rng.below(2) == 0, ..plain }
}

fn check(rig: &Rig, what: &str) {
    for nth in 0..rig.clients.len() {
        if rig.clients[nth].is_online() {
            assert_eq!(sorted(rig.at_client(nth)), sorted(rig.at_server(nth)), "{what}: {nth}");
        }
    }
}

fn sorted(mut locks: Vec<Lock>) -> Vec<Lock> {
    locks.sort_by_key(|l| (l.fid, l.flock, l.owner, l.held.start));
    locks
}

fn history(seed: u64) {
    let (mut rig, mut rng) = (Rig::new(3), Rng(seed | 1 << 40));
    for step in 0..150 {
        let what = format!("seed {seed} step {step}");
        let nth = rng.below(3) as usize;
        match rng.below(30) {
            0..20 => {
                let mut ask = random_ask(&mut rng);
                // one at a time for each open file: see the head of locker.rs
                let whose = |of: &LockAsk| (of.fid, of.owner, of.flock);
                let locker = &rig.clients[nth].locker;
                let asked = locker.asked.values().map(|asked| &asked.ask);
                let mut all = asked.chain(locker.waits.values().map(|wait| &wait.1));
                ask.flock &= !all.any(|other| whose(other) == whose(&ask));
                rig.put(nth, ask);
                // several may be on their way at one time
                if rng.below(3) > 0 {
                    rig.run();
                }
            }
            20..23 => {
                let number = 1 + rng.below(rig.last_number + 1);
                rig.clients[nth].on_lock_cancel(number);
            }
            23 => rig.cut(nth),
            24 => rig.leave(nth),
            25 => rig.reachable = vec![true; 3],
            26 => rig.pass(1 + rng.below(15_000)),
            _ => rig.pass(100),
        }
        if rng.below(2) == 0 {
            rig.run();
            check(&rig, &what);
        }
    }
    rig.reachable = vec![true; 3];
    rig.pass(40_000);
    assert!(rig.clients.iter().all(Client::is_online), "seed {seed}");
    check(&rig, &format!("seed {seed}, healed"));
    // all owners give up all they have, so that in the end nobody waits
    for _ in 0..40 {
        for nth in 0..3 {
            for (fid, owner, flock) in [X, Y].iter().flat_map(|f| {
                [(0, false), (1, false), (0, true), (1, true)].map(|o| (*f, o.0, o.1))
            }) {
                rig.ask(nth, LockAsk { flock, ..ask(fid, owner, Unlock, ALL) });
            }
        }
    }
    let asked: usize = rig.clients.iter().map(|c| c.locker.asked.len()).sum();
    assert_eq!(asked, 0, "seed {seed}: somebody still waits");
    assert_eq!(rig.ended.len() as u64, rig.last_number, "seed {seed}: somebody was not told");
    assert!(rig.server.volumes[0].locking.table.is_empty(), "seed {seed}");
    for client in &rig.clients {
        assert!(client.locker.table.is_empty() && client.locker.waits.is_empty(), "seed {seed}");
    }
}

#[test]
fn clients_and_server_agree_after_whatever_happened() {
    for seed in 1..=400 {
        history(seed);
    }
}
