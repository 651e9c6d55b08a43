//! The loop against a server that is written out line by line, over a real pair of sockets.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::kml::codec::{self, Outcome};
use crate::kml::log::Log;
use crate::kml::record::{Attr, Name, Op, Origin, Place, ROOT, Range, Record, Stamp, Time};
use crate::lento::message::*;
use crate::lento::rights::Mode;
use crate::net::conn::{Conn, Incoming, Lane};
use crate::net::poll::{Stream, Token};
use crate::replica::meta::Meta;
use crate::replica::state::{Facts as StateFacts, State};
use crate::replica::tree::Tree;
use crate::sys::cred::{self, Caller};

const SOON: Duration = Duration::from_secs(10);
const NODE: u32 = 3;

/// Notes what it is told, and is done at once.
struct Notes(Arc<Mutex<Vec<Notice>>>);

impl Notify for Notes {
    fn stale(&mut self, what: Vec<Notice>, done: Box<dyn FnOnce() + Send>) {
        self.0.lock().unwrap().extend(what);
        done();
    }
}

struct Rig {
    dir: tempfile::TempDir,
    cache: Arc<Cache>,
    handle: Handle,
    notices: Arc<Mutex<Vec<Notice>>>,
    accepted: crossbeam_channel::Receiver<UnixStream>,
}

/// The server's end of a connection.
struct Served {
    event_loop: Loop,
    conn: Conn,
    got: std::collections::VecDeque<Incoming>,
}

impl Served {
    fn next(&mut self) -> Incoming {
        let (until, mut events) = (Instant::now() + SOON, Vec::new());
        loop {
            match self.got.pop_front() {
                Some(Incoming { id, answer: false, message: Message::Ping(_) }) => {
                    self.send(id, true, Pong { stamp: Stamp(0) });
                }
                Some(got) => return got,
                None => {
                    assert!(Instant::now() < until, "the client says nothing");
                    self.conn.flush().unwrap();
                    self.event_loop.wait(Some(Duration::from_millis(5)), &mut events).unwrap();
                    self.got.extend(self.conn.read().unwrap());
                }
            }
        }
    }
    fn send(&mut self, id: u64, answer: bool, message: impl Into<Message>) {
        self.conn.send(Lane::Foreground, id, answer, &message.into()).unwrap();
        self.conn.flush().unwrap();
    }
    /// Greets, and says that nothing has changed.
    fn greet(&mut self, acked: u64) {
        let hello = self.next();
        assert!(matches!(hello.message, Message::Hello(_)));
        let (volume_id, volume) = ([9; 16], "v".to_owned());
        let (acked, stamp) = (Seq(acked), Stamp(40));
        let version = VERSION;
        self.send(
            hello.id,
            true,
            Welcome {
                version,
                volume_id,
                node: NODE,
                acked,
                stamp,
                volume,
                seen: acked,
                read_only: false,
                room: None,
            },
        );
        let since = self.next();
        assert!(matches!(since.message, Message::Since(_)), "{since:?}");
        let changes =
            Changes { fids: vec![], upto: Stamp(40), more: false, lost: false, volume: Mode::Read };
        self.send(since.id, true, changes);
    }
}

fn rig(connects: bool) -> Rig {
    let (give, accepted) = crossbeam_channel::unbounded();
    let peer = Peer::Embedded(Box::new(move || {
        if !connects {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        give.send(theirs).map_err(|_| std::io::ErrorKind::ConnectionRefused)?;
        Ok(ours)
    }));
    rig_of(peer, accepted)
}

fn rig_of(peer: Peer, accepted: crossbeam_channel::Receiver<UnixStream>) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    std::fs::create_dir(at("tree")).unwrap();
    let tree = Tree::open(&at("tree"), &at("index"), true).unwrap();
    let log = Log::open_or_create(&at("kml"), 0, 77, crate::kml::log::Options::default()).unwrap();
    let state = State::open(&at("state"), || StateFacts::new("v", "", 0, 0)).unwrap();
    let cache = Arc::new(Cache::new(tree, log, state, &at("limbo")).unwrap());
    let notices = Arc::new(Mutex::new(Vec::new()));
    let options = Options { age: Duration::from_millis(20), ..Options::default() };
    let handle = start(cache.clone(), peer, options, Box::new(Notes(notices.clone()))).unwrap();
    Rig { dir, cache, handle, notices, accepted }
}

impl Served {
    fn new(mut stream: Stream) -> Served {
        let event_loop = Loop::new().unwrap();
        event_loop.add_stream(&mut stream, Token(1)).unwrap();
        Served { event_loop, conn: Conn::new(stream, false), got: Default::default() }
    }
}

