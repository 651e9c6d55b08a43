//! Power cuts on a real ext4, on either side, with work going on: what was fsynced at a mount is
//! there, and what a server acknowledged; the parts agree again; in the end mount and server are the
//! same. The disk is recorder.rs, what may be and what must is expect.rs.
//!
//! Each cut is a life: work; the process is stopped at a random moment; the disk is what a cut then
//! leaves; the machine starts anew (another boot id in the state); recovery; checks; more work on
//! what was left. `IMZ_POWER_CUTS` says how many a side (8 if not told), `IMZ_POWER_SEED` where the
//! coin begins.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod expect;
mod recorder;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use common::compare::{assert_same_but_times, compare};
use common::tree::Rng;
use common::{AMPLE, Disk, Mount, Server, mount_point, ops, wait_for};
use expect::{Expect, State};
use recorder::Recorder;

fn cuts() -> u64 {
    std::env::var("IMZ_POWER_CUTS").map_or(8, |count| count.parse().unwrap())
}

fn seed() -> u64 {
    std::env::var("IMZ_POWER_SEED").map_or(1, |seed| seed.parse().unwrap())
}

/// As if the machine had been started anew: the page caches are gone.
fn another_boot(path: &Path) {
    let Ok(text) = fs::read_to_string(path) else { return };
    let unsealed: String = text.lines().filter(|line| !line.contains("crc32")).collect();
    let mut state: serde_json::Value = serde_json::from_str(&unsealed).unwrap();
    state["boot_id"] = "before the cut".into();
    fs::write(path, state.to_string()).unwrap();
}

/// The work of one life, which stops in the middle.
struct Work<'a> {
    root: &'a Path,
    expect: &'a Mutex<Expect>,
    /// the process is about to be stopped, or is
    over: &'a AtomicBool,
    rng: Rng,
    life: u64,
    made: u64,
}

