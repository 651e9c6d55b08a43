//! The harness of the tests that mount for real: disks, servers, mounts, and how to wait.
//!
//! ```text
//! Disk    an ext4 image in memory, loop-mounted: served directories and caches live on it
//! Server  `imz serve` as a child, always on the same port, through all its lives
//! Mount   `imz mount -f` as a child, through all its lives
//! ```
//!
//! Each takes itself away on drop, also after a panic, lazily, and then shows what its processes
//! said. Nothing sleeps where something can be watched: [`wait_for`]. A mount that outlives
//! [`LIFE_MAX`] is killed, so that a hanging operation fails its test instead of the whole run.
//!
//! Without root or /dev/fuse a test says so and ends; with `IMZ_MUST_MOUNT=1` that is a failure.

#![allow(dead_code)] // each test file uses its part
#![allow(clippy::unwrap_used)] // in tests it is the message

pub mod cable;
pub mod compare;
pub mod ops;
pub mod tree;

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::{NamedTempFile, TempDir};

/// Longest life of one mounted process; a hanging operation then gets ENOTCONN.
const LIFE_MAX: Duration = Duration::from_secs(200);
/// Longest run of a command; `IMZ_TREE` may be large.
const COMMAND_TIME_MAX: &str = "900";
const POLL_TIME: Duration = Duration::from_millis(5);
/// Lines of a process's messages that a failure shows.
const SHOWN_LINES_MAX: usize = 60;

/// The program under test; `IMZ` names a copy of it.
pub fn imz() -> String {
    std::env::var("IMZ").unwrap_or_else(|_| env!("CARGO_BIN_EXE_imz").to_owned())
}

/// Polls until it holds; fails the test after `seconds`.
#[track_caller]
pub fn wait_for(what: &str, seconds: u64, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(seconds), "not in {seconds} s: {what}");
        std::thread::sleep(POLL_TIME);
    }
}

/// What cannot be tested here, and why; a failure where it must be.
pub fn unable<T>(why: &str) -> Option<T> {
    let must = std::env::var_os("IMZ_MUST_MOUNT").is_some_and(|it| it == "1");
    assert!(!must, "IMZ_MUST_MOUNT=1, but {why}");
    eprintln!("skipped: {why}");
    None
}

// ---- commands --------------------------------------------------------------------------------

/// A command with a bound on its time.
pub fn command<S: AsRef<OsStr>>(words: &[S]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", COMMAND_TIME_MAX]).args(words);
    command.stdin(Stdio::null()).env("LC_ALL", "C");
    command
}

/// Runs it, wants success, gives its standard output.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(words: &[S]) -> String {
    succeed(&mut command(words))
}

#[track_caller]
pub fn succeed(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, told(&out));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

pub fn told(out: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&out.stdout), text(&out.stderr))
}

/// One run of imz: exit code and messages.
pub fn imz_run<S: AsRef<OsStr>>(words: &[S]) -> (i32, String) {
    let mut all = vec![OsString::from(imz())];
    all.extend(words.iter().map(|it| it.as_ref().to_owned()));
    let out = command(&all).output().unwrap();
    (out.status.code().unwrap_or(-1), told(&out))
}

/// imz must end with this code and name `part` in its messages.
#[track_caller]
pub fn imz_fails<S: AsRef<OsStr>>(words: &[S], code: i32, part: &str) {
    let shown: Vec<_> = words.iter().map(|it| it.as_ref().to_string_lossy()).collect();
    let (got, text) = imz_run(words);
    assert_eq!(got, code, "{shown:?} said: {text}");
    assert!(text.contains(part), "{shown:?} does not speak of {part}: {text}");
}

// ---- disks -----------------------------------------------------------------------------------

/// Enough room that nobody has to count it, MiB: data go past the daemon. Smaller disks are for the
/// exact regime, and for what does not care.
pub const AMPLE: u64 = 4 << 10;

/// An ext4 file system of its own.
pub struct Disk {
    dir: PathBuf,
    _image: TempDir,
}

impl Disk {
    /// `None` says that this machine cannot mount; the caller's test ends then.
    pub fn new(mib: u64) -> Option<Disk> {
        Disk::made(mib, &[])
    }

    /// With no more than about so many inodes.
    pub fn with_files(mib: u64, count: u64) -> Option<Disk> {
        Disk::made(mib, &["-N", &count.to_string()])
    }