impl Rig {
    fn accept(&self) -> Served {
        Served::new(Stream::from_unix(self.accepted.recv_timeout(SOON).unwrap()).unwrap())
    }
    fn want(&self, want: Want) -> crossbeam_channel::Receiver<Result<(), Unmet>> {
        let (tell, told) = crossbeam_channel::bounded(1);
        self.handle.want(want, Box::new(move |how| tell.send(how).unwrap()));
        told
    }
    fn journal(&self, op: Op) -> Seq {
        let origin = Origin::default();
        let record = Record { time_ns: 5, origin, uid: 0, gid: 0, path: vec![], op };
        let ticket = self.cache.append(&record).unwrap();
        let seq = ticket.seq;
        self.cache.settle(ticket, Outcome::Done);
        seq
    }
    fn create(&self, n: &str, fid: u64, bytes: &[u8]) -> Seq {
        let name = Name::new(n.as_bytes()).unwrap();
        let (fid, root) = (Fid(fid), self.cache.tree.root().clone());
        let at = Place { dir: ROOT, base: Stamp(0), name: name.clone() };
        self.journal(Op::Create { at, fid, mode: 0o644, umask: 0 });
        let by = Caller { uid: cred::own().0, gid: cred::own().1, umask: 0 };
        let when = Time::default();
        let meta = Meta { epoch: self.cache.epoch(), ..Meta::whole(fid) };
        self.cache.tree.create(&root, &name, by, 0o644, &meta, when).unwrap();
        std::fs::write(self.dir.path().join("tree").join(n), bytes).unwrap();
        let (base, size, old_size) = (Stamp(0), bytes.len() as u64, 0);
        let ranges = vec![Range { at: 0, len: size }];
        self.journal(Op::Store { fid, base, size, mtime: when, ranges, old_size })
    }
}

fn object(fid: Fid, mode: u32, size: u64) -> Object {
    let (uid, gid) = cred::own();
    let (atime, mtime) = (Time::default(), Time { sec: 77, nsec: 5 });
    let attr = Attr { mode, uid, gid, nlink: 1, rdev: 0, size, atime, mtime };
    Object { fid, stamp: Stamp(30), attr, target: vec![], xattrs: vec![], stored: None }
}

#[test]
fn fetches_ships_and_forgets_what_is_broken() {
    let rig = rig(true);
    let mut served = rig.accept();
    served.greet(0);
    rig.handle.first_contact(SOON).unwrap();
    assert_eq!(rig.handle.status().node, NODE);
    assert!(rig.cache.is_online());

    let listed = rig.want(Want::Dir(ROOT));
    let list = served.next();
    let file = Fid::new(0, 5);
    let entries = vec![Entry { name: b"f".to_vec(), object: object(file, 0o100644, 6) }];
    let dir = object(ROOT, 0o040755, 0);
    served.send(
        list.id,
        true,
        Page { dir, entries, more: false, gone: None, mode: Mode::Read, read_only: vec![] },
    );
    assert_eq!(listed.recv_timeout(SOON).unwrap(), Ok(()));
    let read = rig.want(Want::Bytes { fid: file, at: 2, len: 1 });
    let ask = served.next();
    let want = Read { fid: file, at: 0, len: 6, stamp: Stamp(30) };
    assert_eq!(ask.message, want.into());
    served.send(ask.id, true, Data { at: 0, bytes: b"abcdef".to_vec(), size: 6, token: 1 });
    assert_eq!(read.recv_timeout(SOON).unwrap(), Ok(()));
    assert_eq!(std::fs::read(rig.dir.path().join("tree/f")).unwrap(), b"abcdef");
    let again = rig.want(Want::Bytes { fid: file, at: 0, len: 6 });
    assert_eq!(again.recv_timeout(SOON).unwrap(), Ok(()), "all is here");

    served.send(500, false, Break { fids: vec![file] });
    let pong = served.next();
    assert!(pong.answer && pong.id == 500 && matches!(pong.message, Message::Pong(_)));
    let told = Notice::Object { fid: file, dir: false };
    assert!(rig.notices.lock().unwrap().contains(&told));
    assert!(!rig.cache.valid(&rig.cache.tree.find(file).unwrap().2));

    let big = vec![3; INLINE_LEN_MAX + 1];
    rig.create("small", Fid::new(NODE, 2).0, b"small");
    let last = rig.create("big", Fid::new(NODE, 3).0, &big);
    let synced = rig.handle.ship_now();
    assert_eq!(synced, last);
    let mut upto = Seq(0);
    let mut datas = Vec::new();
    while upto < last {
        let batch = served.next();
        let Message::Batch(b) = batch.message else { panic!("{:?}", batch.message) };
        assert_eq!(b.after, upto, "no gap");
        upto = b.upto;
        for item in b.items {
            let (_, record) = codec::decode_wire(&item.record).unwrap();
            if let Op::Store { fid, .. } = record.op {
                datas.push((fid, item.data));
            }
        }
        let stamp = Stamp(50 + upto.0);
        let stamps = vec![Stamped { fid: Fid::new(NODE, 2), stamp }];
        served.send(batch.id, true, Acked { upto, stamps, conflicts: vec![], stamp });
    }
    let want = [(Fid::new(NODE, 2), Some(b"small".to_vec())), (Fid::new(NODE, 3), None)];
    assert_eq!(datas, want);
    served.send(600, false, Read { fid: Fid::new(NODE, 3), at: 10, len: 1 << 20, stamp: Stamp(0) });
    let data = served.next();
    let Message::Data(data) = data.message else { panic!("{:?}", data.message) };
    assert_eq!((data.at, data.bytes.len(), data.size), (10, big.len() - 10, big.len() as u64));
    served.send(601, false, Read { fid: Fid(999), at: 0, len: 10, stamp: Stamp(0) });
    assert!(matches!(served.next().message, Message::Failed(Failed { code: Code::Gone, .. })));

    assert!(rig.handle.shutdown(SOON), "nothing pends");
    assert_eq!((rig.cache.acked(), rig.handle.acked()), (last, last));
    assert!(rig.cache.current_stamp() >= Stamp(50));
    let stamp = rig.cache.tree.find(Fid::new(NODE, 2)).unwrap().2.stamp;
    assert!(stamp > Stamp(50));
    assert_eq!(rig.want(Want::Dir(ROOT)).recv_timeout(SOON).unwrap(), Err(Unmet::Unreachable));
}

