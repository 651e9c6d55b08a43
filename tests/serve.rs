//! `imz serve` for real: a process, a port, and a client that speaks the protocol by hand.

#![allow(clippy::unwrap_used)] // tests: it is the message

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use imz::kml::codec::encode_wire;
use imz::kml::record::{Fid, Name, Op, Origin, Place, ROOT, Range, Record, Seq, Stamp, Time};
use imz::lento::message::{self as msg, Code, Message, VERSION};
use imz::net::conn::{Conn, Fault, Incoming, Lane};
use imz::net::poll::Stream;
use imz::net::server::{Embedded, Export, Server};

const PATIENCE: Duration = Duration::from_secs(20);

/// A server process; killed when dropped.
struct Serving {
    child: Child,
    addr: SocketAddr,
    /// what it said until it was ready
    said: String,
}

fn imz() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_imz"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn serve(dir: &Path) -> Serving {
    let mut command = imz();
    command.args(["serve", "--listen", "127.0.0.1:0"]).arg(format!("v={}", dir.display()));
    start(command)
}

fn start(mut command: Command) -> Serving {
    let mut child = command.spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains(" on 127.0.0.1:") {
        let count = stderr.read_line(&mut said).unwrap();
        assert!(count > 0, "it ended: {said}");
    }
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut stderr, &mut std::io::stderr());
    });
    let addr = said.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
    Serving { child, addr, said }
}

