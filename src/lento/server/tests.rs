//! The machine in virtual time: every effect is looked at, no socket and no file.

use super::super::intake::{self, Content};
use super::super::message::{
    Acked, Ask, Batch, Break, Changes, Data, List, Page, Ping, Pong, Read, Released, Since,
    Stamped, Stat, Statfs,
};
use super::super::reint::Applied;
use super::super::rights::Mode;
use super::*;
use crate::kml::record::{Name, Op, Origin, Place, Range, Record, Time};

const MIB: u64 = 1 << 20;
const A: ConnId = ConnId(1);
const B: ConnId = ConnId(2);

struct Rig {
    server: Server,
    now: Instant,
    done: Vec<Effect>,
}

fn hello(volume: &str) -> Hello {
    Hello {
        version: VERSION,
        volume: volume.into(),
        incarnation: [1; 16],
        node: 0,
        volume_id: [0; 16],
        host: "h".into(),
        locks: false,
        room: None,
        pending: Seq(0),
        keeps: false,
    }
}

fn rig() -> Rig {
    let mut server = Server::new(Settings { batches_max: 3, ..Settings::default() });
    assert_eq!(server.add_volume("v", [7; 16], Stamp(100)), 0);
    Rig { server, now: Instant::now(), done: Vec::new() }
}

/// A rig with A as node 1 and B as node 2, both welcome, with nothing acknowledged.
fn two() -> Rig {
    let mut rig = rig();
    for (conn, node) in [(A, 1), (B, 2)] {
        rig.server.on_connect(conn, rig.now);
        rig.say(conn, 1, hello("v").into());
        rig.server.on_met(conn, node, (Seq(0), Seq(0)), rig.now);
    }
    rig.take();
    rig
}

impl Rig {
    fn say(&mut self, conn: ConnId, id: u64, message: Message) {
        self.server.on_message(conn, id, false, message, self.now);
    }
    fn reply(&mut self, conn: ConnId, id: u64, message: Message) {
        self.server.on_message(conn, id, true, message, self.now);
    }
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.server.wake(self.now);
    }
    /// The effects since the last call.
    fn take(&mut self) -> Vec<Effect> {
        while let Some(effect) = self.server.poll() {
            if !matches!(&effect, Effect::Live { .. }) {
                self.done.push(effect);
            }
        }
        std::mem::take(&mut self.done)
    }
    fn give(&mut self, conn: ConnId, fids: &[u64]) {
        let given: Vec<Fid> = fids.iter().map(|f| Fid(*f)).collect();
        let request = List { dir: Fid(1), after: vec![], have: Stamp(0) }.into();
        self.server.on_answer(conn, 0, (&request, pong()), &given, self.now);
        self.take();
    }
    fn batch(&mut self, conn: ConnId, after: u64, changes: Vec<Change>) {
        let upto = changes.last().map_or(Seq(after), |c| c.seq);
        self.server.on_batch(conn, after + 1000, (Seq(after), upto), changes, self.now);
    }
    /// Says that the batch behind the effect was applied whole.
    fn applied(&mut self, apply: &Effect) {
        let Effect::Apply { ticket, volume, upto, .. } = apply else { panic!("{apply:?}") };
        let stamps = vec![(Fid(50), Stamp(101))];
        let applied = Applied { upto: *upto, stamps, ..Applied::default() };
        self.server.on_applied(*ticket, *volume, applied, self.now);
    }
}

fn record(op: Op) -> Record {
    Record { time_ns: 0, origin: Origin::default(), uid: 0, gid: 0, path: Vec::new(), op }
}

fn create(seq: u64, fid: u64) -> Change {
    let at = Place { dir: Fid(1), base: Stamp(0), name: Name::new(b"x").unwrap() };
    let op = Op::Create { at, fid: Fid(fid), mode: 0o644, umask: 0 };
    intake::change(Seq(seq), record(op), None).unwrap()
}