    fn made(mib: u64, options: &[&str]) -> Option<Disk> {
        if !rustix::process::geteuid().is_root() {
            return unable("only root can mount disks");
        }
        if let Err(e) = File::options().read(true).write(true).open("/dev/fuse") {
            return unable(&format!("/dev/fuse: {e}"));
        }
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let holder = tempfile::Builder::new().prefix("imz-disk-").tempdir_in(base).unwrap();
        let image = holder.path().join("image");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let image = image.to_str().unwrap();
        run(&[&["mkfs.ext4", "-F", "-q", "-b", "4096"], options, &[image]].concat());
        let dir = mount_point();
        let out = command(&["mount", "-o", "loop", image, dir.to_str().unwrap()]).output().unwrap();
        if !out.status.success() {
            fs::remove_dir(&dir).unwrap();
            return unable(&format!("no loop mount: {}", told(&out)));
        }
        Some(Disk { dir, _image: holder })
    }

    /// Large enough for the tree of [`tree::source`] several times over.
    pub fn for_trees() -> Option<Disk> {
        Disk::new(if tree::is_real() { 16 << 10 } else { 2 << 10 })
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A directory at its root, made if it is missing.
    pub fn dir(&self, name: &str) -> PathBuf {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Fills it but for `left` bytes; the file that does it.
    pub fn fill(&self, left: u64) -> PathBuf {
        let path = self.dir.join("filler");
        let stat = rustix::fs::statvfs(&self.dir).unwrap();
        let len = (stat.f_bfree * stat.f_frsize).saturating_sub(left);
        let file = File::create(&path).unwrap();
        let mode = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, mode, 0, len).unwrap();
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        take_away(&self.dir);
    }
}

/// An empty directory; whoever mounts on it removes it with [`take_away`].
pub fn mount_point() -> PathBuf {
    tempfile::Builder::new().prefix("imz-test-").tempdir().unwrap().keep()
}

/// Lazily, and as often as something is mounted there; never looks below.
fn take_away(point: &Path) {
    while is_mounted(point) {
        let out = Command::new("umount").arg("-l").arg(point).output();
        if !out.is_ok_and(|out| out.status.success()) {
            break;
        }
    }
    let _ = fs::remove_dir(point); // a leftover empty directory fails no test
}

pub fn is_mounted(point: &Path) -> bool {
    let info = fs::read_to_string("/proc/self/mountinfo").unwrap();
    info.lines().any(|line| line.split(' ').nth(4) == point.to_str())
}

// ---- networks --------------------------------------------------------------------------------

thread_local! {
    /// the network name space in which this test's servers and mounts live, if not in ours
    static NETWORK: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A network of its own for the servers and mounts that this thread starts from now on. Mounts are
/// seen in our tree all the same, and control sockets are no part of a network.
pub struct Network(String);

impl Network {
    /// `None` says that this machine has none to give; the caller's test ends then.
    pub fn new(name: &str) -> Option<Network> {
        let name = format!("imz-{name}-{}", std::process::id());
        if !command(&["ip", "netns", "add", &name]).status().is_ok_and(|status| status.success()) {
            return unable("no network name spaces (ip netns)");
        }
        run(&["ip", "-n", &name, "link", "set", "lo", "up"]);
        NETWORK.with(|network| *network.borrow_mut() = Some(name.clone()));
        Some(Network(name))
    }
    /// Every packet is lost from now on, as behind a cut cable: nobody is told.
    pub fn cut(&self) {
        run(&["tc", "-n", &self.0, "qdisc", "replace", "dev", "lo", "root", "blackhole"]);
    }
    pub fn heal(&self) {
        run(&["tc", "-n", &self.0, "qdisc", "del", "dev", "lo", "root"]);
    }
    /// No interface is up: there is no way to anybody.
    pub fn down(&self) {
        run(&["ip", "-n", &self.0, "link", "set", "lo", "down"]);
    }
    pub fn up(&self) {
        run(&["ip", "-n", &self.0, "link", "set", "lo", "up"]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        NETWORK.with(|network| *network.borrow_mut() = None);
        let _ = command(&["ip", "netns", "del", &self.0]).status(); // processes in it keep it
    }
}

// ---- children --------------------------------------------------------------------------------

/// A running imz, and all that it and its earlier lives said.
struct Process {
    child: Option<Child>,
    log: NamedTempFile,
    /// where its next life ends (src/sys/crash.rs)
    crash_at: Option<String>,
    lives: usize,
}

impl Process {
    fn new() -> Process {
        Process { child: None, log: NamedTempFile::new().unwrap(), crash_at: None, lives: 0 }
    }

    fn start(&mut self, words: &[OsString]) {
        assert!(self.child.is_none(), "it runs already");
        let log = self.log.reopen().unwrap();
        let network = NETWORK.with(|network| network.borrow().clone());
        let mut all: Vec<OsString> = Vec::new();
        if let Some(name) = network {
            all.extend(["nsenter".into(), format!("--net=/run/netns/{name}").into(), "--".into()]);
        }
        all.extend(words.iter().cloned());
        let mut command = Command::new(&all[0]);
        command.args(&all[1..]).stdin(Stdio::null()).stdout(Stdio::null());
        self.lives += 1;
        if let Some(point) = self.crash_at.take() {
            command.env("IMZ_CRASH_AT", point);
        }
        // all lives write to the end of one file
        let log = File::options().append(true).open(self.log.path()).unwrap_or(log);
        self.child = Some(command.stderr(log).spawn().unwrap());
    }

    fn said(&self) -> String {
        let mut text = Vec::new();
        File::open(self.log.path()).unwrap().read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("it does not run"))
    }

    /// The exit code, if it has ended.
    fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().unwrap()?;
        Some(status.to_string())
    }

    /// Whether it ended by SIGKILL; then it is gone.
    fn crashed(&mut self) -> bool {
        let status = self.child.as_mut().and_then(|child| child.try_wait().unwrap());
        let crashed = status.is_some_and(|it| it.signal() == Some(Signal::KILL.as_raw()));
        if crashed {
            self.child = None;
        }
        crashed
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill(); // it may have ended
            child.wait().unwrap();
        }
    }