impl Work<'_> {
    fn expect(&self) -> MutexGuard<'_, Expect> {
        self.expect.lock().unwrap()
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = *self.rng.pick(&[0, 10, 700, 4096, 9000, 70_000, 300_000]);
        let bytes = self.rng.bytes(len, false);
        // no zeros: what is zero was lost
        bytes.into_iter().map(|byte| byte | 1).collect()
    }

    fn some_file(&mut self) -> Option<String> {
        let files = self.expect().files();
        (!files.is_empty()).then(|| self.rng.pick(&files).clone())
    }

    fn new_path(&mut self) -> String {
        self.made += 1;
        let dir = *self.rng.pick(&["", "d/", "d/e/", "new/"]);
        match dir {
            "new/" => format!("n{}-{}/deep/file", self.life, self.made),
            dir => format!("{dir}{}-{}", self.life, self.made),
        }
    }

    /// Until the stop: an error is the end of the process.
    fn run(mut self) {
        while !self.over.load(Ordering::SeqCst) {
            if self.step().is_err() {
                return;
            }
        }
    }

    fn step(&mut self) -> std::io::Result<()> {
        match self.rng.below(14) {
            0..=4 => self.write_new(),
            5 | 6 => self.rewrite_by_rename(),
            7 => self.append(),
            8 => self.unlink(),
            9 => self.rename(),
            10 => self.overwrite(),
            11 => self.attributes(),
            12 => self.links(),
            _ => {
                std::thread::sleep(Duration::from_millis(self.rng.below(60) as u64));
                Ok(())
            }
        }
    }

    fn write_new(&mut self) -> std::io::Result<()> {
        let (path, bytes, synced) = (self.new_path(), self.bytes(), self.rng.below(3) > 0);
        let at = self.root.join(&path);
        fs::create_dir_all(at.parent().unwrap())?;
        self.expect().asked(&path, State::Written(0, bytes.clone()));
        let mut file = File::create(&at)?;
        file.write_all(&bytes)?;
        if synced {
            file.sync_all()?;
            self.expect().durable(&path, State::Whole(bytes));
        }
        Ok(())
    }

    /// As editors do.
    fn rewrite_by_rename(&mut self) -> std::io::Result<()> {
        let Some(path) = self.some_file() else { return Ok(()) };
        let (bytes, at) = (self.bytes(), self.root.join(&path));
        let new = at.with_extension("tmp");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        self.expect().asked(&path, State::Whole(bytes.clone()));
        fs::rename(&new, &at)?;
        if self.rng.below(2) == 0 {
            File::open(at.parent().unwrap())?.sync_all()?;
            self.expect().durable(&path, State::Whole(bytes));
        }
        Ok(())
    }

    fn append(&mut self) -> std::io::Result<()> {
        let Some(path) = self.some_file() else { return Ok(()) };
        let Some(State::Whole(mut bytes)) = self.expect().newest(&path).cloned() else {
            return Ok(());
        };
        let more = self.bytes();
        let from = bytes.len();
        bytes.extend(&more);
        self.expect().asked(&path, State::Written(from, bytes.clone()));
        let mut file = File::options().append(true).open(self.root.join(&path))?;
        file.write_all(&more)?;
        if self.rng.below(2) == 0 {
            file.sync_all()?;
            self.expect().durable(&path, State::Whole(bytes));
        }
        Ok(())
    }

    fn overwrite(&mut self) -> std::io::Result<()> {
        let Some(path) = self.some_file() else { return Ok(()) };
        let bytes = self.bytes();
        self.expect().asked(&path, State::Absent);
        self.expect().asked(&path, State::Written(0, bytes.clone()));
        let mut file = File::create(self.root.join(&path))?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        self.expect().durable(&path, State::Whole(bytes));
        Ok(())
    }

    fn unlink(&mut self) -> std::io::Result<()> {
        let Some(path) = self.some_file() else { return Ok(()) };
        self.expect().asked(&path, State::Absent);
        fs::remove_file(self.root.join(&path))?;
        if self.rng.below(2) == 0 {
            File::open(self.root.join(&path).parent().unwrap())?.sync_all()?;
            self.expect().durable(&path, State::Absent);
        }
        Ok(())
    }

    /// It is at one of both names, whatever happens, and at the new one when that was synced.
    fn rename(&mut self) -> std::io::Result<()> {
        let Some(path) = self.some_file() else { return Ok(()) };
        let Some(State::Whole(bytes)) = self.expect().newest(&path).cloned() else {
            return Ok(());
        };
        let to = format!("{path}r");
        self.expect().asked(&path, State::Absent);
        self.expect().asked(&to, State::Whole(bytes.clone()));
        fs::rename(self.root.join(&path), self.root.join(&to))?;
        File::open(self.root.join(&to).parent().unwrap())?.sync_all()?;
        self.expect().durable(&path, State::Absent);
        self.expect().durable(&to, State::Whole(bytes));
        Ok(())
    }

    fn attributes(&mut self) -> std::io::Result<()> {
        let Some(path) = self.some_file() else { return Ok(()) };
        let at = self.root.join(path);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600 + self.rng.below(64) as u32);
        fs::set_permissions(&at, mode)?;
        let (value, flags) = (self.rng.bytes(30, true), rustix::fs::XattrFlags::empty());
        Ok(rustix::fs::setxattr(&at, "user.power", &value, flags)?)
    }

    fn links(&mut self) -> std::io::Result<()> {
        self.made += 1;
        let name = format!("l{}-{}", self.life, self.made);
        std::os::unix::fs::symlink("to", self.root.join(&name))?;
        if self.rng.below(2) == 0 {
            fs::remove_file(self.root.join(&name))?;
        }
        Ok(())
    }
}

/// Stops a process, in the middle of whatever it does; on return none of its threads runs.
fn stop(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    let stopped = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // `PID (NAME) STATE ...`: a name may hold anything
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 't']))
    };
    wait_for("all threads are stopped", 10, || {
        fs::read_dir(&tasks).unwrap().all(|task| stopped(task.unwrap()))
    });
}

/// The disk as the cut left it, in place of the one that was cut.
fn come_back(before: Recorder, cut: &Path, dir: &Path) -> Recorder {
    drop(before);
    wait_for("the old disk is gone", 10, || !common::is_mounted(dir));
    Recorder::of(cut, dir).unwrap()
}

