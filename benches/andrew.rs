//! An Andrew-style benchmark: a mount against the bare file system below it, in one run, in turn.
//!
//! ```text
//! cargo bench --bench andrew -- SOURCE_TREE [--rounds N] [--options OPTS] [--json]
//! ```
//!
//! Makes an ext4 image in memory for the bare side, the served directory and the cache; starts
//! `imz serve` and `imz mount`; then, each round, every phase on both sides, one after the other,
//! and which side begins changes from round to round. Shipping goes on meanwhile, as in life; it
//! is waited for, outside the timings, before the removal and between rounds. Needs root.
//! Source: the Andrew benchmark (Howard and others, 1988), with the copy by `cp -a`.

#![allow(clippy::unwrap_used)] // a benchmark that cannot run says why and ends

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use common::{Disk, imz, wait_for};

/// Size of the image, MiB; sparse.
const DISK_MIB: u64 = 12 << 10;
/// Units of the program that is compiled, and functions in each.
const UNITS: usize = 40;
const FUNCTIONS: usize = 60;
const MICRO_LEN: usize = 256 << 20;

struct Args {
    tree: PathBuf,
    rounds: usize,
    options: String,
    json: bool,
}

fn main() {
    let Some(args) = args() else {
        eprintln!(
            "usage: cargo bench --bench andrew -- SOURCE_TREE [--rounds N] [--options OPTS] [--json]"
        );
        // `cargo bench` without arguments runs the other benchmarks; that is no failure
        return;
    };
    let Some(disk) = Disk::new(DISK_MIB) else { std::process::exit(1) };
    let mut setup = Setup::start(&disk, &args.options);
    let mut table = Vec::new();
    for round in 0..args.rounds {
        for (nth, phase) in PHASES.iter().enumerate() {
            let (mut bare, mut mounted) = (0.0, 0.0);
            let sides = if round % 2 == 0 { [true, false] } else { [false, true] };
            for is_bare in sides {
                if phase.ship_first && !is_bare {
                    setup.sync();
                }
                let dir = if is_bare { &setup.bare } else { &setup.mounted };
                let began = Instant::now();
                (phase.run)(dir, &args.tree);
                let took = began.elapsed().as_secs_f64();
                *(if is_bare { &mut bare } else { &mut mounted }) = took;
            }
            if table.len() <= nth {
                table.push((phase.name, Vec::new()));
            }
            table[nth].1.push((bare, mounted));
        }
        setup.sync();
    }
    setup.end();
    print(&table, args.json);
}

fn args() -> Option<Args> {
    let (mut tree, mut rounds, mut options, mut json) = (None, 5, String::new(), false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match &*word {
            "--bench" => {} // cargo's
            "--rounds" => rounds = words.next()?.parse().ok()?,
            "--options" => options = words.next()?,
            "--json" => json = true,
            _ if word.starts_with('-') => return None,
            _ => tree = Some(fs::canonicalize(&word).ok()?),
        }
    }
    Some(Args { tree: tree?, rounds, options, json })
}

struct Setup {
    bare: PathBuf,
    mounted: PathBuf,
    children: Vec<Child>,
}

impl Setup {
    fn start(disk: &Disk, options: &str) -> Setup {
        let (bare, served, cache) = (disk.dir("bare"), disk.dir("served"), disk.dir("cache"));
        let mounted = common::mount_point();
        let said = disk.path().join("serve.log");
        let export = format!("v={}", served.display());
        let mut serve = Command::new(imz());
        serve.args(["serve", &export, "--listen", "127.0.0.1:0"]);
        let server = serve.stderr(File::create(&said).unwrap()).spawn().unwrap();
        let mut children = vec![server];
        let mut port = String::new();
        wait_for("the server", 10, || {
            let text = fs::read_to_string(&said).unwrap();
            let found = text.trim().rsplit_once(':').map(|(_, port)| port.to_owned());
            port = found.filter(|_| text.ends_with('\n')).unwrap_or_default();
            !port.is_empty()
        });
        let mut mount = Command::new(imz());
        mount.args(["mount", "-f", &format!("127.0.0.1:{port}:/v")]).arg(&mounted);
        mount.arg("--cache").arg(&cache);
        if !options.is_empty() {
            mount.args(["-o", options]);
        }
        children.push(mount.stderr(Stdio::null()).spawn().unwrap());
        wait_for("the mount", 10, || common::is_mounted(&mounted));
        Setup { bare, mounted, children }
    }

    fn sync(&self) {
        assert!(Command::new(imz()).arg("sync").arg(&self.mounted).status().unwrap().success());
    }

    fn end(&mut self) {
        assert!(Command::new(imz()).arg("umount").arg(&self.mounted).status().unwrap().success());
        self.stop();
    }

    fn stop(&mut self) {
        for child in self.children.iter_mut().rev() {
            common::command(&["kill", &child.id().to_string()]).output().unwrap();
            child.wait().unwrap();
        }
        self.children.clear();
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        if !self.children.is_empty() {
            let _ = Command::new(imz()).args(["umount", "--now"]).arg(&self.mounted).status();
            self.stop();
        }
        let _ = fs::remove_dir(&self.mounted);
    }
}

struct Phase {
    name: &'static str,
    /// what was changed before is at the server when it begins
    ship_first: bool,
    run: fn(&Path, &Path),
}

