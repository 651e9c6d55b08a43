//! The server's permits, driven message by message.

use super::super::message::*;
use super::super::promises::Round;
use super::super::reint::Ticket;
use super::super::server::Settings;
use super::*;
use crate::kml::record::{Attr, Stamp};

const A: ConnId = ConnId(1);
const B: ConnId = ConnId(2);
const C: ConnId = ConnId(3);
const D: Fid = Fid(10);
const F: Fid = Fid(11);
/// keeps what it may do while it rests
const KEEPER: u32 = 9;
const LEASE: Duration = Duration::from_secs(10);

struct Rig {
    server: Server,
    now: Instant,
    next_id: u64,
    sent: Vec<(ConnId, u64, bool, Message)>,
    closed: Vec<ConnId>,
}

impl Rig {
    /// With these clients, who came in this order; requests are answered as if all were there.
    fn with(conns: &[ConnId]) -> Rig {
        let mut server = Server::new(Settings::default());
        server.add_volume("v", [7; 16], Stamp(100));
        let (sent, closed) = (Vec::new(), Vec::new());
        let mut rig = Rig { server, now: Instant::now(), next_id: 100, sent, closed };
        conns.iter().for_each(|conn| rig.join(*conn, conn.0, Seq(0)));
        rig
    }
    fn join(&mut self, conn: ConnId, node: u32, pending: Seq) {
        self.server.on_connect(conn, self.now);
        let (volume, incarnation) = ("v".to_owned(), [node as u8; 16]);
        let (volume_id, host) = ([0; 16], String::new());
        let hello = Hello {
            version: VERSION,
            volume,
            incarnation,
            node,
            volume_id,
            host,
            pending,
            keeps: node == KEEPER,
            locks: false,
            room: None,
        };
        self.say(conn, hello);
        self.server.on_met(conn, node, (Seq(0), Seq(0)), self.now);
        self.say(conn, Since { stamp: Stamp(100), read_all: false });
    }
    fn say(&mut self, conn: ConnId, message: impl Into<Message>) -> u64 {
        self.next_id += 1;
        self.server.on_message(conn, self.next_id, false, message.into(), self.now);
        self.turn();
        self.next_id
    }
    fn reply(&mut self, conn: ConnId, id: u64, message: impl Into<Message>) {
        self.server.on_message(conn, id, true, message.into(), self.now);
        self.turn();
    }
    fn turn(&mut self) {
        while let Some(effect) = self.server.poll() {
            match effect {
                Effect::Ask { conn, id, request, .. } => {
                    let (message, given) = answer(&request);
                    let now = self.now;
                    self.server.on_answer(conn, id, (&request, message), &given, now);
                }
                Effect::Send { message: Message::Ping(_), .. } => {}
                Effect::Send { conn, id, answer, message, .. } => {
                    self.sent.push((conn, id, answer, message));
                }
                Effect::Close { conn, .. } => self.closed.push(conn),
                _ => {}
            }
        }
    }
    /// Time in which these say something now and then.
    fn pass(&mut self, time: Duration, alive: &[ConnId]) {
        let until = self.now + time;
        while self.now < until {
            self.now += Duration::from_secs(1).min(until - self.now);
            alive.iter().for_each(|conn| _ = self.say(*conn, Ping {}));
            self.server.wake(self.now);
            self.turn();
        }
        self.sent.retain(|(.., message)| !matches!(message, Message::Pong(_)));
    }
    fn stat(&mut self, conn: ConnId, fid: Fid) -> u64 {
        self.say(conn, Stat { fid, have: Stamp(0) })
    }
    fn ask(&mut self, conn: ConnId, fid: Fid) -> u64 {
        self.say(conn, Ask { fids: vec![fid] })
    }
    /// Whether this request was answered meanwhile, and forgets that.
    fn answered(&mut self, id: u64) -> bool {
        let at = self.sent.iter().position(|(_, of, answer, _)| *answer && *of == id);
        at.map(|at| self.sent.remove(at)).is_some()
    }
    /// The recalls that a client got since, with their ids.
    fn recalls(&mut self, conn: ConnId) -> Vec<(u64, Vec<Fid>, Mode)> {
        let mine = |(to, _, answer, message): &mut (ConnId, u64, bool, Message)| {
            *to == conn && !*answer && matches!(message, Message::Recall(_))
        };
        let recall = |(_, id, _, message)| match message {
            Message::Recall(m) => (id, m.fids, m.mode),
            _ => unreachable!("only recalls were taken out"),
        };
        self.sent.extract_if(.., mine).map(recall).collect()
    }
    fn breaks(&mut self, conn: ConnId) -> Vec<(u64, Vec<Fid>)> {
        let mine = |(to, _, _, message): &mut (ConnId, u64, bool, Message)| {
            *to == conn && matches!(message, Message::Break(_))
        };
        let broken = |(_, id, _, message)| match message {
            Message::Break(m) => (id, m.fids),
            _ => unreachable!("only breaks were taken out"),
        };
        self.sent.extract_if(.., mine).map(broken).collect()
    }
    fn mode(&self, conn: ConnId, fid: Fid) -> Mode {
        self.server.mode(0, conn, fid)
    }
    fn release(&mut self, conn: ConnId, id: u64, kept: Vec<Fid>) {
        self.reply(conn, id, Released { kept, upto: Seq(0) });
    }
}

