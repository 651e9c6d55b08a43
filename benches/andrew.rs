//! An Andrew-style benchmark: a real source tree in a mount, and in the bare file system below.
//!
//!   cargo bench --bench andrew -- SOURCE_TREE [--rounds N] [--dir WHERE] [--json]
//!                                 [--options OPTS] [--against OPTS] [--filter PROGRAM]
//!                                 [--server-mib N]
//!
//! `--options` are the mount's; with `--against` the other side is no bare file system but a second
//! mount with these (`--against reserve=off`); with `--filter` it is a FUSE file system that passes
//! on all it is asked, and no more: `passthrough_ll` of libfuse, or what takes the same arguments. Such
//! a filter's times are what any filter costs here. `--server-mib` makes the servers' disks so large
//! that room is scarce, or not.
//!
//! As root, each side gets an ext4 image of its own in /dev/shm (or in WHERE, on any disk);
//! otherwise both work in WHERE. Server and mount are processes of the release binary. The two
//! sides do each phase in turn, several rounds, first one and then the other: what disturbs the
//! machine disturbs both. Shipping goes on meanwhile, as in life; only before `remove` and between
//! rounds is it awaited, outside the timing. Everything made is removed at the end.
//!
//! The source of the idea: Howard et al., "Scale and performance in a distributed file system",
//! 1988, and InterMezzo's own tables.

#![allow(clippy::unwrap_used)] // a failure ends the run, and says where

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

const PHASES: [&str; 12] = [
    "make directories",
    "copy",
    "scan (cold)",
    "scan (warm)",
    "read all",
    "compile",
    "remove",
    "read 1 MiB cached",
    "overwrite 1 MiB",
    "overwrite 4 KiB",
    "append 200 bytes",
    "append 4 KiB",
];
const PROGRAM_FILES: usize = 40;
/// Length of the file of the small phases, and how often it is gone through.
const FILE_LEN: usize = 64 << 20;
const SMALL_COUNT: usize = 200_000;
/// So often a block is appended.
const APPEND_COUNT: usize = 20_000;

struct Args {
    tree: PathBuf,
    rounds: usize,
    dir: Option<PathBuf>,
    json: bool,
    options: String,
    /// options of a second mount, in place of the bare side
    against: Option<String>,
    /// a filter of nothing, in place of the bare side
    filter: Option<String>,
    server_mib: u64,
}

fn main() {
    let Some(args) = arguments() else {
        // cargo bench and cargo test run every bench; without a tree there is nothing to do
        eprintln!(
            "andrew: cargo bench --bench andrew -- SOURCE_TREE [--rounds N] [--dir WHERE] [--json]"
        );
        return;
    };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).unwrap();
    }
    let work = Work::new(&args, stop);
    let mut times: Vec<[Vec<f64>; 2]> = vec![Default::default(); PHASES.len()];
    for round in 0..args.rounds {
        if !args.json {
            eprintln!("round {} of {}", round + 1, args.rounds);
        }
        for (i, phase) in PHASES.iter().enumerate() {
            // the order changes, so that neither side always comes second
            let order = if (round + i) % 2 == 0 { [0, 1] } else { [1, 0] };
            for side in order {
                if work.stop.load(Ordering::Relaxed) {
                    eprintln!("andrew: interrupted");
                    return;
                }
                if *phase == "remove" && side == 1 {
                    work.sync();
                }
                times[i][side].push(work.measure(phase, side));
            }
        }
        work.sync();
    }
    report(&args, &times);
}

fn arguments() -> Option<Args> {
    let mut args = Args {
        tree: PathBuf::new(),
        rounds: 5,
        dir: None,
        json: false,
        options: String::new(),
        against: None,
        filter: None,
        server_mib: 8 << 10,
    };
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--bench" | "--test") => {}
            Some("--json") => args.json = true,
            Some("--rounds") => args.rounds = words.next()?.to_str()?.parse().ok()?,
            Some("--options") => args.options = words.next()?.into_string().ok()?,
            Some("--against") => args.against = Some(words.next()?.into_string().ok()?),
            Some("--filter") => args.filter = Some(words.next()?.into_string().ok()?),
            Some("--server-mib") => args.server_mib = words.next()?.to_str()?.parse().ok()?,
            Some("--dir") => args.dir = Some(words.next()?.into()),
            Some(word) if word.starts_with('-') => return None,
            _ => args.tree = word.into(),
        }
    }
    (args.tree.is_dir() && args.rounds > 0).then_some(args)
}

