//! SIGKILL at every instruction that matters: each crash point (src/sys/crash.rs) on each side where
//! it is passed. The process must die there; then it starts again, work goes on to its end, and
//! mount, server and a model agree.
//!
//! What was complete before the crash is there right after it: only the names that the operation
//! under way speaks of may be otherwise.
//!
//! `cargo test --features crash-points --test crash_points`; about two minutes. With `IMZ_CRASH_ONE`
//! in the environment (`SIDE:NAME[:NTH]`, side `a` or `s`) only that one is tried.
#![cfg(feature = "crash-points")]
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::compare::{assert_same_but_times, compare};
use common::ops::Op;
use common::tree::Rng;
use common::{AMPLE, Disk, Mount, Server, command, imz_run, run, wait_for};
use imz::sys::crash::{POINTS, Side};

/// Operations of all kinds, at first.
const OPS: usize = 120;
/// Long enough to be fetched by the server, not sent with its record.
const BIG_LEN: usize = 400_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Mount,
    Server,
}

/// One run up to the crash and a little beyond.
struct World {
    server: Server,
    a: Mount,
    b: Option<Mount>,
    model: PathBuf,
    dir: PathBuf,
    who: Who,
    /// the point was met
    met: bool,
    point: String,
}

impl World {
    fn new(dir: &Path, who: Who, point: &str) -> World {
        let sub = |name: &str| {
            let path = dir.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let crash = |it: Who| (it == who && !is_late(point)).then(|| point.to_owned());
        let server = Server::serve_until(&sub("served"), &sub("state"), crash(Who::Server));
        let source = server.source();
        let a = Mount::until(&source, &sub("cache-a"), "age=0,timeout=5s", crash(Who::Mount));
        let (model, point) = (sub("model"), point.to_owned());
        World { server, a, b: None, model, dir: dir.to_owned(), who, met: false, point }
    }

    /// Starts again whoever died; true if somebody had.
    fn revive(&mut self) -> bool {
        let mut any = false;
        if self.server.crashed() {
            self.server.restart();
            any = true;
        }
        if self.a.crashed() {
            self.a.again();
            any = true;
        }
        self.met |= any;
        any
    }

    /// Does it at the mount and in the model, which must answer alike unless somebody dies.
    fn act(&mut self, touched: &[PathBuf], op: impl Fn(&Path) -> io::Result<()>) {
        let at_mount = op(self.a.path()).map_err(|e| e.raw_os_error());
        let mut dead = self.revive();
        if !dead && matches!(at_mount, Err(Some(libc::ENOTCONN | libc::ECONNABORTED))) {
            wait_for("the mount is dead", 10, || self.revive());
            dead = true;
        }
        if dead {
            self.lost_nothing(touched);
        }
        let in_model = op(&self.model).map_err(|e| e.raw_os_error());
        if !dead && at_mount != in_model {
            // who dies in the middle answers anything
            let began = Instant::now();
            while !dead && began.elapsed() < Duration::from_secs(2) {
                dead = self.revive();
            }
            assert!(dead, "{}: {touched:?}: {at_mount:?}, but {in_model:?}", self.point);
        }
        if dead {
            self.finish();
        }
    }

    /// What was complete before the crash is there.
    fn lost_nothing(&self, touched: &[PathBuf]) {
        let found = compare(&self.model, self.a.path());
        let found: Vec<_> = found.iter().filter(|line| !concerns(line, touched)).collect();
        assert!(found.is_empty(), "{}: lost what was complete: {found:#?}", self.point);
    }

    /// Brings the mount to what the model is, as after an interrupted copy.
    fn finish(&mut self) {
        for _ in 0..3 {
            let (from, to) =
                (format!("{}/", self.model.display()), format!("{}/", self.a.path().display()));
            let words = ["rsync", "-aHAX", "--specials", "--delete", &from, &to];
            let out = command(&words).output().unwrap();
            if !self.revive() && out.status.success() {
                return;
            }
        }
        panic!("{}: the mount cannot be brought up to date", self.point);
    }

    fn sync(&mut self) {
        let point = self.a.path().to_owned();
        self.sync_at(&point);
    }

    /// The last records of the mount, for people.
    fn journal(&self) -> String {
        let copy = self.dir.join("journal");
        let from = self.a.cache().join(".imz/kml");
        run(&["cp", "-a", from.to_str().unwrap(), copy.to_str().unwrap()]);
        let (_, text) = imz_run(&["kml", "dump", copy.to_str().unwrap()]);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    fn sync_at(&mut self, mount: &Path) {
        let mut text = String::new();
        for _ in 0..30 {
            // who is dead is started again while somebody waits for him
            let code;
            (code, text) = imz_run(&["sync", "--timeout", "2s", mount.to_str().unwrap()]);
            if !self.revive() && code == 0 {
                return;
            }
        }
        panic!("{}: sync: {text}", self.point);
    }

    fn write(&mut self, path: &str, bytes: Vec<u8>) {
        self.act(&[path.into()], |root| fs::write(root.join(path), &bytes));
    }

    /// Everything is the same everywhere.
    fn check(&mut self) {
        self.sync();
        assert_same_but_times(&self.model, self.a.path());
        let (tree, server) = (self.a.cache().join("tree"), self.server.dir());
        let backing = compare(&tree, server);
        let wrong = compare(self.a.path(), server);
        assert!(
            wrong.is_empty(),
            "{}: {wrong:#?}, below the mount: {backing:#?}; the end of its journal:\n{}",
            self.point,
            self.journal()
        );
    }
}

/// Whether a line of a comparison speaks of these names, of what is below them, of the directories
/// that they are in, or of how many names an object has.
fn concerns(line: &str, paths: &[PathBuf]) -> bool {
    if line.contains(": mtime ") || line.contains(": links ") || line.contains(": same object") {
        return true;
    }
    let named = line.split('"').nth(1).unwrap_or_default();
    let named = Path::new(named);
    paths.iter().any(|path| named.starts_with(path) || path.parent() == Some(named))
}

fn paths_of(op: &Op) -> Vec<PathBuf> {
    use Op::*;
    match op {
        Rename(a, b, _) | Link(a, b) => vec![a.clone(), b.clone()],
        Symlink(_, a)
        | Write(a, _)
        | Append(a, _)
        | Patch(a, _, _)
        | Truncate(a, _)
        | Mkdir(a)
        | Unlink(a)
        | Rmdir(a)
        | Fifo(a)
        | Chmod(a, _)
        | Chown(a, _, _)
        | SetTime(a, _, _)
        | SetXattr(a, _)
        | RemoveXattr(a) => vec![a.clone()],
    }
}

/// One mount alone: everything that it does by itself.
fn alone(world: &mut World) {
    let mut rng = Rng(77);
    for _ in 0..OPS {
        let op = Op::random(&mut rng);
        let as_io = |e: Option<i32>| io::Error::from_raw_os_error(e.unwrap_or(libc::EIO));
        world.act(&paths_of(&op), |root| op.apply(root).map_err(as_io));
        if world.met {
            return;
        }
    }
    world.act(&["links".into()], |root| fs::create_dir(root.join("links")));
    // long records, so that a segment ends
    let target = "t".repeat(4000);
    for nth in 0..80 {
        let name = PathBuf::from(format!("links/{nth}"));
        world.act(std::slice::from_ref(&name), |root| symlink(&target, root.join(&name)));
        if world.met {
            return;
        }
    }
    for round in 0..2u8 {
        let big = vec![round + 1; BIG_LEN + usize::from(round)];
        let both = ["big".into(), "linked".into()];
        world.act(&both, |root| fs::write(root.join("big"), &big));
        // with a second name it is stored in place, the second time
        world.act(&["linked".into()], |root| {
            match fs::hard_link(root.join("big"), root.join("linked")) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                done => done,
            }
        });
        world.write("small", vec![round + 1; 3000]);
        world.act(&["synced".into()], |root| {
            let mut file = File::create(root.join("synced"))?;
            file.write_all(&[round; 100])?;
            file.sync_all()?;
            File::open(root)?.sync_all()
        });
        world.sync();
        if world.met {
            return;
        }
    }
}

/// A clean end: it keeps, and trims.
fn the_end(world: &mut World) {
    let (code, text) = imz_run(&["umount", world.a.path().to_str().unwrap()]);
    let well = world.a.ended_well();
    world.met |= !well;
    assert!(world.met || code == 0, "{}: {text}", world.point);
    if world.who == Who::Mount && !world.met {
        world.a.crash_at(&world.point); // what is only met later
    }
    if !world.a.try_again() {
        world.met = true;
        world.a.again();
    }
    if world.who == Who::Server && !world.met {
        world.met = !world.server.ended_well();
        world.server.crash_at(if world.met { "" } else { &world.point });
        if !world.server.try_restart() {
            world.met = true;
            world.server.restart();
        }
    }
}

/// A second mount changes what the first one has.
fn with_another(world: &mut World) {
    let source = world.server.source();
    let cache = world.dir.join("cache-b");
    fs::create_dir_all(&cache).unwrap();
    let b = Mount::until(&source, &cache, "age=0,timeout=5s", None);
    let model = world.model.clone();
    for root in [b.path(), &model] {
        fs::create_dir_all(root.join("from b/deep")).unwrap();
        fs::write(root.join("from b/deep/file"), vec![9; 3 << 20]).unwrap();
        fs::write(root.join("small"), vec![8; 5000]).unwrap();
        fs::rename(root.join("links"), root.join("from b/links")).unwrap();
        fs::remove_file(root.join("big")).unwrap();
    }
    let point = b.path().to_owned();
    world.b = Some(b);
    world.sync_at(&point);
    // the first one lists and reads all of it
    for _ in 0..3 {
        let read = ["rsync", "-a", &format!("{}/", world.a.path().display())];
        let to = world.dir.join("read");
        let words = [&read[..], &[to.to_str().unwrap()]].concat();
        let out = command(&words).output().unwrap();
        if !world.revive() && out.status.success() {
            break;
        }
    }
    if !world.met {
        assert_same_but_times(&world.model, world.a.path());
    }
}

/// Both change one file while the server is away: the first one that comes is right.
fn conflict(world: &mut World) {
    let Some(b) = world.b.as_mut() else { return };
    let point = format!("{}:1", world.point);
    world.server.kill();
    let away = |mount: &Mount| {
        wait_for("it sees that the server is away", 15, || !mount.is_connected());
    };
    away(b);
    away(&world.a);
    b.freeze();
    fs::write(world.a.at("small"), "of a").unwrap();
    fs::write(world.model.join("small"), "of a").unwrap();
    if world.who == Who::Server {
        world.server.crash_at(&point);
    }
    if !world.server.try_restart() {
        world.met = true;
        world.server.restart();
    }
    world.sync();
    world.server.kill();
    b_writes(world);
    if world.who == Who::Server && !world.met {
        world.server.crash_at(&point);
    }
    if !world.server.try_restart() {
        world.met = true;
        world.server.restart();
    }
    let b = world.b.as_ref().unwrap().path().to_owned();
    world.sync_at(&b);
    let kept = world.server.dir().join(".imz-conflicts");
    let data = run(&["find", kept.to_str().unwrap(), "-name", "data"]);
    let data: Vec<&str> = data.lines().collect();
    assert_eq!(data.len(), 1, "{}: {data:?}", world.point);
    assert_eq!(fs::read(data[0]).unwrap(), b"of b", "{}", world.point);
}

/// With no server in reach; it was asleep while the first one's change came.
fn b_writes(world: &mut World) {
    let b = world.b.as_ref().unwrap();
    b.thaw();
    wait_for("b sees that the server is away", 30, || !b.is_connected());
    fs::write(b.at("small"), "of b").unwrap();
}

/// Points that are passed only in a life after a crash, or after a loss of power.
fn is_late(point: &str) -> bool {
    ["recover-settled", "power-redone", "power-journaled"].iter().any(|it| point.starts_with(it))
}

fn late(world: &mut World) {
    world.write("before", vec![1; 100]);
    let point = world.point.clone();
    match (world.who, &point[..]) {
        (Who::Mount, "recover-settled") => {
            world.a.kill();
            world.a.umount_dead();
            world.a.crash_at("change-done:2");
            world.a.again();
            let _ = fs::write(world.a.at("w"), "");
            let _ = fs::write(world.a.at("w2"), "");
            wait_for("it is dead", 10, || world.a.crashed());
            world.a.crash_at("recover-settled");
            world.met = !world.a.try_again();
            if world.met {
                world.a.again();
            }
            world.finish();
        }
        (Who::Server, _) => {
            world.sync();
            world.server.kill();
            world.server.crash_at("apply-done");
            world.server.restart();
            fs::write(world.a.at("x"), "x").unwrap();
            fs::write(world.model.join("x"), "x").unwrap();
            wait_for("it is dead", 10, || world.server.crashed());
            world.server.crash_at("recover-settled");
            world.met = !world.server.try_restart();
            if world.met {
                world.server.restart();
            }
        }
        (Who::Mount, point) => {
            world.server.kill();
            for nth in 0..20 {
                world.write(&format!("in doubt {nth}"), vec![3; nth]);
            }
            world.a.kill();
            world.a.umount_dead();
            power_was_lost(world.a.cache());
            let tree = world.a.cache().join("tree");
            for root in [&tree, &world.model] {
                // as the file system may have kept it, when the journal's page was lost
                fs::rename(root.join("in doubt 3"), root.join("moved")).unwrap();
            }
            world.a.crash_at(point);
            world.met = !world.a.try_again();
            if world.met {
                world.a.again();
            }
            world.server.restart();
        }
    }
}

/// As if the machine had been started anew since.
fn power_was_lost(cache: &Path) {
    let path = cache.join(".imz/state.json");
    let text = fs::read_to_string(&path).unwrap();
    let unsealed: String = text.lines().filter(|line| !line.contains("crc32")).collect();
    let mut state: serde_json::Value = serde_json::from_str(&unsealed).unwrap();
    state["boot_id"] = "another".into();
    state["clean"] = false.into();
    fs::write(&path, state.to_string()).unwrap();
}

fn try_point(dir: &Path, who: Who, point: &str) -> bool {
    let mut world = World::new(dir, who, point);
    if is_late(point) {
        late(&mut world);
    } else {
        world.met |= starts(&world) > 1;
        let phases: [fn(&mut World); 4] = [alone, the_end, with_another, conflict];
        for phase in phases {
            if !world.met {
                phase(&mut world);
            }
        }
    }
    world.check();
    world.met
}

/// How many lives began.
fn starts(world: &World) -> usize {
    match world.who {
        Who::Server => world.server.lives(),
        Who::Mount => world.a.lives(),
    }
}

#[test]
fn every_point_is_met_and_survived() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let mut todo: Vec<(Who, String)> = Vec::new();
    if let Ok(one) = std::env::var("IMZ_CRASH_ONE") {
        let (side, point) = one.split_once(':').unwrap();
        todo.push((if side == "a" { Who::Mount } else { Who::Server }, point.to_owned()));
    } else {
        for (name, side) in POINTS {
            let at = |who| (who, (*name).to_owned());
            match side {
                Side::Client => todo.push(at(Who::Mount)),
                Side::Server => todo.push(at(Who::Server)),
                Side::Both => todo.extend([at(Who::Mount), at(Who::Server)]),
            }
        }
        assert!(todo.len() >= 50, "the points were not found");
    }
    let count = todo.len();
    let (todo, missed) = (Mutex::new(todo), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((who, point)) = todo.lock().unwrap().pop() else { break };
                    let began = Instant::now();
                    let name = format!("{who:?}-{}", point.replace(':', "-"));
                    // what is shipped together, and thereby left out, is a matter of time
                    let met = (0..3).any(|_| {
                        let met = try_point(&disk.dir(&name), who, &point);
                        fs::remove_dir_all(disk.path().join(&name)).unwrap();
                        met
                    });
                    eprintln!("{name}: {:.1} s", began.elapsed().as_secs_f32());
                    if !met {
                        missed.lock().unwrap().push(name);
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "never met: {missed:?}");
    eprintln!("{count} crashes");
}