fn object(fid: Fid) -> Object {
    Object {
        fid,
        stamp: Stamp(5),
        attr: Attr::default(),
        target: vec![],
        xattrs: vec![],
        stored: None,
    }
}

fn answer(request: &Message) -> (Message, Vec<Fid>) {
    match request {
        Message::Stat(m) => {
            let status = Status { object: object(m.fid), mode: Mode::None, data: None };
            (status.into(), vec![m.fid])
        }
        Message::List(m) => {
            let entries = vec![Entry { name: b"f".to_vec(), object: object(F) }];
            let (dir, more, gone) = (object(m.dir), false, None);
            let (mode, read_only) = (Mode::None, vec![]);
            let page = Page { dir, entries, more, gone, mode, read_only };
            (page.into(), vec![m.dir, F])
        }
        _ => {
            let (upto, more, lost, volume) = (Stamp(100), false, false, Mode::None);
            (Changes { fids: vec![], upto, more, lost, volume }.into(), vec![])
        }
    }
}

#[test]
fn the_first_may_change_all_and_the_second_what_is_recalled() {
    let mut rig = Rig::with(&[A, B]);
    assert_eq!((rig.mode(A, F), rig.mode(B, F)), (Mode::Write, Mode::None));
    let id = rig.stat(B, F);
    assert!(!rig.answered(id), "not before A has let go");
    let recalls = rig.recalls(A);
    assert_eq!(recalls[0].1, [F]);
    assert_eq!(recalls[0].2, Mode::Read);
    rig.release(A, recalls[0].0, vec![F]);
    assert!(rig.answered(id));
    assert_eq!((rig.mode(A, F), rig.mode(B, F)), (Mode::Read, Mode::Read));
    assert_eq!(rig.mode(A, D), Mode::Write, "nothing else was recalled");
}

#[test]
fn who_let_all_go_leaves_it_to_the_reader_to_change() {
    let mut rig = Rig::with(&[A, B]);
    let id = rig.stat(B, F);
    let recall = rig.recalls(A)[0].0;
    rig.release(A, recall, vec![]);
    assert!(rig.answered(id));
    assert_eq!((rig.mode(A, F), rig.mode(B, F)), (Mode::None, Mode::Write));
    // and back, by one question
    let id = rig.stat(A, F);
    let recall = rig.recalls(B)[0].0;
    rig.release(B, recall, vec![]);
    assert!(rig.answered(id));
    assert_eq!((rig.mode(A, F), rig.mode(B, F)), (Mode::Write, Mode::None));
}