impl Serving {
    fn client(&self, incarnation: u8) -> Raw {
        let mut raw = Raw::connect(self.addr);
        raw.hello(incarnation);
        raw
    }
    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
    fn wait(&mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that does nothing by itself but answer pings.
struct Raw {
    conn: Conn,
    id: u64,
    waiting: VecDeque<Incoming>,
}

impl Raw {
    fn connect(addr: SocketAddr) -> Raw {
        let stream = TcpStream::connect(addr).unwrap();
        Raw::over(Stream::from_tcp(stream).unwrap())
    }
    fn over(stream: Stream) -> Raw {
        Raw { conn: Conn::new(stream, false), id: 0, waiting: VecDeque::new() }
    }
    fn send(&mut self, id: u64, answer: bool, message: Message) {
        self.conn.send(Lane::Foreground, id, answer, &message).unwrap();
        self.conn.flush().unwrap();
    }
    fn request(&mut self, message: impl Into<Message>) -> u64 {
        self.id += 1;
        self.send(self.id, false, message.into());
        self.id
    }
    /// The first message that fits; others wait.
    fn get(&mut self, fits: impl Fn(&Incoming) -> bool) -> Result<Incoming, Fault> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.waiting.iter().position(&fits) {
                return Ok(self.waiting.remove(at).unwrap());
            }
            assert!(Instant::now() < until, "nothing came but {:?}", self.waiting);
            self.conn.flush()?;
            for incoming in self.conn.read()? {
                if let (Message::Ping(_), false) = (&incoming.message, incoming.answer) {
                    self.send(incoming.id, true, msg::Pong { stamp: Stamp(0) }.into());
                } else {
                    self.waiting.push_back(incoming);
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    fn answer(&mut self, id: u64) -> Message {
        self.get(|incoming| incoming.answer && incoming.id == id).unwrap().message
    }
    fn call(&mut self, message: impl Into<Message>) -> Message {
        let id = self.request(message);
        self.answer(id)
    }
    fn hello(&mut self, incarnation: u8) -> msg::Welcome {
        match self.call(greeting("v", incarnation)) {
            Message::Welcome(welcome) => welcome,
            other => panic!("{other:?}"),
        }
    }
    fn list(&mut self) -> msg::Page {
        match self.call(msg::List { dir: ROOT, after: vec![], have: Stamp(0) }) {
            Message::Page(page) => page,
            other => panic!("{other:?}"),
        }
    }
    /// The next break, which is not answered yet.
    fn broken(&mut self) -> (u64, Vec<Fid>) {
        let is_break = |i: &Incoming| matches!(i.message, Message::Break(_));
        match self.get(is_break).unwrap() {
            Incoming { id, answer: false, message: Message::Break(it) } => (id, it.fids),
            other => panic!("{other:?}"),
        }
    }
    fn pong(&mut self, id: u64) {
        self.send(id, true, msg::Pong { stamp: Stamp(0) }.into());
    }
}

fn greeting(volume: &str, incarnation: u8) -> msg::Hello {
    msg::Hello {
        version: VERSION,
        volume: volume.into(),
        incarnation: [incarnation; 16],
        node: 0,
        volume_id: [0; 16],
        host: "test".into(),
        pending: Seq(0),
        keeps: false,
        locks: false,
        room: None,
    }
}

fn item(seq: u64, op: Op, data: Option<Vec<u8>>) -> msg::Item {
    let (uid, gid) = imz::sys::cred::own();
    let time_ns = 1_700_000_000_000_000_000;
    let record = Record { time_ns, origin: Origin::default(), uid, gid, path: vec![], op };
    msg::Item { record: encode_wire(&record, Seq(seq)).unwrap(), data }
}

fn create(seq: u64, name: &str, fid: Fid) -> msg::Item {
    let at = Place { dir: ROOT, base: Stamp(0), name: Name::new(name.as_bytes()).unwrap() };
    item(seq, Op::Create { at, fid, mode: 0o644, umask: 0 }, None)
}

fn store(seq: u64, fid: Fid, size: u64, data: Option<Vec<u8>>) -> msg::Item {
    let ranges = vec![Range { at: 0, len: size }];
    let (base, mtime) = (Stamp(0), Time { sec: 1000, nsec: 7 });
    item(seq, Op::Store { fid, base, size, mtime, ranges, old_size: 0 }, data)
}

fn batch(after: u64, items: Vec<msg::Item>) -> msg::Batch {
    let upto = Seq(after + items.len() as u64);
    msg::Batch { after: Seq(after), upto, items }
}

fn acked(message: Message) -> msg::Acked {
    match message {
        Message::Acked(acked) => acked,
        other => panic!("{other:?}"),
    }
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let at = tempfile::tempdir().unwrap();
    let dir = at.path().join("v");
    std::fs::create_dir(&dir).unwrap();
    (at, dir)
}

#[test]
fn a_directory_is_listed_and_read() {
    let (_at, dir) = scratch();
    std::fs::write(dir.join("hello"), "hello, world").unwrap();
    let serving = serve(&dir);
    assert!(serving.said.starts_with("imz: serving /") && serving.said.contains(" as /v on "));
    let mut client = Raw::connect(serving.addr);
    let welcome = client.hello(1);
    assert_eq!((welcome.node, welcome.acked, &welcome.volume[..]), (1, Seq(0), "v"));
    let page = client.list();
    assert_eq!((page.dir.fid, page.entries.len(), page.more), (ROOT, 1, false));
    assert_eq!(page.entries[0].name, b"hello");
    let fid = page.entries[0].object.fid;
    let read = msg::Read { fid, at: 7, len: 100, stamp: Stamp(0) };
    let Message::Data(data) = client.call(read.clone()) else { panic!() };
    assert_eq!((&data.bytes[..], data.size), (&b"world"[..], 12));
    let Message::Failed(failed) = client.call(msg::Read { stamp: Stamp(9), ..read }) else {
        panic!()
    };
    assert_eq!(failed.code, Code::Moved);
    let Message::Failed(failed) = client.call(msg::Stat { fid: Fid(12345), have: Stamp(0) }) else {
        panic!()
    };
    assert_eq!(failed.code, Code::Gone);
    let Message::Space(space) = client.call(msg::Statfs {}) else { panic!() };
    assert!(space.block_len > 0 && space.blocks >= space.blocks_free);
    let Message::Changes(changes) = client.call(msg::Since { stamp: Stamp(0), read_all: false })
    else {
        panic!()
    };
    assert_eq!((changes.fids, changes.more, changes.lost), (vec![], false, false));
    // a record of the protocol's future is refused, and does no harm
    client.id += 1;
    let frame = imz::net::frame::Frame { op: 200, answer: false, id: client.id, body: vec![] };
    client.conn.stream().write_all(&frame.encode(false).unwrap()).unwrap();
    assert!(matches!(client.answer(client.id), Message::Failed(_)));
    assert_eq!(client.list().entries.len(), 1);
}

#[test]
fn a_batch_breaks_promises_and_is_acknowledged() {
    let (_at, dir) = scratch();
    let serving = serve(&dir);
    let (mut a, mut b) = (serving.client(1), serving.client(2));
    assert!(b.list().entries.is_empty());
    let fid = Fid::new(1, 1);
    let id = a.request(batch(0, vec![create(1, "f", fid), store(2, fid, 4, Some(b"text".into()))]));
    let (broken, fids) = b.broken();
    assert_eq!(fids, [ROOT]);
    assert!(!dir.join("f").exists(), "not before B has answered");
    b.pong(broken);
    let acked = acked(a.answer(id));
    assert_eq!((acked.upto, acked.conflicts, acked.stamp), (Seq(2), vec![], Stamp(2)));
    assert_eq!(std::fs::read_to_string(dir.join("f")).unwrap(), "text");
    let page = b.list();
    assert_eq!((page.dir.stamp, page.entries[0].object.stamp), (Stamp(1), Stamp(2)));
    assert_eq!(page.entries[0].object.fid, fid);
    assert_eq!(page.entries[0].object.attr.mtime, Time { sec: 1000, nsec: 7 });
    let Message::Changes(changes) = b.call(msg::Since { stamp: Stamp(0), read_all: false }) else {
        panic!()
    };
    assert_eq!((changes.fids, changes.upto), (vec![ROOT, fid], Stamp(2)));
    // a gap is refused
    let Message::Failed(failed) = a.call(batch(5, vec![create(6, "g", Fid::new(1, 2))])) else {
        panic!()
    };
    assert_eq!(failed.code, Code::Gap);
    // B hears of its own changes only by the acknowledgement
    let id = b.request(batch(0, vec![create(1, "g", Fid::new(2, 1))]));
    let (broken, _) = a.broken();
    a.pong(broken);
    assert!(matches!(b.answer(id), Message::Acked(_)));
}

#[test]
fn large_contents_are_fetched_from_the_client() {
    let (_at, dir) = scratch();
    let serving = serve(&dir);
    let mut a = serving.client(1);
    let bytes: Vec<u8> = (0..(5u32 << 20) + 77).map(|i| (i / 3) as u8).collect();
    let fid = Fid::new(1, 1);
    let size = bytes.len() as u64;
    let id = a.request(batch(0, vec![create(1, "big", fid), store(2, fid, size, None)]));
    let mut reads = 0;
    let acked = loop {
        let next = a.get(|i| i.answer || matches!(i.message, Message::Read(_))).unwrap();
        match next.message {
            Message::Read(read) => {
                assert_eq!((read.fid, read.stamp), (fid, Stamp(0)));
                let end = (read.at + u64::from(read.len)).min(size);
                let piece = bytes[read.at as usize..end as usize].to_vec();
                let data = msg::Data { at: read.at, bytes: piece, size, token: 1 };
                a.send(next.id, true, data.into());
                reads += 1;
            }
            message if next.id == id => break acked(message),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((acked.upto, reads), (Seq(2), 6));
    assert!(std::fs::read(dir.join("big")).unwrap() == bytes);
}

#[test]
fn garbage_ends_a_connection_and_nothing_else() {
    let (_at, dir) = scratch();
    let serving = serve(&dir);
    let mut client = serving.client(1);
    let bytes: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0xff; 4096],
        // a body of four gigabytes
        &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[0; 24],
    ];
    for bytes in bytes {
        let mut stream = TcpStream::connect(serving.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "{bytes:?}"),
        }
    }
    // a batch whose record is no record
    let mut other = serving.client(2);
    other.request(batch(0, vec![msg::Item { record: vec![1, 2, 3], data: None }]));
    assert!(other.get(|_| false).is_err());
    // somebody who speaks before he says hello
    let mut rude = Raw::connect(serving.addr);
    rude.request(msg::Stat { fid: ROOT, have: Stamp(0) });
    assert!(rude.get(|_| false).is_err());
    assert!(client.list().entries.is_empty(), "and others do not notice");
}

#[test]
fn who_does_not_fit_is_told_why() {
    let (_at, dir) = scratch();
    let serving = serve(&dir);
    let wrong = [
        (greeting("other", 1), Code::UnknownVolume, "there are: v"),
        (msg::Hello { version: 77, ..greeting("v", 1) }, Code::WrongVersion, "version 1"),
        (msg::Hello { volume_id: [9; 16], ..greeting("v", 1) }, Code::ForeignCache, "cache"),
    ];
    for (hello, code, text) in wrong {
        let mut client = Raw::connect(serving.addr);
        match client.call(hello) {
            Message::Refused(refused) => {
                assert_eq!(refused.code, code);
                assert!(refused.what.contains(text), "{}", refused.what);
            }
            other => panic!("{other:?}"),
        }
    }
    let mut client = Raw::connect(serving.addr);
    assert!(matches!(client.call(greeting("", 1)), Message::Welcome(_)), "the only volume");
}

#[test]
fn a_kill_loses_nothing_that_was_acknowledged_and_applies_nothing_twice() {
    let (_at, dir) = scratch();
    let fid = Fid::new(1, 1);
    let items = || vec![create(1, "f", fid), store(2, fid, 4, Some(b"text".to_vec()))];
    {
        let serving = serve(&dir);
        let mut a = serving.client(1);
        assert_eq!(acked(a.call(batch(0, items()))).upto, Seq(2));
        serving.signal("-KILL");
    }
    let mut serving = serve(&dir);
    let mut a = Raw::connect(serving.addr);
    let welcome = a.hello(1);
    assert_eq!((welcome.node, welcome.acked, welcome.stamp), (1, Seq(2), Stamp(2)));
    let Message::Failed(failed) = a.call(batch(0, items())) else { panic!() };
    assert_eq!(failed.code, Code::Gap);
    let gone =
        imz::kml::record::Gone { fid, base: Stamp(2), attr: Default::default(), target: None };
    let at = Place { dir: ROOT, base: Stamp(1), name: Name::new(b"f").unwrap() };
    acked(a.call(batch(2, vec![item(3, Op::Unlink { at, gone }, None)])));
    assert!(!dir.join("f").exists());
    serving.signal("-TERM");
    assert_eq!(serving.wait(), Some(0));
    let state = std::fs::read_to_string(dir.join(".imz/state.json")).unwrap();
    assert!(state.contains("\"clean\": true"), "{state}");
    let serving = serve(&dir);
    let mut a = Raw::connect(serving.addr);
    assert_eq!(a.hello(1).acked, Seq(3));
}

fn ended(mut command: Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn what_cannot_be_served_is_refused_with_a_code() {
    let (at, dir) = scratch();
    let serving = serve(&dir);
    let serve = |args: &[&str]| {
        let mut command = imz();
        command.arg("serve").args(args);
        ended(command)
    };
    let (dir, free) = (dir.to_str().unwrap(), "127.0.0.1:0");
    let (code, said) = serve(&["--listen", free, dir]);
    assert!(code == Some(4) && said.contains("another imz serves it"), "{code:?} {said}");
    let other = at.path().join("w");
    std::fs::create_dir(&other).unwrap();
    let other = other.to_str().unwrap();
    let (code, said) = serve(&["--listen", &serving.addr.to_string(), other]);
    assert!(code == Some(4) && said.contains("--listen"), "{code:?} {said}");
    assert!(!Path::new(other).join(".imz").exists(), "nothing half made");
    let missing = format!("{dir}/missing");
    let (code, said) = serve(&["--listen", free, &missing]);
    assert!(code == Some(5) && said.contains("missing: no such directory"), "{code:?} {said}");
    let (code, said) = serve(&["--listen", free, "/proc"]);
    assert!(code == Some(7) && said.contains("(proc)"), "{code:?} {said}");
    let twice = [format!("x={other}"), format!("x={dir}")];
    let (code, said) = serve(&["--listen", free, &twice[0], &twice[1]]);
    assert!(code == Some(2) && said.contains("NAME=DIR"), "{code:?} {said}");
}

#[test]
fn several_volumes_keep_their_state_elsewhere_and_say_when_ready() {
    let (at, dir) = scratch();
    let other = at.path().join("w");
    std::fs::create_dir(&other).unwrap();
    let notify = at.path().join("notify");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = imz();
    command.args(["serve", "--listen", "127.0.0.1:0", "--state"]).arg(at.path().join("s"));
    command.arg(&dir).arg(&other).env("NOTIFY_SOCKET", &notify);
    let mut serving = start(command);
    let mut told = [0; 64];
    let len = socket.recv(&mut told).unwrap();
    assert_eq!(&told[..len], b"READY=1");
    assert!(at.path().join("s/w/state.json").exists() && !other.join(".imz/kml").exists());
    for name in ["v", "w"] {
        let mut client = Raw::connect(serving.addr);
        assert!(matches!(client.call(greeting(name, 1)), Message::Welcome(_)));
        let fid = Fid::new(1, 1);
        acked(client.call(batch(0, vec![create(1, name, fid)])));
    }
    assert!(dir.join("v").exists() && other.join("w").exists());
    serving.signal("-INT");
    assert_eq!(serving.wait(), Some(0));
}

#[test]
fn a_full_disk_is_told_and_survived() {
    let at = tempfile::tempdir().unwrap();
    let dir = at.path().join("v");
    std::fs::create_dir(&dir).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "none"])
        .arg(&dir)
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no small file system can be mounted here");
        return;
    }
    let _umount = Umount(dir.clone());
    let mut command = imz();
    command.args(["serve", "--listen", "127.0.0.1:0", "--state"]).arg(at.path().join("s"));
    command.arg(format!("v={}", dir.display()));
    let serving = start(command);
    let mut a = serving.client(1);
    let fid = |n| Fid::new(1, n);
    let chunk = || Some(vec![1; 64 << 10]);
    let mut items = Vec::new();
    for n in 0..20 {
        items.push(create(2 * n + 1, &format!("f{n}"), fid(n + 1)));
        items.push(store(2 * n + 2, fid(n + 1), 64 << 10, chunk()));
    }
    assert_eq!(acked(a.call(batch(0, items))).upto, Seq(40));
    std::fs::write(dir.join("filler"), vec![0; 5 << 20]).unwrap_err();
    let items = vec![create(41, "last", fid(90)), store(42, fid(90), 64 << 10, chunk())];
    match a.call(batch(40, items)) {
        Message::Acked(acked) => assert_eq!(acked.upto, Seq(41), "not what is not kept"),
        Message::Failed(failed) => assert_eq!(failed.code, Code::NoSpace),
        other => panic!("{other:?}"),
    }
    std::fs::remove_file(dir.join("filler")).unwrap();
    let mut again = serving.client(1);
    let from = again.hello_acked();
    let all = [create(41, "last", fid(90)), store(42, fid(90), 64 << 10, chunk())];
    let rest = all.into_iter().skip(from as usize - 40).collect();
    assert_eq!(acked(again.call(batch(from, rest))).upto, Seq(42));
    assert_eq!(std::fs::read(dir.join("last")).unwrap().len(), 64 << 10);
}

impl Raw {
    /// How far the server says this client is, when it says hello on a new connection.
    fn hello_acked(&mut self) -> u64 {
        let Stream::Tcp(stream) = self.conn.stream() else { panic!() };
        let addr = stream.peer_addr().unwrap();
        *self = Raw::connect(addr);
        self.hello(1).acked.0
    }
}

struct Umount(PathBuf);

impl Drop for Umount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A child that another test forks in this process holds every lock until it execs.
fn once_unlocked(export: &Export) -> Embedded {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match Server::embedded(export) {
            Ok(server) => return server,
            Err(e) => assert!(Instant::now() < until, "{e}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_server_inside_the_process_serves_and_ends() {
    let (_at, dir) = scratch();
    std::fs::write(dir.join("f"), "x").unwrap();
    let export = Export { name: "v".into(), dir: dir.clone(), state: None };
    let embedded = Server::embedded(&export).unwrap();
    let mut client = Raw::over(Stream::from_unix(embedded.connect().unwrap()).unwrap());
    client.hello(1);
    assert_eq!(client.list().entries.len(), 1);
    acked(client.call(batch(0, vec![create(1, "g", Fid::new(1, 1))])));
    drop(client);
    let mut client = Raw::over(Stream::from_unix(embedded.connect().unwrap()).unwrap());
    assert_eq!(client.hello(1).acked, Seq(1), "a second connection, the same client");
    embedded.stop().unwrap();
    assert!(client.get(|_| false).is_err());
    let again = once_unlocked(&export);
    again.stop().unwrap();
    assert!(dir.join("g").exists());
}
