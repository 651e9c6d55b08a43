//! The filter over a real cache, with a lento that is written out line by line.

use std::sync::Mutex;

use super::*;
use crate::kml::log::Log;
use crate::kml::record::{Name, ROOT, Time};
use crate::kml::writers::Writers;
use crate::lento::locks::LockHeld;
use crate::lento::message::Space;
use crate::lento::rights::Held;
use crate::presto::filter::{Lento, Want};
use crate::presto::open::Grip;
use crate::replica::cache::Cache;
use crate::replica::meta::Meta;
use crate::replica::state::{Facts, State};
use crate::replica::tree::Tree;
use crate::sys::cred::{self, Caller};
use crate::sys::fs::o;

type Then = Box<dyn FnOnce(std::result::Result<(), Errno>) + Send>;

/// What the filter asked for, in order, and has not got yet.
#[derive(Default)]
struct Asked {
    locks: Vec<(LockAsk, LockDone)>,
    wants: Vec<(Want, Then)>,
    acks: Vec<(Seq, Then)>,
    cancelled: Vec<u64>,
}

#[derive(Default)]
struct Fake(Mutex<Asked>);

impl Lento for Fake {
    fn when_back(&self, done: Box<dyn FnOnce(bool) + Send>) {
        done(true)
    }
    fn want(&self, want: Want, done: Then) {
        self.0.lock().unwrap().wants.push((want, done));
    }
    fn when_acked(&self, seq: Seq, done: Then) {
        self.0.lock().unwrap().acks.push((seq, done));
    }
    fn space(&self) -> Space {
        Space::default()
    }
    fn lock(&self, ask: LockAsk, done: LockDone) -> u64 {
        self.0.lock().unwrap().locks.push((ask, done));
        7
    }
    fn cancel(&self, waiting: u64) {
        self.0.lock().unwrap().cancelled.push(waiting);
    }
}

const FILE: Fid = Fid(70);

struct Rig {
    dir: tempfile::TempDir,
    filter: Arc<Filter>,
    fake: Arc<Fake>,
}

type How = std::result::Result<Option<LockHeld>, Errno>;
type Told = Arc<Mutex<Vec<How>>>;

/// Online, with one file that is current here, and may be read.
fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    std::fs::create_dir(at("tree")).unwrap();
    let tree = Tree::open(&at("tree"), &at("index"), true).unwrap();
    let log = Log::open_or_create(&at("kml"), 0, 77, crate::kml::log::Options::default()).unwrap();
    let state = State::open(&at("state"), || Facts::new("v", "", 0, 0)).unwrap();
    let cache = Arc::new(Cache::new(tree, log, state, &at("limbo")).unwrap());
    let by = Caller { uid: cred::own().0, gid: cred::own().1, umask: 0 };
    let meta = Meta { epoch: cache.epoch(), ..Meta::whole(FILE) };
    let (root, name) = (cache.tree.root().clone(), Name::new(b"f").unwrap());
    cache.tree.create(&root, &name, by, 0o644, &meta, Time::default()).unwrap();
    cache.set_online(true);
    let fake = Arc::new(Fake::default());
    let rights = Arc::new(Held::default());
    rights.edit(|rights| rights.set_volume(Mode::Read));
    let filter = Arc::new(Filter {
        cache,
        lento: fake.clone(),
        rights,
        files: Default::default(),
        writers: Writers::open(&at("kml")).unwrap(),
        mapped: Default::default(),
        room: crate::lento::grant::Grant::off(),
        by_kernel: Default::default(),
        passthrough: false.into(),
        strict: false,
        forgets_names: false.into(),
    });
    assert!(filter.here(ROOT).is_ok() || filter.here(FILE).is_ok());
    Rig { dir, filter, fake }
}

impl Rig {
    fn ask(&self, kind: LockKind, wait: bool) -> (u64, Told) {
        let told = Told::default();
        let tell = told.clone();
        let (fid, owner, flock, start, end, pid, test) = (FILE, 5, false, 0, 9, 9, false);
        let ask = LockAsk { fid, owner, flock, start, end, kind, pid, wait, test };
        let number = self.filter.lock(ask, Box::new(move |how| tell.lock().unwrap().push(how)));
        (number, told)
    }
    /// The lock that was asked for; it is answered so.
    fn locked(&self, how: How) -> LockKind {
        let (ask, done) = self.fake.0.lock().unwrap().locks.remove(0);
        done(how);
        ask.kind
    }
    fn wanted(&self) -> (Want, Then) {
        self.fake.0.lock().unwrap().wants.remove(0)
    }
    fn counts(&self) -> (usize, usize, usize) {
        let asked = self.fake.0.lock().unwrap();
        (asked.locks.len(), asked.wants.len(), asked.acks.len())
    }
    fn set_stale(&self, stale: bool) {
        let fd = self.filter.cache.tree.open_object(FILE, o::RDWR).unwrap();
        let mut meta = self.filter.cache.tree.meta_of(&fd).unwrap().unwrap();
        meta.stale = stale;
        self.filter.cache.tree.set_meta_of(&fd, &meta).unwrap();
    }
    fn permit(&self, mode: Mode) {
        self.filter.rights.edit(|rights| rights.set(FILE, mode));
    }
    /// Opens the file for writing, with the right to.
    fn writer(&self) -> Grip {
        self.permit(Mode::Write);
        let by = Caller { uid: cred::own().0, gid: cred::own().1, umask: 0 };
        self.filter.open(by, FILE, o::RDWR).unwrap()
    }
    fn write(&self, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(self.dir.path().join("tree/f"));
        file.unwrap().write_all_at(bytes, 0).unwrap();
    }
    fn stores(&self) -> usize {
        self.filter.cache.pending().count() as usize
    }
}