#[test]
fn a_release_waits_for_the_records_that_it_names() {
    let mut rig = Rig::with(&[A, B]);
    let id = rig.stat(B, F);
    let recall = rig.recalls(A)[0].0;
    rig.reply(A, recall, Released { kept: vec![], upto: Seq(7) });
    assert!(!rig.answered(id), "they are on their way");
    rig.server.on_reached(A, Seq(6), rig.now);
    rig.turn();
    assert!(!rig.answered(id));
    rig.server.on_reached(A, Seq(7), rig.now);
    rig.turn();
    assert!(rig.answered(id));
}

#[test]
fn writers_are_served_in_their_order_and_readers_do_not_overtake_them() {
    let mut rig = Rig::with(&[A, B, C]);
    let read = rig.stat(B, F);
    let recall = rig.recalls(A)[0].0;
    rig.release(A, recall, vec![F]);
    assert!(rig.answered(read));
    let write = rig.ask(C, F);
    let late = rig.stat(B, F);
    assert!(!rig.answered(write) && !rig.answered(late));
    for conn in [A, B] {
        let (id, fids) = rig.breaks(conn).pop().unwrap();
        assert_eq!(fids, [F]);
        rig.reply(conn, id, Pong { stamp: Stamp(0) });
    }
    assert!(rig.answered(write));
    assert!(!rig.answered(late), "the reader came after the writer");
    assert_eq!(rig.mode(C, F), Mode::Write);
    let recall = rig.recalls(C)[0].0;
    rig.release(C, recall, vec![F]);
    assert!(rig.answered(late));
}

#[test]
fn two_never_may_change_the_same() {
    let mut rig = Rig::with(&[A, B, C]);
    let (b, c) = (rig.ask(B, F), rig.ask(C, F));
    let recall = rig.recalls(A);
    assert_eq!((recall.len(), recall[0].2), (1, Mode::None));
    rig.release(A, recall[0].0, vec![]);
    assert!(rig.answered(b) && !rig.answered(c));
    let recall = rig.recalls(B)[0].0;
    rig.release(B, recall, vec![]);
    assert!(rig.answered(c));
    let modes = [A, B, C].map(|conn| rig.mode(conn, F));
    assert_eq!(modes, [Mode::None, Mode::None, Mode::Write]);
}

#[test]
fn a_listing_recalls_what_is_in_it() {
    let mut rig = Rig::with(&[A, B]);
    let id = rig.say(B, List { dir: D, after: vec![], have: Stamp(0) });
    let recall = rig.recalls(A).pop().unwrap();
    assert_eq!(recall.1, [D, F]);
    rig.release(A, recall.0, vec![D, F]);
    assert!(rig.answered(id));
    assert_eq!((rig.mode(B, D), rig.mode(B, F)), (Mode::Read, Mode::Read));
}

#[test]
fn who_asks_much_reads_all_and_the_idle_lose_it_again() {
    let mut rig = Rig::with(&[A, B]);
    let id = rig.say(B, Since { stamp: Stamp(100), read_all: true });
    let recall = rig.recalls(A).pop().unwrap();
    assert_eq!((&recall.1[..], recall.2), (&[][..], Mode::Read));
    rig.release(A, recall.0, vec![]);
    assert!(rig.answered(id));
    assert_eq!((rig.mode(A, F), rig.mode(B, F)), (Mode::Read, Mode::Read));
    // B rests, and A goes on: all is A's again
    rig.pass(policy::IDLE, &[A, B]);
    let id = rig.ask(A, F);
    let (broken, _) = rig.breaks(B).pop().unwrap();
    rig.reply(B, broken, Pong { stamp: Stamp(0) });
    assert!(rig.answered(id));
    let recall = rig.recalls(B).pop().unwrap();
    assert_eq!((&recall.1[..], recall.2), (&[][..], Mode::None));
    rig.release(B, recall.0, vec![]);
    assert_eq!((rig.mode(A, D), rig.mode(B, D)), (Mode::Write, Mode::None));
}

