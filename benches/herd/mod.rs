//! A server process, and many clients of it in one process, over the real protocol.
//!
//! ```text
//! Serving  `imz serve` on loopback as a child: what it takes in memory and processor time
//! Herd     N connections in one loop; each answers breaks and recalls at once, and asks whether
//!          the server is there as a mount does that has nothing else to say
//! ```
//!
//! The served directory ([`make_tree`]) has a directory `common`, and one for each client. Nothing
//! is cached and no kernel is told: what is measured is the server. Shared by `benches/load.rs`
//! and `tests/load.rs`. A failure ends the run.

#![allow(clippy::unwrap_used)] // a failure ends the run, and says where
#![allow(dead_code)] // the test uses a part

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use imz::kml::codec::encode_wire;
use imz::kml::record::{Fid, Op, Origin, ROOT, Range, Record, Seq, Stamp, Time};
use imz::lento::message::{self as msg, Message, VERSION};
use imz::lento::policy;
use imz::lento::rights::Mode;
use imz::net::conn::{Conn, Lane};
use imz::net::poll::{Event, Loop, Stream, Token};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Clients that connect at one time: fewer than the kernel lets wait for an accept.
const WAVE: usize = 64;
const VOLUME: &str = "load";
/// What is in each file, and what a change makes of it.
const OLD: &[u8] = b"old";
const NEW: &[u8] = b"newer";
/// The unit of times in /proc on every architecture that imz is tried on.
const TICKS_PER_SECOND: u64 = 100;

/// `common` with `shared` files, and `clients` directories with `own` files each, in `dir`.
pub fn make_tree(dir: &Path, clients: usize, shared: usize, own: usize) {
    let fill = |name: String, count: usize| {
        let dir = dir.join(name);
        fs::create_dir(&dir).unwrap();
        for file in 0..count {
            fs::write(dir.join(format!("file-{file:05}")), OLD).unwrap();
        }
    };
    fill("common".into(), shared);
    for client in 0..clients {
        fill(format!("own-{client:05}"), own);
    }
}

/// A server process; killed when dropped.
pub struct Serving {
    child: Child,
    pub addr: SocketAddr,
}

impl Serving {
    pub fn start(imz: &Path, dir: &Path) -> Serving {
        let mut child = Command::new(imz)
            .args(["serve", "--listen", "127.0.0.1:0"])
            .arg(format!("{VOLUME}={}", dir.display()))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains(" on 127.0.0.1:") {
            assert!(stderr.read_line(&mut said).unwrap() > 0, "it ended: {said}");
        }
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::stderr()));
        let addr = said.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
        Serving { child, addr }
    }
    /// Resident memory, bytes.
    pub fn resident_len(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }
    /// Processor time so far, in user and kernel mode.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // behind the name, which may hold anything, `state` is field 3; 14 and 15 are the times
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
    }
    /// Ends it as SIGTERM does, and waits.
    pub fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // it may have ended, as it should
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One change that all are told of; the times are counted from its beginning.
#[derive(Clone, Copy, Default, Debug)]
pub struct Told {
    /// who were told before it was acknowledged
    pub holders: usize,
    pub all_told: Duration,
    pub granted: Duration,
    pub acked: Duration,
    /// from then on, until all have asked for the file again and know it
    pub reread: Duration,
}

/// Names a client: its place in the herd.
type No = usize;

/// A message that came, but for what the herd answers by itself.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one at a time, and most are answers
enum Got {
    Answer {
        client: No,
        id: u64,
        message: Message,
    },
    /// and answered
    Break {
        client: No,
        fids: Vec<Fid>,
    },
}

struct Client {
    conn: Conn,
    last_id: u64,
    /// its newest record
    seq: Seq,
    /// when it asks whether the server is there
    ping_at: Instant,
}

pub struct Herd {
    poll: Loop,
    clients: Vec<Client>,
    got: VecDeque<Got>,
    /// all clients by `ping_at`
    pings: BTreeSet<(Instant, No)>,
}

