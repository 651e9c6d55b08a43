//! Clients and a server, the real machines, in virtual time and without sockets.

use std::time::{Duration, Instant};

use super::super::client::{Client, Settings, Want, Who};
use super::super::message::{Changes, Message};
use super::super::promises::ConnId;
use super::super::rights::Held;
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
    rights: Vec<Held>,
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
            rights: (0..count).map(|_| Held::default()).collect(),
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
                quiet &= !self.run_client(nth);
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

    /// What a client decided is carried out before it hears of anything more.
    fn run_client(&mut self, nth: usize) -> bool {
        let mut any = false;
        while let Some(effect) = self.clients[nth].poll() {
            any = true;
            self.of_client(nth, effect);
        }
        any
    }

    fn of_client(&mut self, nth: usize, effect: Effect) {
        let rights = &self.rights[nth];
        match effect {
            Effect::SetVolume { mode, raise: true } => rights.edit(|r| r.raise_volume(mode)),
            Effect::SetVolume { mode, raise: false } => rights.edit(|r| r.set_volume(mode)),
            Effect::Raise { fids, mode } => rights.edit(|r| {
                fids.iter().for_each(|fid| r.set(*fid, r.mode(*fid).max(mode)));
            }),
            Effect::Lower { recall_id, fids, mode } => {
                rights.edit(|r| match &fids[..] {
                    [] => r.set_volume(mode),
                    _ => fids.iter().for_each(|fid| r.set(*fid, r.mode(*fid).min(mode))),
                });
                let kept = if mode == Mode::Read { fids } else { Vec::new() };
                self.clients[nth].on_lowered(recall_id, Seq(0), kept, self.now);
                self.clients[nth].on_told(recall_id);
            }
            Effect::SetModes { fids, mode } => rights.edit(|r| {
                fids.iter().for_each(|fid| r.set(*fid, mode));
            }),
            Effect::MarkStale { break_id: Some(id), .. } => self.clients[nth].on_break_done(id),
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
                    self.run_client(nth);
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
                self.server.on_met(conn, hello.node, (Seq(0), Seq(0)), self.now);
            }
            server::Effect::Ask { conn, id, request, .. } => {
                let (upto, volume) = (Stamp(100), Mode::None);
                let changes = Changes { fids: vec![], upto, more: false, lost: false, volume };
                self.server.on_answer(conn, id, (&request, changes.into()), &[], self.now);
            }
            server::Effect::Live { .. } => {}
            effect => panic!("{effect:?}"),
        }
    }

    /// Asks for the right to change the objects.
    fn permit(&mut self, nth: usize, fids: &[Fid]) {
        let now = self.now;
        self.clients[nth].on_want(Want::Permit(fids.to_vec()), 1, now);
        self.run_client(nth);
    }
    fn put(&mut self, nth: usize, ask: LockAsk) -> Number {
        self.last_number += 1;
        let permitted = self.rights[nth].mode(ask.fid) == Mode::Write;
        self.clients[nth].on_lock(self.last_number, ask, permitted, self.now);
        self.run_client(nth);
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
    rig.server.expect_back(0, &[1, 2], rig.now);
    for nth in [0, 1] {
        rig.conns[nth] = None;
        let now = rig.now;
        rig.clients[nth].on_closed(now);
    }
    rig.reachable[0] = false; // the other one comes first
    rig.pass(3_000);
    rig.reachable[0] = true;
    let now = rig.now;
    rig.clients[0].on_ship_now(now);
    rig.pass(20_000);
    assert_eq!((rig.how(1, waits), rig.lost.len()), (None, 0));
    assert_eq!(rig.at_server(0).len(), 1);
    rig.ask(0, ask(X, 1, Unlock, ALL));
    assert_eq!(rig.how(1, waits), GRANTED);
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
        alone.locker.on_online(true, &mut alone.line);
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
fn who_is_sure_is_told_otherwise_by_what_happens() {
    let mut locker = Locker::default();
    let raise = |fid| Effect::Raise { fids: vec![fid], mode: Mode::Write };
    let lower = |fids| Effect::Lower { recall_id: 1, fids, mode: Mode::Read };
    locker.sure.set(X, true);
    assert!(locker.is_sure(X) && !locker.is_sure(Y));
    locker.on_rights(&raise(X));
    assert!(!locker.is_sure(X), "somebody may have come in between");
    locker.on_rights(&Effect::SetVolume { mode: Mode::Write, raise: true });
    locker.on_rights(&raise(X));
    assert!(locker.is_sure(X) && locker.is_sure(Y), "nobody else had any when that was given");
    locker.on_rights(&lower(vec![X]));
    locker.on_rights(&raise(X));
    assert!(!locker.is_sure(X) && locker.is_sure(Y));
    locker.on_rights(&lower(vec![]));
    assert!(!locker.is_sure(X) && !locker.is_sure(Y));
}

// Locks and permits together.

#[test]
fn a_client_alone_asks_nobody_and_beside_an_idle_one_neither() {
    let mut rig = Rig::new(1);
    assert_eq!(rig.ask(0, ask(X, 1, Write, ALL)), GRANTED);
    rig.clients.push(client(1, rig.now));
    rig.rights.push(Held::default());
    rig.conns.push(None);
    rig.reachable.push(true);
    rig.pass(1_000);
    assert!(rig.clients[1].is_online());
    assert_eq!(rig.ask(0, ask(Y, 1, Write, ALL)), GRANTED);
    assert_eq!(rig.ask(0, ask(Y, 2, Write, ALL)), Some(Err(Denied::Busy)));
    assert_eq!(rig.ask(0, ask(X, 1, Unlock, ALL)), GRANTED);
    assert!(rig.messages.is_empty());
    // what the other one asks for is handed over, and nothing else
    assert_eq!(rig.ask(1, ask(Y, 1, Read, (5, 5))), Some(Err(Denied::Busy)));
    assert_eq!(rig.at_server(0).len(), 1);
    assert_eq!(rig.ask(0, ask(X, 1, Write, ALL)), GRANTED);
    let of = |nth| rig.messages.iter().filter(move |(of, _)| *of == nth).count();
    assert_eq!((of(0), of(1)), (1, 2), "one claim; a claim of nothing, and the lock");
}

#[test]
fn a_permit_alone_makes_nobody_sure() {
    let mut rig = Rig::new(2);
    assert_eq!(rig.ask(1, ask(X, 1, Write, ALL)), GRANTED);
    rig.permit(0, &[X]);
    rig.run();
    assert_eq!(rig.rights[0].mode(X), Mode::Write);
    assert_eq!(rig.ask(0, ask(X, 1, Write, ALL)), Some(Err(Denied::Busy)));
    let waits = rig.wait(0, ask(X, 1, Write, ALL));
    assert_eq!(rig.ask(1, ask(X, 1, Unlock, ALL)), GRANTED);
    assert_eq!(rig.how(0, waits), GRANTED);
    assert_eq!(rig.ask(0, ask(X, 1, Unlock, ALL)), GRANTED);
    let before = rig.messages.len();
    for kind in [Write, Unlock, Read, Unlock] {
        assert_eq!(rig.ask(0, ask(X, 1, kind, ALL)), GRANTED);
    }
    assert_eq!(rig.messages.len(), before, "it was told that nobody else has any");
    let recalls = rig.put(1, ask(X, 1, Write, ALL));
    rig.pass(1_000); // what was given just now is kept for a moment
    assert_eq!(rig.how(1, recalls), GRANTED);
    assert_ne!(rig.rights[0].mode(X), Mode::Write);
    assert_eq!(rig.ask(0, ask(X, 1, Write, ALL)), Some(Err(Denied::Busy)));
}

#[test]
fn a_lock_that_is_known_to_be_taken_costs_its_holder_no_permit() {
    let mut rig = Rig::new(2);
    assert_eq!(rig.ask(1, ask(X, 1, Write, ALL)), GRANTED);
    rig.permit(1, &[X]);
    rig.run();
    assert_eq!(rig.rights[1].mode(X), Mode::Write);
    for _ in 0..3 {
        assert_eq!(rig.ask(0, ask(X, 1, Read, ALL)), Some(Err(Denied::Busy)));
        assert!(rig.test(0, ask(X, 1, Read, ALL)).unwrap().is_some());
    }
    let waits = rig.wait(0, ask(X, 1, Write, ALL));
    assert_eq!(rig.rights[1].mode(X), Mode::Write);
    assert_eq!(rig.ask(1, ask(X, 1, Unlock, ALL)), GRANTED);
    assert_eq!(rig.how(0, waits), GRANTED);
}

#[test]
fn locks_that_the_server_never_saw_survive_a_broken_connection() {
    let mut rig = Rig::new(2);
    assert_eq!(rig.ask(0, ask(X, 1, Write, ALL)), GRANTED);
    assert!(rig.at_server(0).is_empty() && rig.messages.is_empty());
    rig.leave(0);
    let waits = rig.wait(1, ask(X, 1, Write, ALL));
    let cancelled = rig.wait(1, ask(X, 2, Write, ALL));
    rig.clients[1].on_lock_cancel(cancelled);
    rig.run();
    assert_eq!(rig.how(1, cancelled), Some(Err(Denied::Interrupted)));
    rig.pass(2_000);
    let now = rig.now;
    rig.reachable[0] = true;
    rig.clients[0].on_ship_now(now);
    rig.pass(30_000);
    assert_eq!((rig.how(1, waits), rig.lost.len()), (None, 0));
    rig.ask(0, ask(X, 1, Unlock, ALL));
    assert_eq!(rig.how(1, waits), GRANTED);
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
    let server = &rig.server.volumes[0].locking.table;
    let decided_here = |nth: usize| rig.clients[nth].locker.decided_here();
    for nth in (0..rig.clients.len()).filter(|nth| rig.clients[*nth].is_online()) {
        let here = decided_here(nth);
        if !rig.clients[nth].locker.claims.is_empty() {
            continue; // that waits until others have let go
        }
        let (mut own, mut known) = (rig.at_client(nth), rig.at_server(nth));
        own.retain(|lock| !here.contains(&lock.fid));
        // a flock lock that is to become another counts as gone when that is asked
        let asked = rig.clients[nth].locker.asked.values();
        let asked: Vec<Whose> = asked.map(|a| (a.ask.fid, a.ask.owner, a.ask.flock)).collect();
        for locks in [&mut own, &mut known] {
            locks.retain(|lock| !lock.flock || !asked.contains(&(lock.fid, lock.owner, true)));
        }
        assert_eq!(sorted(own), sorted(known), "{what}: {nth}");
        for fid in here {
            let others = (0..rig.clients.len()).filter(|of| *of != nth);
            let mut others = others.filter(|of| rig.clients[*of].is_online());
            let taken = others.any(|of| decided_here(of).contains(&fid));
            let known = server.objects().contains(&fid);
            assert!(!taken && !known, "{what}: {nth} does not decide about {fid} alone");
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
        match rng.below(33) {
            30.. => {
                let fid = [X, Y][rng.below(2) as usize];
                rig.permit(nth, &[fid]);
            }
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
    for seed in 1..=300 {
        history(seed);
    }
}