#[test]
fn a_broken_connection_is_made_again_and_nothing_is_lost() {
    let rig = rig(true);
    rig.accept().greet(0);
    let (tell, told) = crossbeam_channel::bounded(1);
    let mut served = rig.accept();
    served.greet(0);
    let last = rig.create("f", Fid::new(NODE, 2).0, b"x");
    rig.handle.wait_acked(last, Box::new(move |how| tell.send(how).unwrap()));
    let batch = served.next();
    assert!(matches!(batch.message, Message::Batch(_)));
    drop(served);
    let listed = rig.want(Want::Dir(ROOT));
    let mut served = rig.accept();
    served.greet(0);
    let mut acked = false;
    while !acked || told.is_empty() {
        let got = served.next();
        match got.message {
            Message::List(_) => {
                let dir = object(ROOT, 0o040755, 0);
                served.send(
                    got.id,
                    true,
                    Page {
                        dir,
                        entries: vec![],
                        more: false,
                        gone: None,
                        mode: Mode::Read,
                        read_only: vec![],
                    },
                );
            }
            Message::Batch(b) => {
                assert_eq!(b.after, Seq(0), "from where the server stands");
                let (upto, stamp) = (b.upto, Stamp(60));
                served.send(got.id, true, Acked { upto, stamps: vec![], conflicts: vec![], stamp });
                acked = upto == last;
                if acked {
                    assert_eq!(told.recv_timeout(SOON).unwrap(), Ok(()));
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(listed.recv_timeout(SOON).unwrap(), Ok(()));
    assert!(rig.dir.path().join("tree/f").exists(), "own and unshipped when it was listed");
    assert!(rig.handle.shutdown(SOON));
}

#[test]
fn refusals_and_silence_have_their_names() {
    let refused = rig(true);
    let mut served = refused.accept();
    let hello = served.next();
    served.send(hello.id, true, Refused { code: Code::UnknownVolume, what: "no v here".into() });
    let (server, volume) = ("local".to_owned(), "v".to_owned());
    let want = Err(FirstContact::UnknownVolume { server, volume });
    assert_eq!(refused.handle.first_contact(SOON), want);
    assert!(!refused.handle.shutdown(Duration::ZERO) || refused.cache.pending().is_empty());

    let away = rig(false);
    let begun = Instant::now();
    let contact = away.handle.first_contact(Duration::from_millis(300));
    assert!(matches!(contact, Err(FirstContact::Unreachable { .. })), "{contact:?}");
    assert!(begun.elapsed() < Duration::from_secs(2));
    let space = away.handle.space();
    assert!(space.blocks > 0, "the cache's own, before the server said anything");
    away.create("f", Fid::new(NODE, 2).0, b"x");
    assert!(!away.handle.shutdown(Duration::from_millis(50)), "it still pends");
    assert_eq!(away.handle.status().pending_count, 2);
}

#[test]
fn every_waiter_is_told_at_the_end() {
    let rig = rig(true);
    let served = rig.accept();
    let ended = Arc::new(AtomicUsize::new(0));
    for k in 0..50 {
        let ended = ended.clone();
        let then = move |how| {
            assert_eq!(how, Err(Unmet::Unreachable));
            ended.fetch_add(1, Ordering::Relaxed);
        };
        rig.handle.want(Want::Object(Fid(k)), Box::new(then));
    }
    rig.handle.shutdown(Duration::ZERO);
    drop(served);
    assert_eq!(ended.load(Ordering::Relaxed), 50);
}

#[test]
fn garbage_ends_the_connection_and_not_the_client() {
    let rig = rig(true);
    let mut served = rig.accept();
    let hello = served.next();
    served.send(hello.id, true, Pong { stamp: Stamp(1) });
    let mut served = rig.accept();
    std::io::Write::write_all(served.conn.stream(), &[0xff; 200]).unwrap();
    rig.accept().greet(0);
    // A known cache is told of the failed attempts, and then of the one that went well.
    let until = Instant::now() + SOON;
    while rig.handle.first_contact(SOON).is_err() {
        assert!(Instant::now() < until, "the third attempt is a good one");
    }
    rig.handle.shutdown(Duration::ZERO);
}

#[test]
fn a_server_is_found_by_name_and_a_closed_port_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (_, none) = crossbeam_channel::unbounded();
    let rig = rig_of(Peer::Tcp("localhost".into(), port), none.clone());
    for _ in 0..2 {
        let stream = Stream::from_tcp(listener.accept().unwrap().0).unwrap();
        let mut served = Served::new(stream);
        served.greet(0);
        rig.handle.first_contact(SOON).unwrap();
    }
    drop(listener);
    rig.handle.shutdown(Duration::ZERO);
    let away = rig_of(Peer::Tcp("127.0.0.1".into(), port), none.clone());
    let Err(FirstContact::Unreachable { server, what }) =
        away.handle.first_contact(Duration::from_millis(500))
    else {
        panic!("nobody listens there");
    };
    assert_eq!(server, format!("127.0.0.1:{port}"));
    assert!(what.contains("refused"), "{what}");
    away.handle.shutdown(Duration::ZERO);
}

#[test]
fn who_asks_for_a_lock_is_told_in_any_case() {
    use crate::lento::locks::{Denied, LockKind};
    let rig = rig(true);
    let mut served = rig.accept();
    served.greet(0);
    rig.handle.first_contact(SOON).unwrap();
    let ask = |wait| LockAsk {
        fid: Fid(70),
        owner: 5,
        flock: false,
        start: 0,
        end: 9,
        kind: LockKind::Write,
        pid: 9,
        wait,
        test: false,
    };
    let lock = |wait| {
        let (tell, told) = crossbeam_channel::bounded(1);
        let number = rig.handle.lock(ask(wait), Box::new(move |how| tell.send(how).unwrap()));
        (number, told)
    };
    let (_, told) = lock(false);
    let claim = served.next();
    assert_eq!(claim.message, Claim { fresh: true, locks: vec![] }.into());
    served.send(claim.id, true, Claimed { lost: vec![] });
    let asked = served.next();
    assert_eq!(asked.message, ask(false).into());
    served.send(asked.id, true, LockAnswer { why: None, held: None, others: false });
    assert_eq!(told.recv_timeout(SOON).unwrap(), Ok(None));

    let (number, told) = lock(true);
    let asked = served.next();
    rig.handle.cancel_lock(number);
    assert_eq!(served.next().message, LockCancel { id: asked.id }.into());
    let why = Some(Denied::Interrupted);
    served.send(asked.id, true, LockAnswer { why, held: None, others: true });
    assert_eq!(told.recv_timeout(SOON).unwrap(), Err(Denied::Interrupted));

    let (_, told) = lock(true);
    served.next();
    rig.handle.shutdown(Duration::ZERO);
    assert_eq!(told.recv_timeout(SOON).unwrap(), Err(Denied::Away), "nobody waits for ever");
    assert_eq!(lock(false).1.recv_timeout(SOON).unwrap(), Err(Denied::Away));
}

#[test]
fn any_figures_of_the_servers_can_be_shown() {
    let most = u64::MAX;
    let (blocks, files) = (most, most);
    let said = Space {
        block_len: 1,
        blocks,
        blocks_free: most,
        blocks_available: most,
        files,
        files_free: most,
    };
    assert_eq!(with_own(said, Room::new(most, most)), said);
    let none = Space { block_len: 0, blocks_available: 3, blocks_free: 3, ..said };
    assert_eq!(with_own(none, Room::new(9, 9)), none);
    let some = Space { block_len: 4, blocks_available: 3, ..said };
    assert_eq!(with_own(some, Room::new(9, 9)).blocks_available, 5);
}