    /// Waits for its own end.
    #[track_caller]
    fn end(&mut self, seconds: u64) {
        let mut child = self.child.take().expect("it does not run");
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if began.elapsed() > Duration::from_secs(seconds) {
                self.child = Some(child);
                panic!("the process does not end in {seconds} s");
            }
            std::thread::sleep(POLL_TIME);
        };
        assert!(status.success(), "{status}");
    }

    fn show(&self, who: &str) {
        let said = self.said();
        let lines: Vec<&str> = said.lines().collect();
        let from = lines.len().saturating_sub(SHOWN_LINES_MAX);
        eprintln!("---- {who} said:\n{}\n----", lines[from..].join("\n"));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

// ---- servers ---------------------------------------------------------------------------------

/// Name of the volume that tests serve.
pub const VOLUME: &str = "vol";

pub struct Server {
    dir: PathBuf,
    state: PathBuf,
    port: u16,
    process: Process,
}

impl Server {
    /// Serves `served` of the disk, with the state in `state` of it.
    pub fn start(disk: &Disk) -> Server {
        Server::serve(&disk.dir("served"), &disk.dir("state"))
    }

    pub fn serve(dir: &Path, state: &Path) -> Server {
        Server::serve_until(dir, state, None)
    }

    /// Its first life ends at a crash point, perhaps before it serves.
    pub fn serve_until(dir: &Path, state: &Path, crash_at: Option<String>) -> Server {
        let mut process = Process::new();
        process.crash_at = crash_at;
        let mut server = Server { dir: dir.to_owned(), state: state.to_owned(), port: 0, process };
        if !server.try_restart() {
            server.restart();
        }
        server
    }

    /// The next life ends there.
    pub fn crash_at(&mut self, point: &str) {
        self.process.crash_at = Some(point.to_owned());
    }

    pub fn lives(&self) -> usize {
        self.process.lives
    }

    /// True when a crash point was met; then another life may begin.
    pub fn crashed(&mut self) -> bool {
        self.process.crashed()
    }

    /// Another life, on the same port and state.
    #[track_caller]
    pub fn restart(&mut self) {
        assert!(self.try_restart(), "it met a crash point");
    }

    /// False when it met a crash point before it served.
    #[track_caller]
    pub fn try_restart(&mut self) -> bool {
        let before = self.process.said().len();
        let export = OsString::from_iter([OsStr::new(VOLUME), OsStr::new("="), self.dir.as_ref()]);
        let listen = format!("127.0.0.1:{}", self.port);
        let words = [imz().into(), "serve".into(), export, "--listen".into(), listen.into()];
        let words = [&words[..], &["--state".into(), self.state.clone().into()]].concat();
        self.process.start(&words);
        let (process, mut port) = (&mut self.process, None);
        let mut crashed = false;
        wait_for("the server says that it serves", 20, || {
            crashed = process.crashed();
            if crashed {
                return true;
            }
            let said = process.said();
            let line = said[before..].lines().find(|it| it.contains("serving ")).map(str::to_owned);
            port = line.and_then(|it| it.rsplit(':').next()?.trim().parse().ok());
            let end = process.ended();
            assert!(end.is_none(), "the server ended at once ({end:?}): {}", process.said());
            port.is_some()
        });
        self.port = port.unwrap_or(self.port);
        !crashed
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn pid(&self) -> u32 {
        self.process.pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// As `imz mount` takes it.
    pub fn source(&self) -> String {
        format!("127.0.0.1:{}:/{VOLUME}", self.port)
    }

    /// SIGTERM; false when it met a crash point on its way to a good end.
    #[track_caller]
    pub fn ended_well(&mut self) -> bool {
        self.process.signal(Signal::TERM);
        let mut crashed = false;
        wait_for("the server ends", 20, || {
            crashed = self.crashed();
            crashed || self.process.ended().is_some()
        });
        self.process.kill();
        !crashed
    }

    /// SIGTERM; it must end well.
    #[track_caller]
    pub fn stop(&mut self) {
        self.process.signal(Signal::TERM);
        self.process.end(20);
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGSTOP: it is there and silent.
    pub fn freeze(&self) {
        self.process.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    pub fn said(&self) -> String {
        self.process.said()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.process.show("the server");
        }
    }
}

// ---- mounts ----------------------------------------------------------------------------------

pub struct Mount {
    point: PathBuf,
    cache: PathBuf,
    source: OsString,
    options: String,
    process: Process,
    alive: Option<mpsc::Sender<()>>,
}

impl Mount {
    /// Mounts the server's volume with a cache of this name on the disk.
    #[track_caller]
    pub fn start(server: &Server, disk: &Disk, cache: &str) -> Mount {
        Mount::with(server.source(), &disk.dir(cache), "")
    }

    /// `options` as for `-o`; empty for none.
    #[track_caller]
    pub fn with(source: impl Into<OsString>, cache: &Path, options: &str) -> Mount {
        Mount::new(source.into(), cache, mount_point(), options)
    }

    /// Mounts on a directory of the caller's.
    #[track_caller]
    pub fn at_point(source: impl Into<OsString>, cache: &Path, point: &Path) -> Mount {
        Mount::new(source.into(), cache, point.to_owned(), "")
    }

    #[track_caller]
    fn new(source: OsString, cache: &Path, point: PathBuf, options: &str) -> Mount {
        let (cache, options) = (cache.to_owned(), options.to_owned());
        let process = Process::new();
        let mut mount = Mount { point, cache, source, options, process, alive: None };
        mount.again();
        mount
    }

    /// Its first life ends at a crash point, perhaps before it is mounted.
    #[track_caller]
    pub fn until(source: &str, cache: &Path, options: &str, crash_at: Option<String>) -> Mount {
        let (cache, options) = (cache.to_owned(), options.to_owned());
        let mut process = Process::new();
        process.crash_at = crash_at;
        let (point, source) = (mount_point(), source.into());
        let mut mount = Mount { point, cache, source, options, process, alive: None };
        if !mount.try_again() {
            mount.again();
        }
        mount
    }

    /// The next life ends there.
    pub fn crash_at(&mut self, point: &str) {
        self.process.crash_at = Some(point.to_owned());
    }

    pub fn lives(&self) -> usize {
        self.process.lives
    }

    /// Waits for its end after an unmount; false when it met a crash point on the way.
    #[track_caller]
    pub fn ended_well(&mut self) -> bool {
        let mut crashed = false;
        wait_for("the mount ends", 20, || {
            crashed = self.crashed();
            crashed || self.process.ended().is_some()
        });
        self.process.kill();
        self.alive = None;
        !crashed
    }

    /// True when a crash point was met: what it left is cleaned up, another life may begin.
    #[track_caller]
    pub fn crashed(&mut self) -> bool {
        let crashed = self.process.crashed();
        if crashed {
            self.alive = None;
            if is_mounted(&self.point) {
                self.umount_dead();
            }
        }
        crashed
    }

    /// Another life of the same mount: same cache, same mount point.
    #[track_caller]
    pub fn again(&mut self) {
        assert!(self.try_again(), "it met a crash point");
    }

    /// False when it met a crash point before it was mounted.
    #[track_caller]
    pub fn try_again(&mut self) -> bool {
        let mut words = vec![imz().into(), "mount".into(), self.source.clone()];
        words.extend([self.point.clone().into(), "--cache".into(), self.cache.clone().into()]);
        words.push("-f".into());
        // for runs of all tests with an option
        let all = std::env::var("IMZ_MOUNT_OPTIONS").unwrap_or_default();
        for options in [&self.options, &all].into_iter().filter(|it| !it.is_empty()) {
            words.extend(["-o".into(), options.into()]);
        }
        self.process.start(&words);
        self.alive = Some(watch(self.process.pid()));
        let (process, point) = (&mut self.process, &self.point);
        let mut crashed = false;
        wait_for("it is mounted", 20, || {
            crashed = process.crashed();
            if crashed {
                return true;
            }
            let end = process.ended();
            assert!(end.is_none(), "the mount ended at once ({end:?}): {}", process.said());
            is_mounted(point) && imz_run(&[OsStr::new("status"), point.as_ref()]).0 == 0
        });
        if crashed {
            self.alive = None;
            if is_mounted(&self.point) {
                self.umount_dead();
            }
        }
        !crashed
    }

    /// As it is mounted from now on.
    pub fn set_source(&mut self, source: impl Into<OsString>) {
        self.source = source.into();
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.point
    }

    pub fn cache(&self) -> &Path {
        &self.cache
    }

    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.point.join(path)
    }

    pub fn pid(&self) -> u32 {
        self.process.pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// SIGSTOP.
    pub fn freeze(&self) {
        self.process.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    /// SIGKILL. The dead mount stays until [`Mount::umount_dead`].
    pub fn kill(&mut self) {
        self.process.kill();
        self.alive = None;
    }

    /// Cleans up after [`Mount::kill`], as a person would.
    #[track_caller]
    pub fn umount_dead(&mut self) {
        let (code, text) = imz_run(&[OsStr::new("umount"), self.point.as_ref()]);
        assert_eq!(code, 0, "umount of a dead mount: {text}");
        assert!(!is_mounted(&self.point), "it is still mounted");
    }

    /// SIGKILL, clean up, mount again.
    #[track_caller]
    pub fn die_and_come_back(&mut self) {
        self.kill();
        self.umount_dead();
        self.again();
    }

    /// Ships, unmounts, and the process ends well.
    #[track_caller]
    pub fn umount(&mut self) {
        let (code, text) = imz_run(&[OsStr::new("umount"), self.point.as_ref()]);
        assert_eq!(code, 0, "umount: {text}");
        self.gone();
    }

    /// After an unmount by other means: the process ends well.
    #[track_caller]
    pub fn gone(&mut self) {
        assert!(!is_mounted(&self.point), "it is still mounted");
        self.process.end(15);
        self.alive = None;
    }

    #[track_caller]
    pub fn sync(&self) {
        let words = ["sync", "--timeout", "150s", self.point.to_str().unwrap()];
        let (code, text) = imz_run(&words);
        assert_eq!(code, 0, "sync: {text}\nstatus: {:#}", self.status());
    }

    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        let words = ["status", "--json", self.point.to_str().unwrap()];
        let (code, text) = imz_run(&words);
        assert_eq!(code, 0, "status: {text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    #[track_caller]
    pub fn is_connected(&self) -> bool {
        self.status()["connected"].as_bool().unwrap()
    }

    #[track_caller]
    pub fn pending(&self) -> u64 {
        self.status()["pending_records"].as_u64().unwrap()
    }

    /// No version was put aside.
    #[track_caller]
    pub fn no_conflicts(&self) {
        assert_eq!(self.status()["conflicts"], 0);
    }

    pub fn said(&self) -> String {
        self.process.said()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.process.show("the mount");
        }
        self.kill();
        take_away(&self.point);
    }
}

/// Kills the process if the sender is not dropped in time.
fn watch(pid: Pid) -> mpsc::Sender<()> {
    let (alive, ended) = mpsc::channel();
    let is_long = tree::is_real() || std::env::var_os("IMZ_PARTITION_OPS").is_some();
    let life_max = if is_long { LIFE_MAX * 10 } else { LIFE_MAX };
    std::thread::spawn(move || {
        if ended.recv_timeout(life_max) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("a mount lived longer than {life_max:?}: killed");
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    alive
}

// ---- other users -----------------------------------------------------------------------------

/// Nobody's uid and gid.
pub const NOBODY: u32 = 65534;

/// Runs words as a user without any right.
pub fn as_nobody<S: AsRef<OsStr>>(words: &[S]) -> Command {
    let mut all: Vec<OsString> = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        .map(OsString::from)
        .to_vec();
    all.extend(words.iter().map(|it| it.as_ref().to_owned()));
    command(&all)
}

/// A copy of the binary that every user may run.
pub fn imz_for_all(disk: &Disk) -> PathBuf {
    let copy = disk.path().join("imz");
    fs::copy(imz(), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(disk.path(), fs::Permissions::from_mode(0o755)).unwrap();
    copy
}