impl Herd {
    pub fn new() -> Herd {
        imz::sys::limit::raise_files();
        let poll = Loop::new().unwrap();
        Herd { poll, clients: Vec::new(), got: VecDeque::new(), pings: BTreeSet::new() }
    }
    /// So many more clients, each with its own incarnation, welcome and told what has changed.
    /// The second one of all wants to read all, so that the first lets the volume go.
    pub fn connect(&mut self, addr: SocketAddr, count: usize) {
        let upto = self.clients.len() + count;
        while self.clients.len() < upto {
            let first = self.clients.len();
            let wave = first..upto.min(first + WAVE);
            for no in wave.clone() {
                let stream = Stream::from_tcp(TcpStream::connect(addr).unwrap()).unwrap();
                let mut conn = Conn::new(stream, false);
                self.poll.add_stream(conn.stream(), Token(no)).unwrap();
                let ping_at = Instant::now() + policy::PING_AFTER;
                self.clients.push(Client { conn, last_id: 0, seq: Seq(0), ping_at });
                self.pings.insert((ping_at, no));
            }
            let mut incarnation = [0; 16];
            for (client, answer) in self.ask_all(wave.clone(), |no| {
                incarnation[..8].copy_from_slice(&(no as u64 + 1).to_le_bytes());
                incarnation[8..12].copy_from_slice(&std::process::id().to_le_bytes());
                greeting(incarnation).into()
            }) {
                assert!(matches!(answer, Message::Welcome(_)), "{client}: {answer:?}");
            }
            let since =
                |no: No| msg::Since { stamp: Stamp(0), read_all: no == 1 && first == 0 }.into();
            for (client, answer) in self.ask_all(wave, since) {
                assert!(matches!(answer, Message::Changes(_)), "{client}: {answer:?}");
            }
        }
    }
    fn len(&self) -> usize {
        self.clients.len()
    }