fn store(seq: u64, fid: u64, len: u64, data: Option<Vec<u8>>) -> Change {
    let ranges = vec![Range { at: 0, len }];
    let (base, mtime) = (Stamp(0), Time::default());
    let op = Op::Store { fid: Fid(fid), base, size: len, mtime, ranges, old_size: 0 };
    intake::change(Seq(seq), record(op), data).unwrap()
}

fn breaks(effects: &[Effect]) -> Vec<(ConnId, u64, Vec<Fid>)> {
    let of = |effect: &Effect| match effect {
        Effect::Send { conn, id, message: Message::Break(Break { fids }), .. } => {
            Some((*conn, *id, fids.clone()))
        }
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

fn answers(effects: &[Effect]) -> Vec<(ConnId, u64, Message)> {
    let of = |effect: &Effect| match effect {
        Effect::Send { conn, id, answer: true, message, .. } => Some((*conn, *id, message.clone())),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

fn pong_of(stamp: u64) -> Message {
    Pong { stamp: Stamp(stamp) }.into()
}

fn is_apply(effect: &&Effect) -> bool {
    matches!(effect, Effect::Apply { .. })
}

fn acked(effects: &[Effect]) -> Option<Seq> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send { message: Message::Acked(acked), .. } => Some(acked.upto),
        _ => None,
    })
}

fn failed(effects: &[Effect]) -> Vec<(u64, Code)> {
    let of = |effect: &Effect| match effect {
        Effect::Send { id, message: Message::Failed(f), answer: true, .. } => Some((*id, f.code)),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

fn closed(effects: &[Effect]) -> Vec<(ConnId, Why)> {
    let of = |effect: &Effect| match effect {
        Effect::Close { conn, why } => Some((*conn, why.clone())),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

fn pong() -> Message {
    Pong { stamp: Stamp(0) }.into()
}

#[test]
fn hello_is_answered_by_welcome() {
    let mut rig = rig();
    rig.server.on_connect(A, rig.now);
    rig.say(A, 5, hello("").into());
    assert!(matches!(&rig.take()[..], [Effect::Meet { conn: A, volume: 0, .. }]));
    rig.server.on_met(A, 9, (Seq(3), Seq(3)), rig.now);
    let want = Welcome {
        version: VERSION,
        volume_id: [7; 16],
        node: 9,
        acked: Seq(3),
        stamp: Stamp(100),
        volume: "v".into(),
        seen: Seq(3),
        read_only: false,
        room: None,
    };
    let message = want.into();
    let want = Effect::Send { conn: A, background: false, id: 5, answer: true, message };
    assert_eq!(rig.take(), [want]);
    assert_eq!(rig.server.clients().len(), 1);
}

#[test]
fn who_does_not_fit_is_refused_with_a_reason() {
    let cases = [
        (Hello { version: 9, ..hello("v") }, Code::WrongVersion),
        (hello("w"), Code::UnknownVolume),
        (Hello { volume_id: [8; 16], ..hello("v") }, Code::ForeignCache),
    ];
    for (hello, code) in cases {
        let mut rig = rig();
        rig.server.on_connect(A, rig.now);
        rig.say(A, 5, hello.into());
        let effects = rig.take();
        assert!(matches!(&effects[0], Effect::Send { id: 5, answer: true,
            message: Message::Refused(r), .. } if r.code == code));
        assert!(matches!(&closed(&effects)[..], [(A, Why::Refused(_))]));
    }
    let mut rig = two();
    rig.server.settings.peers_max = 2;
    rig.server.on_connect(ConnId(3), rig.now);
    rig.say(ConnId(3), 1, hello("v").into());
    assert!(matches!(&rig.take()[0], Effect::Send { message: Message::Refused(r), .. }
        if r.code == Code::TooManyClients));
}

#[test]
fn the_silent_and_the_impolite_are_closed() {
    let mut rig = rig();
    rig.server.on_connect(A, rig.now);
    assert_eq!(rig.server.wake_at(), Some(rig.now + Duration::from_secs(10)));
    rig.pass(Duration::from_secs(10));
    assert_eq!(closed(&rig.take()), [(A, Why::NoHello)]);
    rig.server.on_connect(B, rig.now);
    rig.say(B, 1, Stat { fid: Fid(1), have: Stamp(0) }.into());
    assert_eq!(closed(&rig.take()), [(B, Why::Impolite)]);
    rig.pass(Duration::from_secs(10));
    assert_eq!(rig.server.wake_at(), None);
}

#[test]
fn silence_ends_it() {
    let mut rig = two();
    rig.pass(Duration::from_secs(9));
    rig.say(A, 9, Ping {}.into());
    rig.pass(Duration::from_secs(1));
    assert_eq!(closed(&rig.take()), [(B, Why::Silent)], "A has said something, B has not");
}

#[test]
fn pings_of_many_are_answered_at_once() {
    let mut rig = two();
    let rest = rig.server.settings.pong_after;
    rig.say(A, 7, Ping {}.into());
    rig.now += rest / 2;
    rig.say(B, 8, Ping {}.into());
    assert_eq!(rig.take(), [], "not yet");
    assert_eq!(rig.server.wake_at(), Some(rig.now + rest / 2));
    rig.pass(rest / 2);
    let answers = answers(&rig.take());
    assert_eq!(answers, [(A, 7, pong_of(100)), (B, 8, pong_of(100))]);
    rig.pass(rest);
    assert_eq!(rig.take(), []);
    rig.say(A, 9, Ping {}.into());
    rig.say(A, 10, Ping {}.into());
    assert_eq!(self::answers(&rig.take()), [(A, 9, pong_of(100))], "one rests at most");
    rig.server.on_closed(A, rig.now);
    rig.pass(rest);
    assert_eq!(rig.take(), [], "and none for who is gone");
}

#[test]
fn who_says_something_now_and_then_makes_no_work_for_the_timers() {
    let mut rig = two();
    let mut wakes = 0;
    for second in 0..100 {
        rig.now += Duration::from_secs(1);
        for conn in [A, B] {
            rig.say(conn, second, Statfs {}.into());
        }
        if rig.server.wake_at().is_some_and(|at| at <= rig.now) {
            wakes += 1;
            rig.server.wake(rig.now);
        }
    }
    assert!(closed(&rig.take()).is_empty());
    assert!(wakes <= 12, "{wakes} times");
    rig.pass(Duration::from_secs(10));
    assert_eq!(closed(&rig.take()).len(), 2);
    assert_eq!(rig.server.wake_at(), None);
}

#[test]
fn out_of_turn_is_closed() {
    let mut rig = two();
    rig.say(A, 2, hello("v").into());
    assert_eq!(closed(&rig.take()), [(A, Why::OutOfTurn(1))]);
    rig.reply(
        B,
        2,
        Page {
            dir: object(),
            entries: vec![],
            more: false,
            gone: None,
            mode: Mode::Read,
            read_only: vec![],
        }
        .into(),
    );
    assert_eq!(closed(&rig.take()), [(B, Why::OutOfTurn(11))]);
}

fn object() -> super::super::message::Object {
    let attr = crate::kml::record::Attr::default();
    super::super::message::Object {
        fid: Fid(1),
        stamp: Stamp(0),
        attr,
        target: vec![],
        xattrs: vec![],
        stored: None,
    }
}

#[test]
fn a_newer_connection_of_the_same_node_replaces_the_old_one() {
    let mut rig = two();
    rig.server.on_connect(ConnId(3), rig.now);
    rig.say(ConnId(3), 1, hello("v").into());
    rig.server.on_met(ConnId(3), 1, (Seq(0), Seq(0)), rig.now);
    assert_eq!(closed(&rig.take()), [(A, Why::Replaced)]);
}

#[test]
fn requests_are_passed_on_and_answered() {
    let mut rig = two();
    rig.say(A, 7, List { dir: Fid(1), after: vec![], have: Stamp(0) }.into());
    assert!(matches!(
        &rig.take()[..],
        [Effect::Ask { conn: A, id: 7, volume: 0, node: 1, request: Message::List(_) }]
    ));
}

#[test]
fn a_batch_breaks_before_it_is_applied_and_is_acked_when_durable() {
    let mut rig = two();
    rig.give(A, &[1]);
    rig.give(B, &[1, 33]);
    rig.batch(A, 0, vec![create(1, 50)]);
    let effects = rig.take();
    assert_eq!(breaks(&effects).len(), 1);
    let (to, id, fids) = breaks(&effects)[0].clone();
    assert_eq!((to, fids), (B, vec![Fid(1)]));
    assert!(!effects.iter().any(|e| is_apply(&e)), "not before the break is answered");
    // B fetches the directory again while it is being changed
    rig.give(B, &[1]);
    rig.reply(B, id, pong());
    let effects = rig.take();
    let apply = effects.iter().find(is_apply).unwrap().clone();
    rig.applied(&apply);
    let effects = rig.take();
    let again = breaks(&effects);
    assert_eq!((again[0].0, &again[0].2), (B, &vec![Fid(1)]), "what it fetched is old");
    assert!(effects.contains(&Effect::Sync { volume: 0 }));
    rig.server.on_synced(0, Some(Stamp(101)));
    assert_eq!(acked(&rig.take()), None, "not before B knows");
    rig.reply(B, again[0].1, pong());
    let effects = rig.take();
    let stamps = vec![Stamped { fid: Fid(50), stamp: Stamp(101) }];
    let want = Acked { upto: Seq(1), stamps, conflicts: vec![], stamp: Stamp(101) };
    assert!(matches!(&effects[..], [Effect::Send { conn: A, id: 1000, answer: true, message, .. }]
        if *message == want.clone().into()));
    // A keeps its promises: it hears of B's change
    rig.batch(B, 0, vec![create(1, 51)]);
    assert_eq!(breaks(&rig.take())[0].2, [Fid(1)]);
}

#[test]
fn stamps_that_are_not_durable_are_not_told() {
    let mut rig = two();
    rig.say(A, 3, Since { stamp: Stamp(90), read_all: false }.into());
    rig.take();
    let (upto, volume) = (Stamp(105), Mode::None);
    let since = Since { stamp: Stamp(90), read_all: false }.into();
    // but on a page that is not the last: the client would never get on
    for (more, told) in [(true, upto), (false, Stamp(100))] {
        let changes = Changes { fids: vec![], upto, more, lost: false, volume };
        rig.server.on_answer(A, 3, (&since, changes.into()), &[], rig.now);
        assert!(matches!(&rig.take()[..], [Effect::Send { message: Message::Changes(c), .. }]
            if c.upto == told));
        if more {
            rig.say(A, 3, Since { stamp: told, read_all: false }.into());
            rig.take();
        }
    }
    // and from the question on, A hears of everything
    rig.batch(B, 0, vec![create(1, 50)]);
    assert_eq!(breaks(&rig.take())[0].2, [Fid(1), Fid(50)]);
}

#[test]
fn who_does_not_answer_a_break_is_dropped_and_the_batch_goes_on() {
    let mut rig = two();
    rig.give(B, &[1]);
    rig.batch(A, 0, vec![create(1, 50)]);
    assert_eq!(breaks(&rig.take()).len(), 1);
    for _ in 0..9 {
        rig.pass(Duration::from_secs(1));
        rig.say(A, 9, Ping {}.into());
        rig.say(B, 9, Ping {}.into());
    }
    let effects = rig.take();
    assert!(closed(&effects).is_empty() && !effects.iter().any(|e| is_apply(&e)));
    rig.pass(Duration::from_secs(1));
    let effects = rig.take();
    assert_eq!(closed(&effects), [(B, Why::BreakUnanswered)]);
    assert!(effects.iter().any(|e| is_apply(&e)));
}

#[test]
fn a_gap_is_refused_and_not_applied() {
    let mut rig = two();
    rig.batch(A, 5, vec![create(6, 50)]);
    assert_eq!(failed(&rig.take()), [(1005, Code::Gap)]);
    rig.batch(A, 0, vec![create(1, 50)]);
    rig.batch(A, 0, vec![create(1, 50)]);
    let effects = rig.take();
    assert_eq!(failed(&effects), [(1000, Code::Gap)], "the same batch once more");
    assert_eq!(effects.iter().filter(is_apply).count(), 1);
}

#[test]
fn records_out_of_order_are_garbage() {
    for changes in [vec![create(2, 50), create(1, 51)], vec![create(1, 50), create(1, 51)]] {
        let mut rig = two();
        rig.server.on_batch(A, 1, (Seq(0), Seq(5)), changes, rig.now);
        assert!(matches!(&closed(&rig.take())[..], [(A, Why::BadBatch(_))]));
    }
    let mut rig = two();
    rig.server.on_batch(A, 1, (Seq(0), Seq(5)), vec![create(6, 50)], rig.now);
    assert!(matches!(&closed(&rig.take())[..], [(A, Why::BadBatch(_))]));
}

#[test]
fn batches_are_applied_in_order_and_share_a_sync() {
    let mut rig = two();
    for seq in 1..=3 {
        rig.batch(A, seq - 1, vec![create(seq, 50 + seq)]);
    }
    for seq in 1..=3u64 {
        let effects = rig.take();
        let applies: Vec<&Effect> = effects.iter().filter(is_apply).collect();
        assert!(matches!(applies[..], [Effect::Apply { upto, .. }] if upto.0 == seq));
        rig.applied(applies[0]);
    }
    rig.take();
    rig.server.on_synced(0, Some(Stamp(101)));
    let effects = rig.take();
    assert_eq!(acked(&effects), Some(Seq(1)));
    assert!(effects.contains(&Effect::Sync { volume: 0 }), "one more for the other two");
    rig.server.on_synced(0, Some(Stamp(103)));
    let effects = rig.take();
    let count =
        effects.iter().filter(|e| matches!(e, Effect::Send { message: Message::Acked(_), .. }));
    assert_eq!(count.count(), 2);
    assert!(rig.server.is_idle());
}

#[test]
fn more_batches_than_allowed_are_out_of_turn() {
    let mut rig = two();
    for seq in 1..=4 {
        rig.batch(A, seq - 1, vec![create(seq, 50 + seq)]);
    }
    assert_eq!(closed(&rig.take()), [(A, Why::OutOfTurn(20))]);
}

fn reads(effects: &[Effect]) -> Vec<(u64, u64)> {
    let of = |effect: &Effect| match effect {
        Effect::Send { id, message: Message::Read(Read { at, .. }), .. } => Some((*id, *at)),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

fn data(at: u64, len: u64, token: u64) -> Message {
    Data { at, bytes: vec![0; len as usize], size: 6 * MIB, token }.into()
}

#[test]
fn large_contents_are_fetched_in_a_window() {
    let mut rig = two();
    rig.batch(A, 0, vec![store(1, 50, 6 * MIB, None), store(2, 51, 2, Some(vec![1, 2]))]);
    let mut asked = reads(&rig.take());
    assert_eq!(asked.iter().map(|r| r.1).collect::<Vec<_>>(), [0, MIB, 2 * MIB, 3 * MIB]);
    let mut kept = 0;
    while let Some((id, at)) = asked.pop() {
        rig.reply(A, id, data(at, MIB, 1));
        let effects = rig.take();
        kept += effects.iter().filter(|e| matches!(e, Effect::Spool { .. })).count();
        asked.extend(reads(&effects));
        let apply = effects.iter().find(is_apply);
        assert_eq!(apply.is_some(), kept == 6);
        if let Some(Effect::Apply { changes, .. }) = apply {
            assert_eq!(changes[0].content, Content::Spooled);
            assert_eq!(changes[1].content, Content::Inline(vec![1, 2]));
        }
    }
    assert_eq!(kept, 6);
}

#[test]
fn a_fetch_goes_on_after_a_cut() {
    let mut rig = two();
    rig.batch(A, 0, vec![store(1, 50, 6 * MIB, None)]);
    let asked = reads(&rig.take());
    rig.reply(A, asked[0].0, data(0, MIB, 1));
    rig.reply(A, asked[1].0, data(MIB, MIB, 1));
    rig.take();
    rig.server.on_closed(A, rig.now);
    rig.server.on_connect(ConnId(3), rig.now);
    rig.say(ConnId(3), 1, hello("v").into());
    rig.server.on_met(ConnId(3), 1, (Seq(0), Seq(0)), rig.now);
    rig.take();
    rig.batch(ConnId(3), 0, vec![store(1, 50, 6 * MIB, None)]);
    let asked = reads(&rig.take());
    assert_eq!(asked[0].1, 2 * MIB);
    // the file has changed meanwhile: all of it once more
    rig.reply(ConnId(3), asked[0].0, data(2 * MIB, MIB, 2));
    let effects = rig.take();
    assert!(effects.iter().any(|e| matches!(e, Effect::Unspool { .. })));
    assert_eq!(reads(&effects)[0].1, 0);
}

#[test]
fn contents_that_are_gone_are_passed_over() {
    let mut rig = two();
    rig.batch(A, 0, vec![store(1, 50, 2 * MIB, None)]);
    let asked = reads(&rig.take());
    rig.reply(A, asked[0].0, Failed { code: Code::Gone, what: String::new() }.into());
    let effects = rig.take();
    let apply = effects.iter().find(is_apply);
    assert!(matches!(apply, Some(Effect::Apply { changes, .. })
        if changes[0].content == Content::Gone));
    rig.reply(A, asked[1].0, Failed { code: Code::Gone, what: String::new() }.into());
    assert_eq!(closed(&rig.take()), []);
}

#[test]
fn a_piece_that_does_not_come_ends_the_connection() {
    let mut rig = two();
    rig.batch(A, 0, vec![store(1, 50, 2 * MIB, None)]);
    for _ in 0..30 {
        rig.pass(Duration::from_secs(1));
        rig.say(A, 9, Ping {}.into());
        rig.say(B, 9, Ping {}.into());
    }
    assert_eq!(closed(&rig.take()), [(A, Why::FetchUnanswered)]);
}

#[test]
fn no_room_fails_the_batch_and_those_behind_it() {
    let mut rig = two();
    rig.batch(A, 0, vec![create(1, 50)]);
    rig.batch(A, 1, vec![store(2, 50, 2 * MIB, None)]);
    rig.batch(A, 2, vec![create(3, 52)]);
    let apply = rig.take().iter().find(is_apply).unwrap().clone();
    let key = Key { node: 1, seq: Seq(2) };
    rig.server.on_spool_failed(0, key, (Code::NoSpace, "full"), rig.now);
    let effects = rig.take();
    assert_eq!(failed(&effects), [(1001, Code::NoSpace), (1002, Code::Gap)]);
    assert!(effects.contains(&Effect::Unspool { volume: 0, key }), "room is given back");
    rig.applied(&apply);
    rig.server.on_synced(0, Some(Stamp(101)));
    assert_eq!(acked(&rig.take()), Some(Seq(1)), "the one before is not touched");
    rig.batch(A, 1, vec![store(2, 50, 2, Some(vec![1, 2]))]);
    assert!(rig.take().iter().any(|e| is_apply(&e)), "and it may be sent again");
}

#[test]
fn a_batch_that_ends_early_is_acked_so_far() {
    let mut rig = two();
    rig.batch(A, 0, vec![create(1, 50), create(2, 51)]);
    rig.batch(A, 2, vec![create(3, 52)]);
    let effects = rig.take();
    let Some(Effect::Apply { ticket, .. }) = effects.iter().find(is_apply) else { panic!() };
    let failure = Some((Code::NoSpace, "full".into()));
    let applied = Applied { upto: Seq(1), failure, ..Applied::default() };
    rig.server.on_applied(*ticket, 0, applied, rig.now);
    assert!(!rig.take().iter().any(|e| is_apply(&e)), "nothing behind it");
    rig.server.on_synced(0, Some(Stamp(101)));
    let effects = rig.take();
    assert_eq!(acked(&effects), Some(Seq(1)));
    assert_eq!(failed(&effects), [(1002, Code::Gap)]);
    rig.batch(A, 1, vec![create(2, 51)]);
    let effects = rig.take();
    let Some(Effect::Apply { ticket, .. }) = effects.iter().find(is_apply) else { panic!() };
    let failure = Some((Code::NoSpace, "full".into()));
    rig.server.on_applied(*ticket, 0, Applied { failure, ..Applied::default() }, rig.now);
    rig.server.on_synced(0, Some(Stamp(101)));
    assert_eq!(failed(&rig.take()), [(1001, Code::NoSpace)]);
}

#[test]
fn a_failed_sync_acknowledges_nothing_ever_again() {
    let mut rig = two();
    rig.batch(A, 0, vec![create(1, 50)]);
    let apply = rig.take().iter().find(is_apply).unwrap().clone();
    rig.applied(&apply);
    rig.server.on_synced(0, None);
    assert_eq!(failed(&rig.take()), [(1000, Code::Io)]);
    rig.batch(A, 0, vec![create(1, 50)]);
    assert_eq!(failed(&rig.take()), [(1000, Code::Io)]);
}

#[test]
fn an_author_that_left_leaves_nothing_behind() {
    let mut rig = two();
    rig.give(B, &[1]);
    rig.batch(A, 0, vec![create(1, 50), store(2, 50, 3, Some(vec![1; 3]))]);
    let broken = breaks(&rig.take());
    rig.server.on_closed(A, rig.now);
    assert_eq!(rig.server.queue_len, 0);
    rig.reply(B, broken[0].1, pong());
    assert_eq!(rig.take(), []);
    assert!(rig.server.is_idle());
}

#[test]
fn what_an_author_changed_is_told_although_it_left() {
    let mut rig = two();
    rig.batch(A, 0, vec![create(1, 50)]);
    let apply = rig.take().iter().find(is_apply).unwrap().clone();
    rig.server.on_closed(A, rig.now);
    rig.give(B, &[50]);
    rig.applied(&apply);
    assert_eq!(breaks(&rig.take())[0].2, [Fid(50)]);
}

#[test]
fn a_batch_message_never_reaches_it_undecoded() {
    let mut rig = two();
    rig.say(A, 3, Batch { after: Seq(0), upto: Seq(0), items: vec![] }.into());
    assert_eq!(closed(&rig.take()), [(A, Why::OutOfTurn(20))]);
}

/// Another client, as node 3.
fn third(rig: &mut Rig) -> ConnId {
    let conn = ConnId(3);
    rig.server.on_connect(conn, rig.now);
    rig.say(conn, 1, hello("v").into());
    rig.server.on_met(conn, 3, (Seq(0), Seq(0)), rig.now);
    rig.take();
    conn
}

// Found by the simulation: seed 39 of its first version.
#[test]
fn a_change_waits_for_breaks_that_were_sent_for_another_one() {
    let mut rig = two();
    let c = third(&mut rig);
    rig.give(c, &[50]);
    rig.batch(A, 0, vec![store(1, 50, 2, Some(vec![1, 2]))]);
    let told = breaks(&rig.take());
    assert_eq!(told.len(), 1);
    rig.batch(B, 0, vec![store(1, 50, 2, Some(vec![3, 4]))]);
    assert_eq!(rig.take(), [], "the holder is told already, but it has not answered");
    rig.reply(c, told[0].1, pong());
    assert_eq!(rig.take().iter().filter(is_apply).count(), 2);
}

// Found by the simulation: seed 39 of its first version.
#[test]
fn an_author_that_comes_back_hears_of_its_change_when_all_know_of_it() {
    let mut rig = two();
    rig.batch(A, 0, vec![store(1, 50, 2, Some(vec![1, 2]))]);
    let effects = rig.take();
    rig.give(B, &[50]);
    rig.applied(effects.iter().find(is_apply).unwrap());
    let told = breaks(&rig.take());
    assert_eq!(told.len(), 1, "it has fetched the object in between");
    rig.server.on_synced(0, Some(Stamp(101)));
    let again = ConnId(3);
    rig.server.on_connect(again, rig.now);
    rig.say(again, 1, hello("v").into());
    rig.server.on_met(again, 1, (Seq(1), Seq(1)), rig.now);
    let welcome = |effects: &[Effect]| {
        let is_welcome =
            |e: &Effect| matches!(e, Effect::Send { message: Message::Welcome(_), .. });
        effects.iter().any(is_welcome)
    };
    let effects = rig.take();
    assert_eq!(closed(&effects), [(A, Why::Replaced)]);
    assert!(!welcome(&effects), "it says that the change is complete");
    rig.reply(B, told[0].1, pong());
    assert!(welcome(&rig.take()));
}

// Found by the simulation: seed 9, with permits.
#[test]
fn nothing_is_applied_whose_last_piece_could_not_be_kept() {
    let mut rig = two();
    rig.batch(A, 0, vec![store(1, 50, 5, None)]);
    let asked = reads(&rig.take());
    rig.reply(A, asked[0].0, data(0, 5, 1));
    let Some(Effect::Spool { volume, key, .. }) = rig.server.poll() else { panic!() };
    rig.server.on_spool_failed(volume, key, (Code::NoSpace, "full"), rig.now);
    let effects = rig.take();
    assert_eq!(effects.iter().filter(is_apply).count(), 0);
    assert_eq!(failed(&effects), [(1000, Code::NoSpace)]);
}

#[test]
fn of_many_that_are_told_the_last_one_opens_the_way() {
    let mut rig = rig();
    let conns: Vec<ConnId> = (1..=40).map(ConnId).collect();
    for conn in &conns {
        rig.server.on_connect(*conn, rig.now);
        rig.say(*conn, 1, hello("v").into());
        rig.server.on_met(*conn, conn.0, (Seq(0), Seq(0)), rig.now);
        rig.give(*conn, &[33, 34]);
    }
    rig.say(A, 5, Ask { fids: vec![Fid(33)] }.into());
    rig.say(B, 6, Ask { fids: vec![Fid(34)] }.into());
    let told = breaks(&rig.take());
    assert_eq!(told.len(), 2 * 39);
    let (of_a, of_b): (Vec<_>, Vec<_>) = told.into_iter().partition(|(.., f)| *f == [Fid(33)]);
    for (conn, id, _) in &of_a[1..] {
        rig.reply(*conn, *id, pong());
        assert_eq!(rig.take(), [], "others have not let go");
    }
    let (conn, id, _) = of_a[0];
    rig.reply(conn, id, pong());
    assert!(matches!(&answers(&rig.take())[..], [(A, 5, Message::Granted(_))]));
    assert_eq!(rig.server.mode(0, A, Fid(33)), Mode::Write);
    // one of those who are asked for the other leaves, and nobody waits for it
    for (conn, id, _) in &of_b[1..] {
        rig.reply(*conn, *id, pong());
    }
    assert_eq!(rig.take(), []);
    rig.say(of_b[0].0, 7, Released { kept: vec![], upto: Seq(0) }.into());
    assert!(matches!(&answers(&rig.take())[..], [(B, 6, Message::Granted(_))]));
}

#[test]
fn who_waits_for_itself_to_let_go_is_served_then() {
    let mut rig = rig();
    let c = ConnId(3);
    for conn in [A, B, c] {
        rig.server.on_connect(conn, rig.now);
        rig.say(conn, 1, hello("v").into());
        rig.server.on_met(conn, conn.0, (Seq(0), Seq(0)), rig.now);
        rig.give(conn, &[33]);
    }
    rig.say(A, 5, Ask { fids: vec![Fid(33)] }.into());
    let told = breaks(&rig.take());
    assert_eq!(told.len(), 2, "B and C");
    // B reads it again meanwhile, and A, for whom it let go, leaves: C is not waited for
    let request = Stat { fid: Fid(33), have: Stamp(0) }.into();
    rig.server.on_answer(B, 9, (&request, pong()), &[Fid(33)], rig.now);
    rig.server.on_closed(A, rig.now);
    assert_eq!(rig.take(), []);
    rig.reply(B, told[0].1, pong());
    assert!(matches!(&rig.take()[..], [Effect::Ask { conn: B, id: 9, .. }]));
}
