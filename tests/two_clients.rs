//! Two clients and a server in one process: real sockets, real files, no kernel in between. The
//! filter's part is played by hand: journal, then tree, then the outcome.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use imz::kml::codec::Outcome;
use imz::kml::log::{Log, Options as LogOptions};
use imz::kml::record::*;
use imz::lento::client::Unmet;
use imz::lento::rights::{self, Held, Mode};
use imz::net::client::{self, Handle, Notify, Options, Peer, Want};
use imz::net::server::{Embedded, Export, Server};
use imz::replica::cache::Cache;
use imz::replica::hydrate::Notice;
use imz::replica::meta::Meta;
use imz::replica::ops::time_of_ns;
use imz::replica::state::{Facts, State};
use imz::replica::tree::{Dir, Tree};
use imz::sys::cred::{self, Caller};
use imz::sys::fs::{self, RenameMode};

const SOON: Duration = Duration::from_secs(20);

type Served = Arc<Mutex<Option<Embedded>>>;

struct Notes(Arc<Mutex<Vec<Notice>>>);

impl Notify for Notes {
    fn stale(&mut self, what: Vec<Notice>, done: Box<dyn FnOnce() + Send>) {
        self.0.lock().unwrap().extend(what);
        done();
    }
}

struct Node {
    root: PathBuf,
    cache: Arc<Cache>,
    handle: Handle,
    rights: Arc<Held>,
    notices: Arc<Mutex<Vec<Notice>>>,
    clock: std::cell::Cell<u64>,
}

fn name(s: &str) -> Name {
    Name::new(s.as_bytes()).unwrap()
}

fn serve(dir: &Path) -> Embedded {
    Server::embedded(&Export { name: "v".into(), dir: dir.to_owned(), state: None }).unwrap()
}

fn node(at: &Path, served: &Served, incarnation: u128) -> Node {
    let sub = |n: &str| at.join(n);
    std::fs::create_dir_all(sub("tree")).unwrap();
    let fresh =
        || Facts { incarnation: format!("{incarnation:032x}"), ..Facts::new("v", "", 0, 0) };
    let state = State::open(&sub("state"), fresh).unwrap();
    let tree = Tree::open(&sub("tree"), &sub("index"), true).unwrap();
    let log = Log::open_or_create(&sub("kml"), 0, incarnation, LogOptions::default()).unwrap();
    let cache = Arc::new(Cache::new(tree, log, state, &sub("limbo")).unwrap());
    let notices = Arc::new(Mutex::new(Vec::new()));
    let served = served.clone();
    let peer = Peer::Embedded(Box::new(move || match &*served.lock().unwrap() {
        Some(server) => server.connect(),
        None => Err(std::io::ErrorKind::ConnectionRefused.into()),
    }));
    let rights = Arc::new(Held::default());
    let age = Duration::from_millis(10);
    let options = Options { age, rights: rights.clone(), ..Options::default() };
    let notes = Box::new(Notes(notices.clone()));
    let handle = client::start(cache.clone(), peer, options, notes).unwrap();
    let clock = std::cell::Cell::new(1_700_000_000_000_000_000 + (incarnation as u64) * 1000);
    Node { root: sub("tree"), cache, handle, rights, notices, clock }
}