const fn phase(name: &'static str, run: fn(&Path, &Path)) -> Phase {
    Phase { name, ship_first: false, run }
}

const PHASES: [Phase; 12] = [
    phase("make directories", |dir, tree| make_dirs(tree, &dir.join("dirs"))),
    phase("copy", |dir, tree| shell(dir, &format!("cp -a '{}' copy", tree.display()))),
    phase("scan", |dir, _| scan(dir)),
    phase("scan again", |dir, _| scan(dir)),
    phase("read all", |dir, _| {
        shell(dir, "find copy -type f -print0 | xargs -0 cat >/dev/null");
    }),
    phase("compile", |dir, _| compile(dir)),
    phase("write a file, 1 MiB", |dir, _| write_file(dir)),
    phase("read cached, 1 MiB", |dir, _| read_file(dir)),
    phase("overwrite, 1 MiB", |dir, _| overwrite(dir, 1 << 20, 4)),
    phase("overwrite, 4 KiB", |dir, _| overwrite(dir, 4 << 10, 1)),
    Phase { name: "remove", ship_first: true, run: |dir, _| shell(dir, "rm -rf copy dirs") },
    phase("remove the rest", |dir, _| shell(dir, "rm -rf program big")),
];

fn shell(dir: &Path, line: &str) {
    let status = Command::new("sh").args(["-c", line]).current_dir(dir).status().unwrap();
    assert!(status.success(), "{line}");
}

fn make_dirs(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            make_dirs(&entry.path(), &to.join(entry.file_name()));
        }
    }
}

fn scan(dir: &Path) {
    shell(dir, "find copy -printf '%s %m %T@ %u\\n' >/dev/null");
}

fn compile(dir: &Path) {
    let program = dir.join("program");
    fs::create_dir(&program).unwrap();
    let mut main = File::create(program.join("main.c")).unwrap();
    let mut header = File::create(program.join("all.h")).unwrap();
    writeln!(header, "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>").unwrap();
    writeln!(main, "#include \"all.h\"\nint main(void) {{ int n = 0;").unwrap();
    for unit in 0..UNITS {
        writeln!(header, "int unit{unit}(int);").unwrap();
        writeln!(main, "n += unit{unit}(n);").unwrap();
        let mut text = String::from("#include \"all.h\"\n");
        for f in 0..FUNCTIONS {
            text += &format!(
                "static int f{f}(int x) {{ int y = x; for (int i = 0; i < x % {f}7; i++) y = y * 31 + i; return y; }}\n"
            );
        }
        text += &format!("int unit{unit}(int x) {{ return f0(x)");
        (1..FUNCTIONS).for_each(|f| text += &format!(" + f{f}(x)"));
        fs::write(program.join(format!("unit{unit}.c")), text + "; }\n").unwrap();
    }
    writeln!(main, "printf(\"%d\\n\", n); return 0; }}").unwrap();
    let objects: Vec<String> = (0..UNITS).map(|u| format!("unit{u}.o")).collect();
    let make = format!(
        "CFLAGS = -O1\nprogram: main.o {0}\n\t$(CC) -o $@ main.o {0}\nmain.o {0}: all.h\n",
        objects.join(" ")
    );
    fs::write(program.join("Makefile"), make).unwrap();
    shell(&program, "make -s -j2 && ./program >/dev/null");
}

fn write_file(dir: &Path) {
    let file = File::create(dir.join("big")).unwrap();
    let piece = vec![7; 1 << 20];
    (0..MICRO_LEN / piece.len()).for_each(|_| (&file).write_all(&piece).unwrap());
}

fn read_file(dir: &Path) {
    let file = File::open(dir.join("big")).unwrap();
    let mut piece = vec![0; 1 << 20];
    for _ in 0..8 {
        for at in (0..MICRO_LEN).step_by(piece.len()) {
            file.read_exact_at(&mut piece, at as u64).unwrap();
        }
    }
}

fn overwrite(dir: &Path, len: usize, times: usize) {
    let file = File::options().write(true).open(dir.join("big")).unwrap();
    let piece = vec![9; len];
    for _ in 0..times {
        for at in (0..MICRO_LEN).step_by(len) {
            file.write_all_at(&piece, at as u64).unwrap();
        }
    }
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn print(table: &[(&str, Vec<(f64, f64)>)], json: bool) {
    if !json {
        println!("{:22} {:>9} {:>9} {:>17}", "phase", "bare s", "imz s", "imz/bare (pairs)");
    }
    for (name, pairs) in table {
        let bare = median(pairs.iter().map(|(bare, _)| *bare).collect());
        let mounted = median(pairs.iter().map(|(_, mounted)| *mounted).collect());
        let mut ratios: Vec<f64> = pairs.iter().map(|(bare, mounted)| mounted / bare).collect();
        ratios.sort_by(f64::total_cmp);
        let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
        let ratio = median(ratios);
        if json {
            let line = serde_json::json!({
                "phase": name, "bare_seconds": bare, "imz_seconds": mounted, "ratio": ratio,
                "ratio_min": least, "ratio_max": most, "rounds": pairs.len(),
            });
            println!("{line}");
        } else {
            println!("{name:22} {bare:9.3} {mounted:9.3} {ratio:7.2} ({least:.2} to {most:.2})");
        }
    }
}