    /// The objects of a directory, itself first: their fids, stamps and names.
    fn list(&mut self, client: No, dir: Fid) -> Vec<(Fid, Stamp, String)> {
        let mut out = Vec::new();
        let mut after = Vec::new();
        loop {
            let page = match self.call(client, msg::List { dir, after, have: Stamp(0) }) {
                Message::Page(page) => page,
                other => panic!("{other:?}"),
            };
            if out.is_empty() {
                out.push((page.dir.fid, page.dir.stamp, ".".to_owned()));
            }
            after = page.entries.last().map_or(Vec::new(), |entry| entry.name.clone());
            for msg::Entry { name, object } in page.entries {
                out.push((object.fid, object.stamp, String::from_utf8(name).unwrap()));
            }
            if !page.more {
                return out;
            }
        }
    }
    /// Each of these clients lists `dir(client)`, all at once; how many objects each was given.
    fn list_all(&mut self, clients: std::ops::Range<No>, dir: impl Fn(No) -> Fid) -> Vec<usize> {
        let mut counts = vec![0; clients.len()];
        let first = clients.start;
        let list = |no| msg::List { dir: dir(no), after: Vec::new(), have: Stamp(0) }.into();
        for (client, answer) in self.ask_all(clients, list) {
            match answer {
                Message::Page(page) if !page.more => {
                    counts[client - first] = 1 + page.entries.len()
                }
                other => panic!("{client}: {other:?}"),
            }
        }
        counts
    }
    /// Sends the batch with the next record of this client: a new content of a file.
    fn send_store(&mut self, client: No, (fid, base): (Fid, Stamp), bytes: &[u8]) -> u64 {
        let after = self.clients[client].seq;
        let upto = Seq(after.0 + 1);
        self.clients[client].seq = upto;
        let (uid, gid) = imz::sys::cred::own();
        let len = bytes.len() as u64;
        let ranges = vec![Range { at: 0, len }];
        let mtime = Time { sec: 1_700_000_000, nsec: 7 };
        let op = Op::Store { fid, base, size: len, mtime, ranges, old_size: OLD.len() as u64 };
        let time_ns = 1_700_000_000_000_000_000;
        let record = Record { time_ns, origin: Origin::default(), uid, gid, path: vec![], op };
        let record = encode_wire(&record, upto).unwrap();
        let items = vec![msg::Item { record, data: Some(bytes.to_vec()) }];
        self.send(client, msg::Batch { after, upto, items })
    }
    fn send(&mut self, client: No, message: impl Into<Message>) -> u64 {
        let of = &mut self.clients[client];
        of.last_id += 1;
        of.conn.send(Lane::Foreground, of.last_id, false, &message.into()).unwrap();
        of.conn.flush().unwrap();
        of.last_id
    }
    /// The answer to a request; what else comes meanwhile is passed over.
    fn call(&mut self, client: No, message: impl Into<Message>) -> Message {
        let want = self.send(client, message);
        loop {
            match self.next() {
                Got::Answer { client: of, id, message } if (of, id) == (client, want) => {
                    return message;
                }
                _ => {}
            }
        }
    }
    /// The next message.
    fn next(&mut self) -> Got {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(got) = self.got.pop_front() {
                return got;
            }
            assert!(Instant::now() < until, "nothing comes");
            self.turn(until);
        }
    }
    /// From now on they ask at instants that have nothing to do with each other, as machines do that
    /// were started at any time.
    pub fn scatter(&mut self) {
        let (now, count) = (Instant::now(), self.clients.len());
        for no in 0..count {
            let share = (no + 1) as f64 / count as f64;
            self.ping_at(no, now + policy::PING_AFTER.mul_f64(share));
        }
    }
    fn ping_at(&mut self, no: No, at: Instant) {
        let before = std::mem::replace(&mut self.clients[no].ping_at, at);
        self.pings.remove(&(before, no));
        self.pings.insert((at, no));
    }
    /// Nobody asks for anything, for so long.
    pub fn rest(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.turn(until);
        }
        self.got.clear();
    }

    /// Every client is promised what is in `common`, and what is in a directory of its own; how many
    /// promises that makes.
    pub fn spread(&mut self, places: &Places) -> usize {
        let clients = self.len();
        let shared: usize = self.list_all(0..clients, |_| places.common).iter().sum();
        let own: usize = self.list_all(0..clients, |no| places.own[no]).iter().sum();
        shared + own
    }
    /// The last client changes a file that all others hold, who then ask for it again. `ask`: with a
    /// permit for it; otherwise with a batch alone, as one that was away does.
    pub fn change(&mut self, file: (Fid, Stamp), ask: bool) -> Told {
        let author = self.len() - 1;
        let mut holders = BTreeSet::new();
        let began = Instant::now();
        let mut told = Told::default();
        if ask {
            self.send(author, msg::Ask { fids: vec![file.0] });
        } else {
            self.send_store(author, file, NEW);
        }
        loop {
            match self.next() {
                Got::Break { client, fids } if fids.contains(&file.0) => {
                    holders.insert(client);
                    told.all_told = began.elapsed();
                }
                Got::Answer { message: Message::Granted(_), .. } => {
                    told.granted = began.elapsed();
                    self.send_store(author, file, NEW);
                }
                Got::Answer { message: Message::Acked(acked), .. } => {
                    assert!(acked.conflicts.is_empty());
                    (told.holders, told.acked) = (holders.len(), began.elapsed());
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        let stat = |_| msg::Stat { fid: file.0, have: Stamp(0) }.into();
        for (client, answer) in self.ask_all(0..author, stat) {
            let Message::Status(status) = answer else { panic!("{client}: {answer:?}") };
            assert_eq!(
                status.object.attr.size,
                NEW.len() as u64,
                "{client} was told of the old one"
            );
        }
        told.reread = began.elapsed() - told.acked;
        told
    }

    /// One request by each client, all at once, and the answers.
    fn ask_all(
        &mut self,
        clients: std::ops::Range<No>,
        mut request: impl FnMut(No) -> Message,
    ) -> Vec<(No, Message)> {
        let mut out = Vec::new();
        let mut open = BTreeSet::new();
        for no in clients {
            let id = self.send(no, request(no));
            open.insert((no, id));
        }
        while !open.is_empty() {
            if let Got::Answer { client, id, message } = self.next() {
                assert!(open.remove(&(client, id)), "{client}: {message:?}");
                out.push((client, message));
            }
        }
        out
    }
    /// Waits until something comes or is to be done, or it is `until`.
    fn turn(&mut self, until: Instant) {
        let wake_at = self.pings.first().map_or(until, |(at, _)| until.min(*at));
        let mut events = Vec::new();
        let timeout = wake_at.saturating_duration_since(Instant::now());
        self.poll.wait(Some(timeout), &mut events).unwrap();
        for event in events {
            if let Event::Ready { token, .. } = event {
                self.serve(token.0);
            }
        }
        let now = Instant::now();
        while let Some((_, no)) = self.pings.first().copied().filter(|(at, _)| *at <= now) {
            self.ping_at(no, now + policy::PING_AFTER);
            self.send(no, msg::Ping {});
        }
    }
    fn serve(&mut self, no: No) {
        let mut answered = false;
        let client = &mut self.clients[no];
        loop {
            for incoming in client.conn.read().unwrap() {
                let (id, answer) = (incoming.id, incoming.answer);
                answered |= answer;
                let reply: Message = match incoming.message {
                    Message::Pong(_) if answer => continue,
                    message if answer => {
                        self.got.push_back(Got::Answer { client: no, id, message });
                        continue;
                    }
                    Message::Granted(_) => continue,
                    Message::Ping(_) => msg::Pong { stamp: Stamp(0) }.into(),
                    Message::Break(msg::Break { fids }) => {
                        self.got.push_back(Got::Break { client: no, fids });
                        msg::Pong { stamp: Stamp(0) }.into()
                    }
                    Message::Recall(recall) => {
                        let kept = if recall.mode == Mode::Read { recall.fids } else { vec![] };
                        msg::Released { kept, upto: client.seq }.into()
                    }
                    other => panic!("{no}: {other:?}"),
                };
                client.conn.send(Lane::Foreground, id, true, &reply).unwrap();
            }
            client.conn.flush().unwrap();
            if !client.conn.has_more() {
                break;
            }
        }
        // as a mount does: counted from the answer before
        if answered {
            self.ping_at(no, Instant::now() + policy::PING_AFTER);
        }
    }
}

/// All directories of [`make_tree`]: `common` with its files, and the clients' own.
pub struct Places {
    pub common: Fid,
    pub shared: Vec<(Fid, Stamp)>,
    pub own: Vec<Fid>,
}

/// Lists everything once, in a life of the server of its own, so that every object has its fid.
pub fn scout(imz: &Path, dir: &Path) -> Places {
    let serving = Serving::start(imz, dir);
    let mut herd = Herd::new();
    herd.connect(serving.addr, 1);
    let mut places = Places { common: ROOT, shared: Vec::new(), own: Vec::new() };
    for (fid, _, name) in herd.list(0, ROOT).split_off(1) {
        let entries = herd.list(0, fid);
        if name == "common" {
            places.common = fid;
            places.shared = entries[1..].iter().map(|(fid, stamp, _)| (*fid, *stamp)).collect();
        } else {
            places.own.push(fid);
        }
    }
    drop(herd);
    serving.stop();
    places
}

fn greeting(incarnation: [u8; 16]) -> msg::Hello {
    msg::Hello {
        version: VERSION,
        volume: VOLUME.into(),
        incarnation,
        node: 0,
        volume_id: [0; 16],
        host: "load".into(),
        pending: Seq(0),
        keeps: false,
        locks: false,
        room: None,
    }
}