// ---- the two sides ---------------------------------------------------------------------------

/// Both sides: 0 is the bare file system, 1 the mount. Taken away on drop.
struct Work {
    tree: PathBuf,
    stop: Arc<AtomicBool>,
    roots: [PathBuf; 2],
    mounts: Vec<Mounted>,
    filter: Option<(Child, PathBuf)>,
    images: Vec<PathBuf>,
    base: PathBuf,
    is_root: bool,
}

/// A server, and its one mount.
struct Mounted {
    server: Child,
    mount: Child,
    point: PathBuf,
}

fn imz() -> &'static str {
    env!("CARGO_BIN_EXE_imz")
}

impl Work {
    fn new(args: &Args, stop: Arc<AtomicBool>) -> Work {
        let is_root = rustix::process::geteuid().is_root();
        let memory = Path::new("/dev/shm");
        let default =
            if is_root && memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let holder = args.dir.clone().unwrap_or(default);
        let base =
            tempfile::Builder::new().prefix("imz-andrew-").tempdir_in(holder).unwrap().keep();
        let (mut images, mut disks) = (Vec::new(), Vec::new());
        for name in ["bare", "cache", "server", "server-2"] {
            let disk = base.join(name);
            fs::create_dir(&disk).unwrap();
            if is_root {
                images.push(disk.clone());
                let mib = if name.starts_with("server") { args.server_mib } else { 16 << 10 };
                make_disk(&base.join(format!("{name}.img")), &disk, mib);
            }
            disks.push(disk);
        }
        let tree = args.tree.canonicalize().unwrap();
        let mut mounts = vec![mounted(&base, "mount", &disks[1], &disks[2], &args.options)];
        let mut roots = [disks[0].join("work"), mounts[0].point.join("work")];
        if let Some(options) = &args.against {
            mounts.push(mounted(&base, "mount-2", &disks[0], &disks[3], options));
            roots[0] = mounts[1].point.join("work");
        }
        let filter = args.filter.as_ref().map(|program| filtered(&base, &disks[0], program));
        if let Some((_, point)) = &filter {
            roots[0] = point.join("work");
        }
        Work { tree, stop, roots, mounts, filter, images, base, is_root }
    }

    fn sync(&self) {
        for mounted in &self.mounts {
            run(Command::new(imz()).arg("sync").arg(&mounted.point).stderr(Stdio::null()));
        }
    }

    /// Seconds that one phase took on one side.
    fn measure(&self, phase: &str, side: usize) -> f64 {
        let root = &self.roots[side];
        match phase {
            "make directories" => timed(|| self.make_directories(root)),
            "copy" => {
                let (from, to) = (self.tree.join("."), root.join("copy"));
                timed(|| run(Command::new("cp").arg("-a").arg(from).arg(to)))
            }
            "scan (cold)" => {
                forget();
                timed(|| scan(root))
            }
            "scan (warm)" => timed(|| scan(root)),
            "read all" => timed(|| {
                let script = "find \"$0\" -type f -print0 | xargs -0 cat > /dev/null";
                run(Command::new("sh").args(["-c", script]).arg(root));
            }),
            "compile" => {
                let dir = root.join("program");
                write_program(&dir);
                timed(|| run(Command::new("make").args(["-s", "-j2", "-C"]).arg(dir)))
            }
            "remove" => timed(|| run(Command::new("rm").arg("-rf").arg(root))),
            _ => self.in_one_file(phase, root, side),
        }
    }