#[test]
fn a_lock_is_told_of_when_what_is_here_is_current() {
    let rig = rig();
    let (number, told) = rig.ask(LockKind::Read, true);
    assert_eq!((number, rig.locked(Ok(None))), (7, LockKind::Read));
    assert_eq!(*told.lock().unwrap(), [Ok(None)]);

    rig.set_stale(true);
    let (_, told) = rig.ask(LockKind::Read, false);
    rig.locked(Ok(None));
    assert!(told.lock().unwrap().is_empty(), "not before it was fetched");
    let (want, fetched) = rig.wanted();
    assert_eq!(want, Want::Object(FILE));
    rig.set_stale(false);
    fetched(Ok(()));
    assert_eq!(*told.lock().unwrap(), [Ok(None)]);

    let (_, told) = rig.ask(LockKind::Read, false);
    rig.locked(Err(Errno::AGAIN));
    assert_eq!(*told.lock().unwrap(), [Err(Errno::AGAIN)]);
    rig.filter.cancel_lock(7);
    assert_eq!(rig.fake.0.lock().unwrap().cancelled, [7]);
}

#[test]
fn a_lock_over_what_cannot_be_fetched_is_given_back() {
    let rig = rig();
    rig.set_stale(true);
    let (_, told) = rig.ask(LockKind::Write, false);
    rig.locked(Ok(None));
    rig.wanted().1(Err(Errno::HOSTUNREACH));
    assert_eq!(rig.locked(Ok(None)), LockKind::Unlock);
    assert_eq!(*told.lock().unwrap(), [Err(Errno::HOSTUNREACH)]);
    // what changes as fast as it comes is taken as it is in the end
    let (_, told) = rig.ask(LockKind::Read, false);
    rig.locked(Ok(None));
    let mut tries = 0;
    while told.lock().unwrap().is_empty() {
        rig.wanted().1(Ok(()));
        tries += 1;
    }
    assert_eq!((tries, &told.lock().unwrap()[..]), (FRESH_TRIES_MAX, &[Ok(None)][..]));
}

#[test]
fn what_was_written_is_journaled_before_the_lock_ends() {
    let rig = rig();
    let open = rig.writer();
    rig.write(b"one");
    let (_, told) = rig.ask(LockKind::Unlock, false);
    assert_eq!(
        (rig.stores(), rig.counts()),
        (1, (1, 0, 0)),
        "the store is there, the unlock asked"
    );
    assert_eq!(rig.locked(Ok(None)), LockKind::Unlock);
    assert_eq!(*told.lock().unwrap(), [Ok(None)]);
    rig.ask(LockKind::Unlock, false);
    assert_eq!(rig.stores(), 1, "nothing new");
    rig.locked(Ok(None));
    // somebody reads it meanwhile: then the server must have it first
    rig.write(b"two");
    rig.permit(Mode::Read);
    let (_, told) = rig.ask(LockKind::Unlock, false);
    assert_eq!((rig.stores(), rig.counts()), (2, (0, 0, 1)));
    let (seq, acked) = rig.fake.0.lock().unwrap().acks.remove(0);
    assert_eq!(seq, rig.filter.cache.log.last());
    acked(Ok(()));
    assert_eq!(rig.locked(Ok(None)), LockKind::Unlock);
    assert_eq!(*told.lock().unwrap(), [Ok(None)]);
    assert!(rig.filter.close(&open).1.is_ok());
}

#[test]
fn a_lock_to_write_comes_with_the_right_to() {
    let rig = rig();
    let open = rig.writer();
    rig.permit(Mode::Read);
    let (_, told) = rig.ask(LockKind::Write, true);
    assert_eq!(rig.locked(Ok(None)), LockKind::Write);
    let (want, granted) = rig.wanted();
    assert_eq!(want, Want::Permit([Some(FILE), None, None, None]));
    assert!(told.lock().unwrap().is_empty());
    rig.permit(Mode::Write);
    granted(Ok(()));
    assert_eq!(*told.lock().unwrap(), [Ok(None)]);
    rig.filter.close(&open).1.unwrap();
    // who cannot write needs none
    rig.permit(Mode::Read);
    let (_, told) = rig.ask(LockKind::Write, true);
    rig.locked(Ok(None));
    assert_eq!(*told.lock().unwrap(), [Ok(None)]);
}
