//! Two clients and a disk, driven message by message.

use std::sync::Arc;
use std::time::Duration;

use super::super::grant::{Grant, Kept};
use super::super::message::{Hello, VERSION};
use super::super::server::Settings;
use super::*;
use crate::kml::record::{Seq, Stamp};

const A: ConnId = ConnId(1);
const B: ConnId = ConnId(2);
const MIB: u64 = 1 << 20;

struct Rig {
    server: Server,
    now: Instant,
    next_id: u64,
    free: Room,
    saved: Vec<Saved>,
    sent: Vec<(ConnId, u64, bool, Message)>,
    grants: BTreeMap<ConnId, Arc<Grant>>,
}

fn mib(n: u64) -> Room {
    Room::new(n * MIB, n)
}

fn rig(free: u64) -> Rig {
    let (mut server, now) = (Server::new(Settings::default()), Instant::now());
    server.add_volume("v", [7; 16], Stamp(0));
    server.reserve(1, Saved { epoch_next: 9, nodes: Vec::new() }, now);
    let (saved, sent, grants) = (Vec::new(), Vec::new(), BTreeMap::new());
    let mut rig = Rig { server, now, next_id: 100, free: mib(free), saved, sent, grants };
    [A, B].into_iter().for_each(|conn| rig.join(conn));
    rig
}

impl Rig {
    fn join(&mut self, conn: ConnId) {
        let grant = self.grants.entry(conn).or_insert_with(|| Grant::new(Kept::default(), false));
        let hello = Hello {
            version: VERSION,
            volume: "v".to_owned(),
            incarnation: [conn.0 as u8; 16],
            node: conn.0,
            volume_id: [0; 16],
            host: String::new(),
            pending: Seq(0),
            keeps: false,
            locks: false,
            room: grant.hello(),
        };
        self.server.on_connect(conn, self.now);
        self.say(conn, false, 1, hello.into());
        self.server.on_met(conn, conn.0, (Seq(0), Seq(0)), self.now);
        self.turn();
        let welcome = self.take(conn);
        let [(_, _, Message::Welcome(m))] = &welcome[..] else { panic!("{welcome:?}") };
        self.grants[&conn].welcome(m.room.as_ref());
    }
    fn say(&mut self, conn: ConnId, answer: bool, id: u64, message: Message) {
        self.server.on_message(conn, id, answer, message, self.now);
        self.turn();
    }
    fn ask(&mut self, conn: ConnId, need: Room, ahead: bool) {
        self.next_id += 1;
        let held = self.grants[&conn].hello().unwrap();
        self.say(conn, false, self.next_id, RoomAsk { held, need, ahead }.into());
    }
    fn turn(&mut self) {
        while let Some(effect) = self.server.poll() {
            match effect {
                Effect::Survey { volume } => {
                    self.server.on_surveyed(volume, self.free, Room::NONE, self.now);
                }
                Effect::SaveGrants { saved, then: (conn, id, message), .. } => {
                    self.saved.push(saved);
                    self.sent.push((conn, id, true, message));
                }
                Effect::Send { conn, id, answer, message, .. } => {
                    self.sent.push((conn, id, answer, message));
                }
                _ => {}
            }
        }
    }
    fn take(&mut self, conn: ConnId) -> Vec<(u64, bool, Message)> {
        let of = self.sent.extract_if(.., |(of, ..)| *of == conn);
        of.map(|(_, id, answer, message)| (id, answer, message)).collect()
    }
    /// The only message to a client is these terms.
    fn terms(&mut self, conn: ConnId) -> RoomTerms {
        let sent = self.take(conn);
        let [(_, true, Message::RoomTerms(terms))] = &sent[..] else { panic!("{sent:?}") };
        self.grants[&conn].hear(terms);
        *terms
    }
    fn held(&self, conn: ConnId) -> Room {
        let book = &self.server.rooms.book;
        let of = book.holdings(0).into_iter().find(|held| held.node == conn.0);
        of.map_or(Room::NONE, |held| held.outstanding)
    }
}

#[test]
fn what_is_granted_is_written_down_before_it_is_said() {
    let mut rig = rig(1000);
    rig.ask(A, mib(1), false);
    assert!(!rig.terms(A).short);
    let saved = rig.saved.pop().unwrap();
    assert!(saved.nodes[0].granted.covers(rig.held(A)));
    assert!(rig.held(A).covers(mib(100)), "much ahead: {:?}", rig.held(A));
    // what was saved ahead is enough for the next one
    rig.ask(A, mib(1), true);
    assert!(!rig.terms(A).short && rig.saved.len() <= 1);
}

