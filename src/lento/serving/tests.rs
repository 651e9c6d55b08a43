//! Volumes that come, go and change, in virtual time.

use std::time::Duration;

use super::super::message::{Ask, Message, Recall, Released, Since, VERSION};
use super::super::server::{Effect, Settings};
use super::*;
use crate::kml::record::{Fid, Stamp};

const A: ConnId = ConnId(1);
const B: ConnId = ConnId(2);
const LATE: Duration = Duration::from_secs(15);

struct Rig {
    server: Server,
    now: Instant,
}

fn hello(volume: &str, id: u8, pending: u64) -> Hello {
    Hello {
        version: VERSION,
        volume: volume.into(),
        incarnation: [1; 16],
        node: 0,
        volume_id: [id; 16],
        host: "h".into(),
        locks: false,
        room: None,
        pending: Seq(pending),
        keeps: false,
    }
}

/// Two volumes, `v` (7) and `w` (8).
fn rig() -> Rig {
    let mut server = Server::new(Settings::default());
    assert_eq!(server.add_volume("v", [7; 16], Stamp(100)), 0);
    assert_eq!(server.add_volume("w", [8; 16], Stamp(100)), 1);
    Rig { server, now: Instant::now() }
}

impl Rig {
    fn say(&mut self, conn: ConnId, id: u64, answer: bool, message: impl Into<Message>) {
        self.server.on_message(conn, id, answer, message.into(), self.now);
    }
    /// Comes with so many records, of which the server has so many; may change all of its volume.
    fn come(&mut self, conn: ConnId, volume: &str, (pending, acked): (u64, u64)) {
        self.server.on_connect(conn, self.now);
        self.say(conn, 1, false, hello(volume, 0, pending));
        self.server.on_met(conn, conn.0, (Seq(acked), Seq(acked)), self.now);
        self.say(conn, 2, false, Since { stamp: Stamp(0), read_all: false });
        self.take();
    }
    fn take(&mut self) -> Vec<Effect> {
        std::iter::from_fn(|| self.server.poll()).collect()
    }
    fn sent(&mut self) -> Vec<(ConnId, u64, Message)> {
        let of = |effect| match effect {
            Effect::Send { conn, id, message, .. } => Some((conn, id, message)),
            _ => None,
        };
        self.take().into_iter().filter_map(of).collect()
    }
    fn closed(&mut self) -> Vec<(ConnId, Why)> {
        let of = |effect| match effect {
            Effect::Close { conn, why } => Some((conn, why)),
            _ => None,
        };
        self.take().into_iter().filter_map(of).collect()
    }
    /// The recall of a whole volume that has gone out.
    fn recall(&mut self) -> (ConnId, u64) {
        let whole =
            |m: &Message| matches!(m, Message::Recall(Recall { fids, .. }) if fids.is_empty());
        let found = self.sent().into_iter().find(|(_, _, message)| whole(message));
        found.map(|(conn, id, _)| (conn, id)).unwrap()
    }
    fn freeze(&mut self, forced: bool) {
        self.server.begin_freeze(0, self.now + LATE, forced, self.now);
    }
    fn poll(&mut self) -> Option<Result<(), Vec<Owing>>> {
        self.server.poll_freeze(0, self.now)
    }
    fn code(&mut self) -> Option<Code> {
        let sent = self.sent();
        sent.into_iter().find_map(|(_, _, message)| match message {
            Message::Failed(failed) => Some(failed.code),
            _ => None,
        })
    }
}

#[test]
fn a_cache_finds_its_volume_under_its_old_name() {
    let mut rig = rig();
    rig.server.rename_volume(0, "new", &["v".to_owned()]);
    let of = |volume: &str, id: u8| rig.server.meant_by(&hello(volume, id, 0));
    assert_eq!(of("new", 0), Ok(0));
    assert_eq!(of("new", 7), Ok(0));
    assert_eq!(of("v", 7), Ok(0), "the cache knows the volume by the name it had");
    assert_eq!(of("v", 0).unwrap_err().0, Code::UnknownVolume, "who has no cache does not");
    assert_eq!(of("v", 8).unwrap_err().0, Code::UnknownVolume);
    assert_eq!(of("w", 7).unwrap_err().0, Code::ForeignCache, "a name it never had");
    // another volume gets the name: each cache still finds its own
    rig.server.rename_volume(1, "v", &["w".to_owned()]);
    let of = |volume: &str, id: u8| rig.server.meant_by(&hello(volume, id, 0)).ok();
    assert_eq!(
        (of("v", 7), of("v", 8), of("v", 0), of("w", 8)),
        (Some(0), Some(1), Some(1), Some(1))
    );
}