/// New files of somebody else, to be fetched while the power goes.
fn of_another(b: &mut Mount, rng: &mut Rng, life: u64, expect: &Mutex<Expect>) {
    b.again();
    fs::create_dir_all(b.at("theirs")).unwrap();
    let large = if life.is_multiple_of(8) { 3 << 20 } else { 300_000 };
    for len in [1, 5000, 70_000, 200_000, large] {
        let path = format!("theirs/{life}-{len}");
        let bytes: Vec<u8> = rng.bytes(len, false).into_iter().map(|byte| byte | 1).collect();
        fs::write(b.at(&path), &bytes).unwrap();
        expect.lock().unwrap().durable(&path, State::Whole(bytes));
    }
    b.sync();
    b.umount();
}

/// Reads what is there, so that it comes.
fn read_all(root: &Path, over: &AtomicBool) {
    while !over.load(Ordering::SeqCst) {
        for dir in ["theirs", "d", ""] {
            let Ok(entries) = fs::read_dir(root.join(dir)) else { continue };
            for entry in entries.flatten() {
                let _ = fs::read(entry.path());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// What recovery found, for who runs it with `--nocapture`.
fn say(said: &str) {
    if let Some(line) = said.lines().rfind(|line| line.contains("in doubt")) {
        eprintln!("{line}");
    }
}

/// A mount's machine loses its power.
#[test]
fn a_client_without_power() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let dir = mount_point();
    let Some(mut cache_disk) = Recorder::new(512, &dir) else { return };
    let mut rng = Rng(seed());
    let kept = tempfile::tempdir_in("/dev/shm").unwrap();
    let cut = kept.path().join("cut");
    let mut server = Server::start(&disk);
    let expect = Mutex::new(Expect::default());
    let mut b = Mount::start(&server, &disk, "cache-b");
    b.umount();
    let cache = dir.join("cache");
    let mut a = Mount::with(server.source(), &cache, "age=0,timeout=20s");
    let mut checked = 0;
    for life in 0..cuts() {
        of_another(&mut b, &mut rng, life, &expect);
        // what it does not know of it would make anew while the server is away: a conflict
        assert!(fs::read_dir(a.at("theirs")).unwrap().count() >= 5);
        let away = rng.below(4) == 0;
        if away {
            server.kill();
        }
        let (over, root, flushes) = (AtomicBool::new(false), a.path().to_owned(), &mut 0);
        std::thread::scope(|scope| {
            let work = Rng(rng.next());
            let work = Work { root: &root, expect: &expect, over: &over, rng: work, life, made: 0 };
            scope.spawn(|| work.run());
            scope.spawn(|| read_all(&root, &over));
            std::thread::sleep(Duration::from_millis(100 + rng.below(1500) as u64));
            stop(a.pid());
            over.store(true, Ordering::SeqCst);
            *flushes = cache_disk.cut(&mut rng, &cut);
            a.kill();
        });
        a.umount_dead();
        assert!(*flushes > 0, "the file system flushes nothing");
        cache_disk = come_back(cache_disk, &cut, &dir);
        another_boot(&cache.join(".imz/state.json"));
        a.again();
        if away {
            server.restart();
        }
        // without the server it shows what the disk kept, and what the server has of it later
        wait_for("it is connected again", 30, || a.is_connected());
        let what = format!("seed {}, life {life}, away {away}", seed());
        let wrong = expect.lock().unwrap().check(a.path());
        if !wrong.is_empty() {
            a.sync();
            for line in &wrong {
                let path = line.split(':').next().unwrap();
                let (here, there) = (fs::read(a.at(path)), fs::read(server.dir().join(path)));
                let alike = here.ok() == there.ok();
                println!("{path}: mount and server are alike: {alike}");
                println!("{}", common::imz_run(&["inspect", a.at(path).to_str().unwrap()]).1);
                println!(
                    "{}",
                    common::imz_run(&["kml", "dump", "--path", path, cache.to_str().unwrap()]).1
                );
            }
        }
        assert!(wrong.is_empty(), "{what}: {wrong:#?}");
        a.sync();
        let differing = compare(a.path(), server.dir());
        assert!(differing.is_empty(), "{what}: {differing:#?}");
        let wrong = expect.lock().unwrap().check(a.path());
        assert!(wrong.is_empty(), "{what}, changed by the sync: {wrong:#?}");
        assert!(!server.dir().join(".imz-conflicts").exists(), "{what}: conflicts");
        checked += expect.lock().unwrap().len();
        say(&a.said());
        // a person would have looked at it
        let _ = fs::remove_dir_all(cache.join(".imz/lost+found"));
    }
    eprintln!("{} cuts of a client, {checked} states of files checked", cuts());
    drop((a, cache_disk));
    let _ = fs::remove_dir(dir);
}

/// Some operations, alike in both. What needs the server after it was cut off is left out: contents
/// that it has, and that came again.
fn in_both(mount: &Path, model: &Path, rng: &mut Rng) {
    for _ in 0..30 {
        let op = ops::Op::random(rng);
        let done = op.apply(mount);
        if done != Err(Some(libc::EHOSTUNREACH)) {
            assert_eq!(done, op.apply(model), "{:.300}", format!("{op:?}"));
        }
    }
}

/// A server's machine loses its power.
#[test]
fn a_server_without_power() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let dir = mount_point();
    let Some(mut served) = Recorder::new(256, &dir) else { return };
    let mut rng = Rng(seed() + 1000);
    let kept = tempfile::tempdir_in("/dev/shm").unwrap();
    let cut = kept.path().join("cut");
    for name in ["served", "state"] {
        fs::create_dir(dir.join(name)).unwrap();
    }
    let mut server = Server::serve(&dir.join("served"), &dir.join("state"));
    let mut a = Mount::with(server.source(), &disk.dir("cache-a"), "age=0,timeout=20s");
    let model = disk.dir("model");
    for root in [a.path(), &model] {
        fs::create_dir(root.join("kept")).unwrap();
    }
    let acknowledged: Mutex<Vec<(String, Vec<u8>)>> = Mutex::default();
    let mut count = 0;
    for life in 0..cuts() {
        let (over, flushes) = (AtomicBool::new(false), &mut 0);
        let (mut theirs, root) = (Rng(rng.next()), a.path().to_owned());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for step in 0.. {
                    if over.load(Ordering::SeqCst) {
                        return;
                    }
                    in_both(&root, &model, &mut theirs);
                    let len = *theirs.pick(&[10, 5000, 200_000]);
                    let (name, bytes) = (format!("kept/{life}-{step}"), theirs.bytes(len, false));
                    fs::write(model.join(&name), &bytes).unwrap();
                    fs::write(root.join(&name), &bytes).unwrap();
                    let words = ["sync", "--timeout", "1s", root.to_str().unwrap()];
                    if theirs.below(2) == 0 && common::imz_run(&words).0 == 0 {
                        acknowledged.lock().unwrap().push((name, bytes));
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(100 + rng.below(1200) as u64));
            stop(server.pid());
            *flushes = served.cut(&mut rng, &cut);
            server.kill();
            over.store(true, Ordering::SeqCst);
        });
        stop(a.pid());
        assert!(*flushes > 0, "the file system flushes nothing");
        served = come_back(served, &cut, &dir);
        for name in ["state.json", "nodes.json"] {
            another_boot(&dir.join("state").join(name));
        }
        let before = server.said().len();
        server.restart();
        let what = format!("seed {}, life {life}", seed());
        for (name, bytes) in acknowledged.lock().unwrap().iter() {
            let found = fs::read(server.dir().join(name)).unwrap_or_default();
            assert!(found == *bytes, "{what}: {name} was acknowledged, and is not there");
        }
        a.thaw();
        a.sync();
        assert_same_but_times(&model, a.path());
        let differing = compare(a.path(), server.dir());
        assert!(differing.is_empty(), "{what}: {differing:#?}");
        assert!(!a.said().contains("has lost"), "{what}: {}", a.said());
        let said = server.said();
        assert!(!said[before..].contains("conflict"), "{what}: {}", &said[before..]);
        if life % 20 == 19 {
            // the disk is small
            for root in [a.path(), &model] {
                fs::remove_dir_all(root.join("kept")).unwrap();
                fs::create_dir(root.join("kept")).unwrap();
            }
            count += acknowledged.lock().unwrap().drain(..).count();
            // no mount of a test lives for long
            a.umount();
            a.again();
        }
    }
    count += acknowledged.lock().unwrap().len();
    eprintln!("{} cuts of a server, {count} acknowledged files checked", cuts());
    assert!(count > 0, "nothing was ever acknowledged");
    drop((a, server, served));
    let _ = fs::remove_dir(dir);
}