#[test]
fn others_give_back_before_anybody_is_refused() {
    let mut rig = rig(80);
    rig.ask(A, mib(30), false);
    rig.terms(A);
    rig.ask(B, mib(60), false);
    let asked = rig.take(A);
    let [(id, false, Message::GiveBack(_))] = asked[..] else { panic!("{asked:?}") };
    assert!(rig.take(B).is_empty(), "it waits");
    // one who asks ahead does not make others give back, and waits for nobody
    let used = rig.grants[&A].charge(mib(5)).unwrap();
    rig.grants[&A].give_back_all_but(Room::NONE);
    let held = rig.grants[&A].hello().unwrap();
    rig.say(A, true, id, GivenBack { held }.into());
    assert!(!rig.terms(B).short);
    assert_eq!((rig.held(A), rig.held(B).covers(mib(60))), (used.room(), true));
    rig.ask(A, mib(40), true);
    assert!(rig.terms(A).short && rig.take(B).is_empty());
}

#[test]
fn who_does_not_give_back_is_waited_for_in_bounded_time() {
    let mut rig = rig(80);
    rig.ask(A, mib(30), false);
    rig.terms(A);
    let before = rig.held(A);
    rig.ask(B, mib(60), false);
    assert!(rig.take(B).is_empty());
    rig.now += policy::RECALL_MAX;
    assert!(rig.server.wake_at().is_some_and(|at| at <= rig.now));
    rig.server.wake(rig.now);
    rig.turn();
    assert!(rig.terms(B).short);
    assert_eq!((rig.held(A), rig.held(B)), (before, mib(80).less(before)), "what there was");
}

#[test]
fn a_connection_that_ends_leaves_the_grant_and_no_waiting() {
    let mut rig = rig(80);
    rig.ask(A, mib(30), false);
    let lost = rig.terms(A).granted;
    rig.ask(B, mib(60), false);
    assert_eq!(rig.take(A).len(), 1, "it is asked to give back");
    rig.server.on_closed(A, rig.now);
    rig.turn();
    assert!(rig.terms(B).short, "nobody is left who could give back");
    assert_eq!(rig.held(A), lost);
    let end = rig.now + policy::KEEP_GRANT - Duration::from_secs(1);
    assert!(rig.server.rooms.book.ends_at(policy::KEEP_GRANT).is_some_and(|at| at > end));
    // back again with the same figures, and with those of a reply that was lost
    rig.join(A);
    assert_eq!((rig.grants[&A].figures().free, rig.held(A)), (lost, lost));
}

#[test]
fn df_shows_the_room_that_nobody_holds_and_the_quota() {
    let mut rig = rig(80);
    let space = Space {
        block_len: 4096,
        blocks: 100 * MIB / 4096,
        blocks_free: 90 * MIB / 4096,
        blocks_available: 90 * MIB / 4096,
        files: 1000,
        files_free: 900,
    };
    rig.ask(A, mib(30), false);
    rig.terms(A);
    let left = mib(80).less(rig.held(A));
    let shown = rig.server.shown_space(0, space);
    assert_eq!(shown.blocks_available, left.bytes() / 4096);
    assert_eq!((shown.blocks_free, shown.files_free), (shown.blocks_available, left.files()));
    rig.server.set_quota(0, Some(mib(50)));
    rig.turn();
    let shown = rig.server.shown_space(0, space);
    assert_eq!((shown.blocks, shown.files), (50 * MIB / 4096, 50));
    assert!(shown.blocks_available < 20 * MIB / 4096);
    assert_eq!(rig.server.room_report(0).unwrap().quota, Some(mib(50)));
}

#[test]
fn a_lower_limit_takes_back_what_nobody_uses() {
    let mut rig = rig(1 << 10);
    rig.ask(A, mib(30), false);
    rig.terms(A);
    assert!(rig.held(A).covers(mib(60)), "{:?}", rig.held(A));
    let charge = rig.grants[&A].charge(mib(20)).unwrap();
    rig.server.set_quota(0, Some(mib(500)));
    rig.turn();
    assert!(rig.take(A).is_empty(), "it is not below what is granted");
    rig.server.set_quota(0, Some(mib(40)));
    rig.turn();
    let sent = rig.take(A);
    let [(id, false, Message::GiveBack(_))] = &sent[..] else { panic!("{sent:?}") };
    rig.grants[&A].give_back_all_but(Room::NONE);
    let held = rig.grants[&A].hello().unwrap();
    rig.say(A, true, *id, GivenBack { held }.into());
    assert_eq!((rig.held(A), rig.server.rooms.book.is_overdrawn(0)), (mib(20), false));
    rig.ask(B, mib(30), false);
    assert_eq!(rig.server.rooms.book.outstanding(0), mib(20), "not before A has been asked");
    drop(charge);
}