#[test]
fn what_one_makes_is_not_anothers_by_a_right_to_all() {
    let mut rig = Rig::with(&[A, B]);
    let id = rig.ask(B, D);
    let recall = rig.recalls(A)[0].0;
    rig.release(A, recall, vec![]);
    assert!(rig.answered(id));
    rig.server.on_made(0, B, (&[(D, F)], &[]), rig.now);
    assert_eq!((rig.mode(A, F), rig.mode(B, F)), (Mode::None, Mode::Write));
    // and A learns it with the name
    rig.say(A, List { dir: D, after: vec![], have: Stamp(0) });
    let recall = rig.recalls(B)[0].0;
    rig.release(B, recall, vec![D, F]);
    let page = rig.sent.iter().find_map(|(_, _, _, message)| match message {
        Message::Page(page) => Some(page.read_only.clone()),
        _ => None,
    });
    assert_eq!(page, Some(vec![D, F].into_iter().filter(|fid| *fid == F).collect()));
    assert_eq!(rig.mode(A, F), Mode::Read);
}

#[test]
fn what_a_client_has_apart_from_the_volume_is_bounded() {
    let mut rig = Rig::with(&[A, B]);
    let id = rig.ask(B, D);
    let recall = rig.recalls(A)[0].0;
    rig.release(A, recall, vec![]);
    assert!(rig.answered(id));
    let made: Vec<(Fid, Fid)> = (0..APART_MAX as u64).map(|nth| (D, Fid(100 + nth))).collect();
    rig.server.on_made(0, B, (&made[1..], &[]), rig.now);
    rig.turn();
    assert!(rig.recalls(A).is_empty(), "D, and one less than may be");
    rig.server.on_made(0, B, (&made[..1], &[]), rig.now);
    rig.turn();
    let recalls = rig.recalls(A);
    assert_eq!((recalls.len(), &recalls[0].1[..], recalls[0].2), (1, &[][..], Mode::None));
    rig.release(A, recalls[0].0, vec![]);
    assert_eq!(rig.server.volumes[0].permits.rights(A).map(Rights::apart_count), Some(0));
}

// Found by the simulation: story (a) of its second version.
#[test]
fn who_has_not_answered_a_break_has_the_object_still() {
    for answers in [true, false] {
        let mut rig = Rig::with(&[C, A, B]);
        rig.say(C, Released { kept: vec![], upto: Seq(0) });
        rig.stat(A, F);
        rig.stat(B, F);
        let recall = rig.recalls(A).pop().unwrap();
        rig.release(A, recall.0, vec![F]);
        assert_eq!((rig.mode(A, F), rig.mode(B, F)), (Mode::Read, Mode::Read));
        let told = rig.server.send_breaks((C, Ticket(9)), 0, &[F], Round::Before, rig.now);
        rig.turn();
        let (of_b, _) = rig.breaks(B).pop().unwrap();
        rig.reply(B, of_b, Pong { stamp: Stamp(0) });
        let (first, _) = rig.breaks(A).pop().unwrap();
        assert_eq!((told, rig.mode(A, F)), (2, Mode::Read));
        let id = rig.ask(B, F);
        assert!(!rig.answered(id), "A may be reading it at this moment");
        if answers {
            rig.reply(A, first, Pong { stamp: Stamp(0) });
            let (again, _) = rig.breaks(A).pop().unwrap();
            rig.reply(A, again, Pong { stamp: Stamp(0) });
        } else {
            rig.server.on_closed(A, rig.now);
            rig.turn();
            assert!(!rig.answered(id), "and does not know that it is cut off");
            rig.pass(LEASE, &[B, C]);
        }
        assert!(rig.answered(id));
        assert_eq!(rig.mode(B, F), Mode::Write);
    }
}

// Found by the simulation: seed 241.
#[test]
fn who_asks_to_read_all_keeps_all_that_it_was_given_meanwhile() {
    let mut rig = Rig::with(&[A]);
    assert_eq!(rig.mode(A, F), Mode::Write);
    let id = rig.say(A, Since { stamp: Stamp(100), read_all: true });
    assert!(rig.answered(id));
    assert_eq!(rig.mode(A, F), Mode::Write);
}