    fn make_directories(&self, root: &Path) {
        let below = root.join("directories");
        fs::create_dir_all(&below).unwrap();
        let mut queue = vec![(self.tree.clone(), below)];
        while let Some((from, to)) = queue.pop() {
            for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    let made = to.join(entry.file_name());
                    fs::create_dir(&made).unwrap();
                    queue.push((entry.path(), made));
                }
            }
        }
    }

    /// The small phases: one open file, filled outside the timing, and all of it shipped.
    fn in_one_file(&self, phase: &str, root: &Path, side: usize) -> f64 {
        let path = root.with_file_name("large");
        fs::write(&path, vec![7; FILE_LEN]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.sync_all().unwrap();
        if side == 1 || self.mounts.len() == 2 {
            self.sync();
        }
        let mut bytes = vec![9; 1 << 20];
        let each = |file: &File, act: &mut dyn FnMut(&File, u64)| {
            // once to warm up
            for turn in 0..9 {
                for at in
                    (0..FILE_LEN).step_by(1 << 20).take(if turn == 0 { 8 } else { usize::MAX })
                {
                    act(file, at as u64);
                }
            }
        };
        let seconds = match phase {
            "read 1 MiB cached" => {
                timed(|| each(&file, &mut |file, at| file.read_exact_at(&mut bytes, at).unwrap()))
            }
            "overwrite 1 MiB" => {
                timed(|| each(&file, &mut |file, at| file.write_all_at(&bytes, at).unwrap()))
            }
            "overwrite 4 KiB" => timed(|| {
                for i in 0..SMALL_COUNT {
                    // spread, and aligned
                    let at = (i * 7919 * 4096) % FILE_LEN;
                    file.write_all_at(&bytes[..4096], at as u64).unwrap();
                }
            }),
            _ => {
                let mut file = File::options().append(true).open(&path).unwrap();
                let (count, len) = match phase {
                    "append 200 bytes" => (SMALL_COUNT, 200),
                    _ => (APPEND_COUNT, 4096),
                };
                timed(|| {
                    for _ in 0..count {
                        std::io::Write::write_all(&mut file, &bytes[..len]).unwrap();
                    }
                })
            }
        };
        drop(file);
        fs::remove_file(path).unwrap();
        seconds
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        for Mounted { server, mount, point } in &mut self.mounts {
            let _ = Command::new(imz()).args(["umount", "--now"]).arg(&*point).status();
            let _ = mount.kill();
            let _ = mount.wait();
            if self.is_root {
                let _ = Command::new("umount").arg("-l").arg(point).stderr(Stdio::null()).status();
            }
            let _ = server.kill();
            let _ = server.wait();
        }
        if let Some((program, point)) = &mut self.filter {
            let _ = Command::new("umount").arg("-l").arg(point).status();
            let _ = program.kill();
            let _ = program.wait();
        }
        for image in &self.images {
            let _ = Command::new("umount").arg("-l").arg(image).status();
        }
        // never below what is still mounted: a failed unmount must not empty a disk
        let info = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        match info.contains(&*self.base.to_string_lossy()) {
            true => eprintln!("andrew: something is still mounted in {}", self.base.display()),
            false => drop(fs::remove_dir_all(&self.base)),
        }
    }
}

/// A server on one disk, mounted as `name` with its cache on the other.
fn mounted(base: &Path, name: &str, disk: &Path, served: &Path, options: &str) -> Mounted {
    let (served, state) = (served.join("served"), served.join("state"));
    let (cache, point) = (disk.join("cache"), base.join(name));
    for dir in [&served, &state, &cache, &point] {
        fs::create_dir(dir).unwrap();
    }
    let (server, port) = start_server(&served, &state, &base.join(format!("{name}-server.log")));
    let mut mount = Command::new(imz());
    mount.args(["mount", "-f", &format!("127.0.0.1:{port}:/andrew")]).arg(&point);
    mount.arg("--cache").arg(&cache);
    if !options.is_empty() {
        mount.args(["-o", options]);
    }
    let log = File::create(base.join(format!("{name}.log"))).unwrap();
    let mount = mount.stderr(log).spawn().unwrap();
    let up = || Command::new(imz()).arg("status").arg(&point).output().unwrap().status;
    wait(|| up().success());
    Mounted { server, mount, point }
}

/// The bare side's disk, seen through a filter.
fn filtered(base: &Path, disk: &Path, program: &str) -> (Child, PathBuf) {
    let (source, point) = (disk.join("source"), base.join("filtered"));
    for dir in [&source, &point] {
        fs::create_dir(dir).unwrap();
    }
    // that of libfuse keeps a descriptor of each file that the kernel knows
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let options = format!("source={},cache=always,xattr,timeout=86400", source.display());
    let mut command = Command::new(program);
    let program = command.args(["-f", "-o", &options]).arg(&point).spawn().unwrap();
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    wait(|| device(&point) != device(base));
    (program, point)
}

fn make_disk(image: &Path, point: &Path, mib: u64) {
    File::create(image).unwrap().set_len(mib << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-F", "-q"]).arg(image));
    run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(point));
}