#[test]
fn a_removed_volume_is_a_hole() {
    let mut rig = rig();
    rig.come(A, "v", (0, 0));
    rig.come(B, "w", (0, 0));
    rig.server.remove_volume(0, rig.now);
    assert_eq!(rig.closed(), [(A, Why::Removed)]);
    let (code, what) = rig.server.meant_by(&hello("v", 7, 0)).unwrap_err();
    assert_eq!(code, Code::UnknownVolume);
    assert!(what.contains("not served any more") && what.contains("there are: w"), "{what}");
    assert_eq!(rig.server.meant_by(&hello("", 0, 0)), Ok(1), "the only one that is left");
    assert_eq!(rig.server.add_volume("v", [9; 16], Stamp(0)), 2, "its number is not used again");
    assert_eq!(rig.server.meant_by(&hello("v", 0, 0)), Ok(2));
    rig.now += Duration::from_secs(60);
    rig.server.wake(rig.now);
    assert_eq!(rig.server.clients().len(), 0);
}

#[test]
fn read_only_waits_for_what_is_done() {
    let mut rig = rig();
    rig.come(A, "v", (0, 0));
    rig.freeze(false);
    let (conn, id) = rig.recall();
    assert_eq!((conn, rig.poll()), (A, None));
    // B asks meanwhile, and waits for what comes of it
    rig.come(B, "v", (0, 0));
    rig.say(B, 9, false, Ask { fids: vec![Fid(5)] });
    assert_eq!(rig.code(), None);
    rig.say(A, id, true, Released { kept: vec![], upto: Seq(0) });
    assert_eq!(rig.code(), Some(Code::ReadOnly));
    assert!(!rig.server.is_read_only(0), "not yet");
    assert_eq!(rig.poll(), Some(Ok(())));
    assert!(rig.server.is_read_only(0));
    assert_eq!(rig.closed(), [(A, Why::Changed), (B, Why::Changed)], "to hear of it");
    rig.come(A, "v", (0, 0));
    assert_eq!(rig.server.clients()[0].mode, Mode::Read);
    rig.server.on_batch(A, 50, (Seq(0), Seq(0)), Vec::new(), rig.now);
    assert_eq!(rig.code(), Some(Code::ReadOnly));
    rig.server.set_read_only(0, false, rig.now);
    rig.now += Duration::from_secs(20); // ghosts
    rig.server.wake(rig.now);
    rig.come(A, "v", (0, 0));
    assert_eq!(rig.server.clients()[0].mode, Mode::Write);
}

#[test]
fn who_does_not_ship_stands_against_it() {
    let mut rig = rig();
    rig.come(A, "v", (5, 2)); // it says that it has three records more
    rig.freeze(false);
    let (_, id) = rig.recall();
    rig.say(A, id, true, Released { kept: vec![], upto: Seq(0) });
    assert_eq!(rig.poll(), None);
    rig.now += LATE;
    let owing = Owing { node: 1, host: "h".into(), records: 3, connected: true };
    assert_eq!(rig.poll(), Some(Err(vec![owing])));
    assert!(!rig.server.is_read_only(0));
    assert_eq!(rig.closed(), [], "as if nothing had been");
    rig.say(A, 7, false, Ask { fids: vec![Fid(5)] });
    assert_eq!(rig.code(), None);
    // it goes away with them: that is remembered
    rig.server.on_closed(A, rig.now);
    rig.now += Duration::from_secs(11);
    rig.server.wake(rig.now);
    rig.freeze(false);
    let owing = Owing { node: 1, host: "h".into(), records: 3, connected: false };
    assert_eq!(rig.poll(), Some(Err(vec![owing.clone()])));
    assert_eq!(rig.server.owing(0), [owing]);
    rig.freeze(true);
    assert_eq!(rig.poll(), Some(Ok(())));
    assert!(rig.server.is_read_only(0));
    // and forgotten when it is back with all shipped
    rig.come(A, "v", (5, 5));
    assert_eq!(rig.server.owing(0), []);
}

#[test]
fn who_is_cut_off_with_a_right_may_have_changes() {
    let mut rig = rig();
    rig.come(A, "v", (0, 0));
    rig.server.on_closed(A, rig.now);
    let owing = Owing { node: 1, host: "h".into(), records: 0, connected: false };
    assert_eq!(rig.server.owing(0), std::slice::from_ref(&owing));
    rig.freeze(false);
    assert_eq!(rig.poll(), None, "its lease is not over");
    rig.now += Duration::from_secs(11);
    rig.server.wake(rig.now);
    assert_eq!(rig.poll(), Some(Err(vec![owing])));
    // who takes his leave has nothing more
    rig.come(B, "v", (0, 0));
    rig.come(A, "v", (0, 0));
    rig.say(A, 5, false, Released { kept: vec![], upto: Seq(0) });
    rig.server.on_closed(A, rig.now);
    assert!(rig.server.owing(0).iter().all(|owing| owing.node != 1));
}

#[test]
fn a_freeze_that_is_not_answered_ends() {
    let mut rig = rig();
    rig.come(A, "v", (0, 0));
    rig.freeze(true);
    rig.recall();
    assert_eq!(rig.poll(), None);
    rig.now += LATE;
    assert_eq!(rig.poll(), Some(Ok(())), "forced");
    rig.server.set_read_only(0, false, rig.now);
    rig.take();
    rig.come(B, "v", (0, 0));
    rig.freeze(false);
    rig.now += LATE;
    assert!(matches!(rig.poll(), Some(Err(_))), "a ghost is in the way, or B");
}