#[test]
fn who_is_cut_off_keeps_others_waiting_for_its_lease_and_no_longer() {
    let mut rig = Rig::with(&[A, B]);
    rig.pass(Duration::from_secs(4), &[A, B]);
    rig.server.on_closed(A, rig.now);
    let id = rig.stat(B, F);
    assert!(!rig.answered(id) && rig.recalls(A).is_empty());
    rig.pass(LEASE - Duration::from_millis(1), &[B]);
    assert!(!rig.answered(id));
    rig.pass(Duration::from_millis(1), &[B]);
    assert!(rig.answered(id), "counted from when it was last heard");
}

#[test]
fn who_comes_back_ends_its_own_lease_when_all_it_had_is_here() {
    let mut rig = Rig::with(&[A, B]);
    rig.server.on_closed(A, rig.now);
    let id = rig.stat(B, F);
    rig.join(C, A.0, Seq(5));
    assert!(!rig.answered(id), "its changes are still on their way");
    rig.server.has_come(0, A.0, Seq(4), rig.now);
    rig.turn();
    assert!(!rig.answered(id));
    rig.server.has_come(0, A.0, Seq(5), rig.now);
    rig.turn();
    assert!(rig.answered(id));
    rig.server.on_closed(B, rig.now);
    rig.say(C, Released { kept: vec![], upto: Seq(0) });
    assert_eq!(rig.mode(C, F), Mode::None, "a farewell leaves nothing behind");
}

#[test]
fn who_is_there_and_does_not_let_go_is_dropped() {
    let mut rig = Rig::with(&[A, B]);
    let id = rig.stat(B, F);
    rig.pass(LEASE, &[A, B]);
    assert_eq!(rig.closed, [A]);
    assert!(!rig.answered(id), "it may not have heard of that yet");
    rig.pass(LEASE, &[B]);
    assert!(rig.answered(id), "and is waited for no longer");
}

#[test]
fn what_is_being_let_go_is_not_given_in_between() {
    let mut rig = Rig::with(&[A, B]);
    let all = rig.say(B, Since { stamp: Stamp(100), read_all: true });
    let recall = rig.recalls(A).pop().unwrap();
    let id = rig.stat(A, F);
    assert!(!rig.answered(id), "its release would take it away again, unseen");
    rig.release(A, recall.0, vec![]);
    assert!(rig.answered(id) && rig.answered(all));
    assert_eq!(rig.mode(A, F), Mode::Read);
}

#[test]
fn who_keeps_its_rights_loses_none_by_resting() {
    let mut rig = Rig::with(&[A, ConnId(KEEPER)]);
    let id = rig.say(ConnId(KEEPER), Since { stamp: Stamp(100), read_all: true });
    let recall = rig.recalls(A).pop().unwrap();
    rig.release(A, recall.0, vec![]);
    assert!(rig.answered(id));
    rig.pass(policy::IDLE * 2, &[A, ConnId(KEEPER)]);
    rig.ask(A, F);
    let (broken, _) = rig.breaks(ConnId(KEEPER)).pop().unwrap();
    rig.reply(ConnId(KEEPER), broken, Pong { stamp: Stamp(0) });
    assert!(rig.recalls(ConnId(KEEPER)).is_empty());
    assert_eq!(rig.mode(ConnId(KEEPER), D), Mode::Read);
}

#[test]
fn a_server_that_starts_again_waits_for_whom_it_had() {
    let mut rig = Rig::with(&[]);
    rig.server.expect_back(0, &[1, 2], rig.now);
    rig.join(C, 3, Seq(0));
    assert_eq!(rig.mode(C, F), Mode::None);
    let id = rig.stat(C, F);
    rig.join(A, 1, Seq(4));
    rig.server.has_come(0, 1, Seq(4), rig.now);
    rig.turn();
    assert!(!rig.answered(id), "the other is still away");
    rig.pass(LEASE, &[A, C]);
    assert!(rig.answered(id));
}