/// The server, and the port that it says.
fn start_server(served: &Path, state: &Path, log: &Path) -> (Child, u16) {
    let server = Command::new(imz())
        .args([
            "serve",
            &format!("andrew={}", served.display()),
            "--listen",
            "127.0.0.1:0",
            "--state",
        ])
        .arg(state)
        .stderr(File::create(log).unwrap())
        .spawn()
        .unwrap();
    let mut port = None;
    wait(|| {
        let said = fs::read_to_string(log).unwrap();
        port = said.lines().find_map(|it| it.rsplit_once(':')?.1.trim().parse().ok());
        port.is_some()
    });
    (server, port.unwrap())
}

fn wait(mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(20), "imz does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

fn timed(act: impl FnOnce()) -> f64 {
    let began = Instant::now();
    act();
    began.elapsed().as_secs_f64()
}

fn scan(root: &Path) {
    let words = ["-printf", "%p %s %m %u %T@\\n"];
    run(Command::new("find").arg(root).args(words).stdout(Stdio::null()));
}

/// The kernel forgets names and attributes, of both sides; only root can ask for it.
fn forget() {
    let _ = fs::write("/proc/sys/vm/drop_caches", "2");
}

/// Files with something to do for the compiler, that include common headers.
fn write_program(dir: &Path) {
    fs::create_dir(dir).unwrap();
    let names: Vec<String> = (0..PROGRAM_FILES).map(|i| format!("part{i}")).collect();
    for (i, name) in names.iter().enumerate() {
        let mut text =
            String::from("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n");
        for j in 0..30 {
            text.push_str(&format!(
                "static int f{j}(int x, char *s) {{\n  for (int i = 0; i < x; i++) s[i % 8] += \
                 (char)(x * {j} + i);\n  return x + (int)strlen(s) + {i};\n}}\n"
            ));
        }
        let calls: Vec<String> = (0..30).map(|j| format!("f{j}(x, s)")).collect();
        text.push_str(&format!(
            "int {name}(int x) {{ char s[9] = \"abcdefgh\"; return {}; }}\n",
            calls.join(" + ")
        ));
        fs::write(dir.join(format!("{name}.c")), text).unwrap();
    }
    let declared: String = names.iter().map(|it| format!("int {it}(int);")).collect();
    let calls: Vec<String> = names.iter().map(|it| format!("{it}(n)")).collect();
    let main = format!(
        "{declared}\nint main(int n, char **v) {{ (void)v; return {}; }}\n",
        calls.join("+")
    );
    fs::write(dir.join("main.c"), main).unwrap();
    let objects: String = names.iter().map(|it| format!("{it}.o ")).collect();
    let makefile = format!("CFLAGS = -O1\nprogram: main.o {objects}\n\tcc -o $@ $^\n");
    fs::write(dir.join("Makefile"), makefile).unwrap();
}

// ---- the report ------------------------------------------------------------------------------

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// Ratios are imz over bare: below 1, imz is the faster one. That of pairs compares what ran one
/// after the other, and then takes the median.
fn report(args: &Args, times: &[[Vec<f64>; 2]]) {
    let rows = PHASES.iter().zip(times).map(|(phase, [bare, imz])| {
        let (a, b) = (median(bare.iter().copied()), median(imz.iter().copied()));
        let pairs = median(bare.iter().zip(imz).map(|(bare, imz)| imz / bare));
        (*phase, a, b, b / a, pairs)
    });
    if args.json {
        let rows: Vec<_> = rows
            .zip(times)
            .map(|((phase, bare, imz, ratio, pairs), all)| {
                json!({ "phase": phase, "bare_seconds": bare, "imz_seconds": imz, "ratio": ratio,
                        "ratio_of_pairs": pairs, "all_seconds": { "bare": all[0], "imz": all[1] } })
            })
            .collect();
        println!("{:#}", json!({ "tree": args.tree, "rounds": args.rounds, "phases": rows }));
        return;
    }
    let other = if args.filter.is_some() {
        "filter s"
    } else if args.against.is_some() {
        "against s"
    } else {
        "bare s"
    };
    println!("{:<20} {:>10} {:>10} {:>10} {:>10}", "phase", other, "imz s", "ratio", "pairs");
    for (phase, bare, imz, ratio, pairs) in rows {
        println!("{phase:<20} {bare:>10.3} {imz:>10.3} {ratio:>10.3} {pairs:>10.3}");
    }
}