impl Node {
    fn want(&self, want: Want) -> Result<(), Unmet> {
        let (tell, told) = std::sync::mpsc::channel();
        self.handle.want(want, Box::new(move |how| tell.send(how).unwrap()));
        told.recv_timeout(SOON).expect("every want ends")
    }
    /// As the filter decides whether to answer from the cache.
    fn valid(&self, meta: &Meta) -> bool {
        let may = self.rights.mode(meta.fid) >= Mode::Read || !self.cache.is_online();
        self.cache.valid(meta) && may
    }
    fn meta(&self, fid: Fid) -> Meta {
        if fid == ROOT {
            return self.cache.tree.root().meta();
        }
        self.cache.tree.find(fid).unwrap().2
    }
    /// The directory, listed and current.
    fn dir(&self, fid: Fid) -> Arc<Dir> {
        for _ in 0..5 {
            let meta = self.meta(fid);
            if meta.complete && self.valid(&meta) {
                return self.cache.tree.dir(fid).unwrap();
            }
            self.want(Want::Dir(fid)).unwrap();
        }
        panic!("{fid} does not become current: {:?}", self.meta(fid));
    }
    fn fid(&self, path: &str) -> Fid {
        let mut at = ROOT;
        for part in path.split('/').filter(|p| !p.is_empty()) {
            let dir = self.dir(at);
            let meta = self.cache.tree.meta(&dir, &name(part)).unwrap();
            at = meta.unwrap_or_else(|| panic!("no {part} of {path}")).fid;
        }
        at
    }
    /// The file's contents, as current as can be had.
    fn read(&self, path: &str) -> Vec<u8> {
        let fid = self.fid(path);
        for _ in 0..5 {
            let meta = self.meta(fid);
            if !self.valid(&meta) {
                self.want(Want::Object(fid)).unwrap();
            } else if meta.complete {
                return std::fs::read(self.root.join(path)).unwrap();
            } else {
                self.want(Want::Bytes { fid, at: 0, len: u64::MAX }).unwrap();
            }
        }
        panic!("{path} does not become current: {:?}", self.meta(fid));
    }
    fn act(&self, op: Op, act: impl FnOnce(Time)) -> Seq {
        self.clock.set(self.clock.get() + 1_000_001);
        let mut few = [None; 4];
        few.iter_mut().zip(rights::needs(&op)).for_each(|(place, fid)| *place = Some(fid));
        self.want(Want::Permit(few)).unwrap();
        let (time_ns, (uid, gid)) = (self.clock.get(), cred::own());
        let origin = Origin::default();
        let record = Record { time_ns, origin, uid, gid, path: vec![], op };
        let ticket = self.cache.append(&record).unwrap();
        let seq = ticket.seq;
        act(time_of_ns(time_ns));
        self.cache.settle(ticket, Outcome::Done);
        seq
    }
    fn place(&self, dir: Fid, n: &str) -> Place {
        Place { dir, base: self.meta(dir).stamp, name: name(n) }
    }
    fn create(&self, dir: &str, n: &str, bytes: &[u8]) -> Fid {
        let (fid, parent) = (self.cache.state.new_fid().unwrap(), self.fid(dir));
        let at = self.place(parent, n);
        let meta = Meta { epoch: self.cache.epoch(), ..Meta::whole(fid) };
        self.act(Op::Create { at, fid, mode: 0o644, umask: 0o022 }, |when| {
            let (uid, gid) = cred::own();
            let dir = self.cache.tree.dir(parent).unwrap();
            let by = Caller { uid, gid, umask: 0o022 };
            self.cache.tree.create(&dir, &name(n), by, 0o644, &meta, when).unwrap();
        });
        self.store(&format!("{dir}/{n}"), bytes);
        fid
    }
    fn store(&self, path: &str, bytes: &[u8]) -> Seq {
        let fid = self.fid(path);
        let (base, size) = (self.meta(fid).stamp, bytes.len() as u64);
        let file = self.root.join(path.trim_start_matches('/'));
        let old_size = file.metadata().unwrap().len();
        self.clock.set(self.clock.get() + 1_000_001);
        let mtime = time_of_ns(self.clock.get() + 1_000_001);
        let ranges = vec![Range { at: 0, len: size }];
        self.act(Op::Store { fid, base, size, mtime, ranges, old_size }, |when| {
            std::fs::write(&file, bytes).unwrap();
            let fd = std::fs::File::open(&file).unwrap();
            let set = fs::SetTime::At(when.sec, when.nsec);
            fs::utimes_fd(&fd, fs::SetTime::Keep, set).unwrap();
        })
    }
    fn rename(&self, from: (&str, &str), to: (&str, &str)) {
        let fid = self.fid(&format!("{}/{}", from.0, from.1));
        let (old, new) = (self.fid(from.0), self.fid(to.0));
        let base = self.meta(fid).stamp;
        let over = Over::Nothing { noreplace: false };
        let (a, b) = (self.place(old, from.1), self.place(new, to.1));
        self.act(Op::Rename { from: a, to: b, fid, base, over }, |when| {
            let tree = &self.cache.tree;
            let (old, new) = (tree.dir(old).unwrap(), tree.dir(new).unwrap());
            let (a, b) = (name(from.1), name(to.1));
            let mode = RenameMode::Replace;
            tree.rename((&old, &a), (&new, &b), fid, None, mode, when).unwrap();
        });
    }
    /// All that was journaled is at the server.
    fn ship(&self) {
        let seq = self.handle.ship_now();
        let until = Instant::now() + SOON;
        while self.handle.acked() < seq {
            assert!(Instant::now() < until, "not shipped: {:?}", self.handle.status());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(self.handle.status().pending_count, 0);
    }
    fn wait_online(&self, online: bool) {
        let until = Instant::now() + SOON;
        while self.cache.is_online() != online {
            assert!(Instant::now() < until, "{:?}", self.handle.status());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    fn told(&self, fid: Fid) -> bool {
        let of = |n: &Notice| matches!(n, Notice::Object { fid: f, .. } if *f == fid);
        self.notices.lock().unwrap().iter().any(of)
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn what_one_does_the_other_sees_and_the_server_keeps() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("served");
    std::fs::create_dir_all(dir.join("d/sub")).unwrap();
    let large = noise((3 << 20) + 7, 5);
    std::fs::write(dir.join("d/large"), &large).unwrap();
    std::fs::write(dir.join("f"), "first").unwrap();
    std::os::unix::fs::symlink("d/large", dir.join("link")).unwrap();

    let served: Served = Arc::new(Mutex::new(Some(serve(&dir))));
    let a = node(&scratch.path().join("a"), &served, 1);
    let b = node(&scratch.path().join("b"), &served, 2);
    for n in [&a, &b] {
        n.handle.first_contact(SOON).unwrap();
        assert_eq!(n.read("f"), b"first");
        assert_eq!(n.read("d/large"), large);
        assert_eq!(std::fs::read_link(n.root.join("link")).unwrap(), Path::new("d/large"));
    }
    assert_ne!(a.handle.status().node, b.handle.status().node);
    let asked = b.handle.status().requests_foreground;
    assert_eq!(b.read("d/large"), large);
    assert_eq!(b.handle.status().requests_foreground, asked, "cached is cached");

    // Small contents travel inline, large ones are fetched back.
    let big = noise(300_000, 6);
    a.create("d", "small", b"small one");
    a.create("d", "big", &big);
    a.ship();
    assert_eq!(std::fs::read(dir.join("d/big")).unwrap(), big);
    assert!(b.told(b.fid("d")), "before the acknowledgement");
    assert_eq!(b.read("d/small"), b"small one");
    assert_eq!(b.read("d/big"), big);
    let time = |p: PathBuf| p.metadata().unwrap().modified().unwrap();
    for path in ["d/small", "d/big"] {
        assert_eq!(time(a.root.join(path)), time(dir.join(path)), "{path}");
        assert_eq!(time(b.root.join(path)), time(dir.join(path)), "{path}");
    }

    // B writes what A has, and moves a directory whose data A keeps.
    b.store("f", b"second, and longer");
    b.rename(("", "d"), ("", "e"));
    b.ship();
    assert_eq!(a.read("f"), b"second, and longer");
    let asked = a.handle.status().requests_foreground;
    assert_eq!(a.fid("e"), b.fid("e"));
    assert!(!a.root.join("d").exists());
    assert_eq!(a.read("e/large"), large);
    let now = a.handle.status().requests_foreground;
    assert!(now - asked <= 2, "a listing or two, and no data: {}", now - asked);

    // Both at once, in one directory.
    for k in 0..40 {
        a.create("e", &format!("a{k}"), format!("a{k}").as_bytes());
        b.create("e", &format!("b{k}"), format!("b{k}").as_bytes());
    }
    a.ship();
    b.ship();
    for k in 0..40 {
        assert_eq!(a.read(&format!("e/b{k}")), format!("b{k}").as_bytes());
        assert_eq!(b.read(&format!("e/a{k}")), format!("a{k}").as_bytes());
    }
    for n in [&a, &b] {
        assert_eq!(n.handle.status().conflicts, 0);
        assert!(n.handle.shutdown(SOON));
    }
}

#[test]
fn a_server_that_went_away_loses_nothing_and_tells_what_changed() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("served");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("f"), "first").unwrap();
    let served: Served = Arc::new(Mutex::new(Some(serve(&dir))));
    let a = node(&scratch.path().join("a"), &served, 1);
    let b = node(&scratch.path().join("b"), &served, 2);
    for n in [&a, &b] {
        n.handle.first_contact(SOON).unwrap();
        assert_eq!(n.read("f"), b"first");
    }
    let stopped = served.lock().unwrap().take().unwrap();
    stopped.stop().unwrap();
    a.wait_online(false);
    b.wait_online(false);
    assert_eq!(a.read("f"), b"first", "away from the server what is cached is answered");
    for k in 0..30 {
        a.create("", &format!("n{k}"), &noise(5000, k));
    }
    assert_eq!(a.handle.status().pending_count, 60);
    *served.lock().unwrap() = Some(serve(&dir));
    a.ship();
    b.wait_online(true);
    for k in 0..30 {
        assert_eq!(std::fs::read(dir.join(format!("n{k}"))).unwrap(), noise(5000, k));
        assert_eq!(b.read(&format!("n{k}")), noise(5000, k));
    }
    // A client that ends with work undone goes on at the next start.
    let stopped = served.lock().unwrap().take().unwrap();
    stopped.stop().unwrap();
    a.create("", "late", b"kept");
    assert!(!a.handle.shutdown(Duration::from_millis(10)));
    drop(a);
    *served.lock().unwrap() = Some(serve(&dir));
    let a = node(&scratch.path().join("a"), &served, 1);
    a.handle.first_contact(SOON).unwrap();
    a.ship();
    assert_eq!(std::fs::read(dir.join("late")).unwrap(), b"kept");
    b.wait_online(true);
    assert_eq!(b.read("late"), b"kept");
    a.handle.shutdown(SOON);
    b.handle.shutdown(SOON);
}
