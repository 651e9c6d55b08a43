//! The command line: man/ and completions/ agree with it, its values are parsed as documented, and
//! bad input gets a message that names it and the documented exit code.
//!
//! `IMZ_BLESS=1 cargo test --test cli` rewrites man/ and completions/.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use imz::cli::options::{Export, MountOption, MountOptions, Passthrough, Point, Source};
use imz::cli::{Cli, MountArgs};
use imz::net::control;

// ---- generated files -------------------------------------------------------------------------

/// The files of one directory, by name.
type Files = BTreeMap<String, Vec<u8>>;

fn man_pages() -> Files {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let mut pages = Files::new();
    let mut queue = vec![("imz".to_owned(), root)];
    while let Some((name, command)) = queue.pop() {
        let below: Vec<_> = command.get_subcommands().cloned().collect();
        let static_name: &'static str = Box::leak(name.clone().into_boxed_str());
        let command = command.name(static_name).bin_name(name.replace('-', " "));
        pages.insert(format!("{name}.1"), page(&name, command));
        queue.extend(below.into_iter().map(|it| (format!("{name}-{}", it.get_name()), it)));
    }
    pages
}

fn page(name: &str, command: clap::Command) -> Vec<u8> {
    let after = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let has_commands = command.has_subcommands();
    let man = clap_mangen::Man::new(command)
        .title(name.to_uppercase())
        .source(concat!("imz ", env!("CARGO_PKG_VERSION")))
        .manual("imz");
    let mut page = Vec::new();
    man.render_title(&mut page).unwrap();
    man.render_name_section(&mut page).unwrap();
    man.render_synopsis_section(&mut page).unwrap();
    man.render_description_section(&mut page).unwrap();
    man.render_options_section(&mut page).unwrap();
    if has_commands {
        man.render_subcommands_section(&mut page).unwrap();
    }
    page.extend_from_slice(roff(&after).as_bytes());
    let others = "imz(1), imz-serve(1), imz-mount(1), imz-umount(1), imz-sync(1), imz-status(1), \
                  imz-pin(1), imz-unpin(1), imz-evict(1), imz-conflicts(1), imz-volume(1), \
                  imz-inspect(1), imz-fsck(1), imz-replay(1), imz-kml-dump(1), imz-kml(5), imz-coherence(7), \
                  imz-conflicts(7), imz-space(7)";
    let others: Vec<&str> = others.split(", ").filter(|it| *it != format!("{name}(1)")).collect();
    page.extend_from_slice(roff(&format!("See also:\n\n{}\n", others.join(", "))).as_bytes());
    page
}

/// The text after the options as sections of a man page: `Heading:` at the margin begins one,
/// indented lines stay as they are, other lines are paragraphs.
fn roff(text: &str) -> String {
    let (mut page, mut kept) = (String::new(), false);
    for line in text.lines() {
        let escaped = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
        let keep = line.starts_with(' ') || (kept && line.is_empty());
        if keep != kept {
            page.push_str(if keep { ".PP\n.nf\n" } else { ".fi\n" });
            kept = keep;
        }
        match line.strip_suffix(':') {
            Some(_) if !keep => {
                page.push_str(&format!(".SH {}\n", escaped.trim_end_matches(':').to_uppercase()))
            }
            _ if line.is_empty() && !keep => page.push_str(".PP\n"),
            _ if line.starts_with('.') => page.push_str(&format!("\\&{escaped}\n")),
            _ => page.push_str(&format!("{escaped}\n")),
        }
    }
    page + if kept { ".fi\n" } else { "" }
}

fn completions() -> Files {
    let shells = [Shell::Bash, Shell::Zsh, Shell::Fish];
    let generate = |shell: Shell| {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "imz", &mut text);
        let name = match shell {
            Shell::Zsh => "_imz".to_owned(),
            shell => format!("imz.{shell}"),
        };
        (name, text)
    };
    shells.into_iter().map(generate).collect()
}

/// What is checked in, without the pages that people write.
fn checked_in(dir: &Path) -> Files {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, std::fs::read(path).unwrap())
    };
    let files = std::fs::read_dir(dir).unwrap().map(read);
    files.filter(|(name, _)| !name.ends_with(".5") && !name.ends_with(".7")).collect()
}

fn agree(dir: &str, generated: &Files) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    if std::env::var_os("IMZ_BLESS").is_some() {
        for (name, text) in generated {
            std::fs::write(dir.join(name), text).unwrap();
        }
    }
    let found = checked_in(&dir);
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(generated), "in {}", dir.display());
    for (name, text) in generated {
        let same = found[name] == *text;
        assert!(same, "{name} is not what src/cli.rs says: IMZ_BLESS=1 cargo test --test cli");
    }
}

#[test]
fn man_pages_agree_with_the_code() {
    agree("man", &man_pages());
}

#[test]
fn completions_agree_with_the_code() {
    agree("completions", &completions());
}

#[test]
fn clap_finds_no_fault_with_the_definitions() {
    Cli::command().debug_assert();
}

#[test]
fn everything_is_documented() {
    fn check(command: &clap::Command, path: &str) {
        assert!(command.get_about().is_some(), "{path} has no description");
        for arg in command.get_arguments() {
            let known = ["help", "version", "mountpoint"].contains(&arg.get_id().as_str());
            assert!(known || arg.get_help().is_some(), "{path}: {} has no help", arg.get_id());
        }
        for below in command.get_subcommands() {
            check(below, &format!("{path} {}", below.get_name()));
        }
    }
    check(&Cli::command(), "imz");
}

// ---- values ----------------------------------------------------------------------------------

#[test]
fn sources() {
    let server = |host: &str, port, volume: &str| {
        Some(Source::Server { host: host.to_owned(), port, volume: volume.to_owned() })
    };
    let local = |dir: &str| Some(Source::Local(PathBuf::from(dir)));
    let table = [
        ("h:/v", server("h", 7070, "v")),
        ("h:/", server("h", 7070, "")),
        ("h:81:/v w", server("h", 81, "v w")),
        ("10.0.0.1:/v", server("10.0.0.1", 7070, "v")),
        ("[::1]:/v", server("::1", 7070, "v")),
        ("[fe80::1]:81:/v", server("fe80::1", 81, "v")),
        ("h:/\u{fc}", server("h", 7070, "\u{fc}")),
        ("dir", local("dir")),
        ("./a:b", local("./a:b")),
        ("/a:/b", local("/a:/b")),
        ("..", local("..")),
        ("", None),
        ("h:", None),
        ("h:v", None),
        (":/v", None),
        ("h:0:/v", None),
        ("h:65536:/v", None),
        ("h::/v", None),
        ("h:1:2:/v", None),
        ("::1:/v", None),
        ("[::1:/v", None),
        ("[::1]x:/v", None),
        ("[h]:/v", None),
        ("h h:/v", None),
        ("h:/v/w", None),
        ("h:/v/", None),
        ("h://v", None),
        ("h:/..", None),
        ("h:/.imz", None),
        ("h:/a\nb", None),
    ];
    for (text, want) in table {
        let got = Source::parse(OsStr::new(text));
        assert_eq!(got.clone().ok(), want, "{text:?}");
        if let Ok(source) = got {
            let again = Source::parse(OsStr::new(&source.to_string()));
            assert_eq!(again.ok(), Some(source), "{text:?} is printed as something else");
        }
    }
    let bytes = OsStr::from_bytes(b"a\xff");
    assert_eq!(Source::parse(bytes), Ok(Source::Local(PathBuf::from(bytes))));
    assert!(Source::parse(OsStr::from_bytes(b"h:/\xff")).is_err());
    let long = format!("h:/{}", "v".repeat(256));
    assert!(Source::parse(OsStr::new(&long)).is_err());
}

#[test]
fn exports() {
    let named = |name: &str, dir: &str| {
        Some(Export { name: Some(name.to_owned()), dir: PathBuf::from(dir) })
    };
    let plain = |dir: &str| Some(Export { name: None, dir: PathBuf::from(dir) });
    let table = [
        ("/srv/a", plain("/srv/a")),
        (".", plain(".")),
        ("./a=b", plain("./a=b")),
        ("n=/srv/a", named("n", "/srv/a")),
        ("n=a=b", named("n", "a=b")),
        ("", None),
        ("n=", None),
        ("=d", None),
        ("..=d", None),
    ];
    for (text, want) in table {
        assert_eq!(Export::parse(OsStr::new(text)).ok(), want, "{text:?}");
    }
    let plain = Export { name: None, dir: PathBuf::from(".") };
    assert_eq!(plain.volume(Path::new("/srv/projects")).unwrap(), "projects");
    assert!(plain.volume(Path::new("/")).is_err());
}

fn mount_args(options: &[&str]) -> Result<MountArgs, String> {
    let typed = ["imz", "mount", "h:/v", "/mnt"].iter().chain(options);
    match Cli::try_parse_from(typed).map(|cli| cli.command) {
        Ok(imz::cli::Command::Mount(args)) => Ok(args),
        Ok(_) => unreachable!("mount was typed"),
        Err(e) => Err(e.to_string()),
    }
}

#[test]
fn mount_options() {
    let sizes = [("10", 10), ("5K", 5 << 10), ("3m", 3 << 20), ("20G", 20 << 30), ("1T", 1 << 40)];
    for (text, want) in sizes {
        let parsed = MountOption::parse(OsStr::new(&format!("cache-max={text}")));
        assert_eq!(parsed, Ok(MountOption::CacheMax(want)), "{text}");
    }
    for bad in [
        "cache-max",
        "cache-max=",
        "cache-max=0",
        "cache-max=G",
        "cache-max=1.5G",
        "cache-max=-1",
        "cache-max=99999999999T",
        "cache-max=1KB",
        "offline",
        "offline=maybe",
    ] {
        assert!(MountOption::parse(OsStr::new(bad)).is_err(), "{bad}");
    }
    let none = MountOptions::default();
    let table: [(&[&str], MountOptions); 8] = [
        (&[], none.clone()),
        (
            &["-o", "defaults,noauto,user,nofail,_netdev,relatime,,x-systemd.automount"],
            none.clone(),
        ),
        (&["-o", "ro,sync"], MountOptions { read_only: true, sync: true, ..none.clone() }),
        (&["-o", "ro", "-orw"], none.clone()),
        (
            &["-o", "age=0,timeout=1min 30s", "-o", "passthrough=off,allow_other"],
            MountOptions {
                age: Duration::ZERO,
                timeout: Duration::from_secs(90),
                passthrough: Passthrough::Off,
                allow_other: true,
                ..none.clone()
            },
        ),
        (
            &["-o", "nosuid,nodev,noexec,noatime"],
            MountOptions { suid: false, dev: false, exec: false, atime: false, ..none.clone() },
        ),
        (&["-o", "cache=/c"], MountOptions { cache: Some("/c".into()), ..none.clone() }),
        (
            &["-o", "cache=/c", "--cache", "/d"],
            MountOptions { cache: Some("/d".into()), ..none.clone() },
        ),
    ];
    for (typed, want) in table {
        assert_eq!(mount_args(typed).unwrap().settings(), want, "{typed:?}");
    }
    let refused = [
        ("size=3", "unknown option size"),
        ("rofl", "unknown option rofl"),
        ("age", "age="),
        ("age=soon", "500ms"),
        ("age=2years", "longer than a year"),
        ("age=18446744073709551615", "longer than a year"),
        ("timeout=0", "longer than 0"),
        ("passthrough=on", "auto or off"),
        ("uring=maybe", "auto, on or off"),
        ("ro=1", "takes no value"),
        ("cache=", "cache=DIR"),
    ];
    for (text, part) in refused {
        let error = mount_args(&["-o", text]).unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
    let unknown = MountOption::parse(OsStr::from_bytes(b"\xff")).unwrap_err().to_string();
    assert!(unknown.contains("allow_other"), "the message lists what is known: {unknown}");
}

#[test]
fn points_of_a_journal() {
    let at = |text| humantime::parse_rfc3339(text).unwrap();
    assert_eq!(Point::parse("17"), Ok(Point::Seq(17)));
    let (day, noon) = ("2026-11-21T00:00:00Z", "2026-11-21T12:00:00Z");
    assert_eq!(Point::parse("2026-11-21"), Ok(Point::Time(at(day))));
    assert_eq!(Point::parse(noon), Ok(Point::Time(at(noon))));
    assert_eq!(Point::parse("2026-11-21 12:00:00"), Ok(Point::Time(at(noon))));
    for text in ["", "-1", "yesterday", "2026-13-01", "18446744073709551616"] {
        assert!(Point::parse(text).is_err(), "{text:?}");
    }
}

// ---- the binary ------------------------------------------------------------------------------

/// Runs imz with a private directory for control sockets (root's is /run/imz all the same).
fn imz(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_imz")).args(args).output().unwrap()
}

fn check(args: &[&str], exit: i32, parts: &[&str]) {
    let done = imz(args);
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(exit), "imz {args:?}: {error}");
    for part in parts {
        assert!(error.contains(part), "imz {args:?} does not say {part:?} but: {error}");
    }
    if exit != 0 {
        assert!(done.stdout.is_empty(), "imz {args:?} fails, and prints all the same");
    }
}

#[test]
fn bad_usage_is_exit_code_2_and_names_what_is_wrong() {
    let table: [(&[&str], &[&str]); 15] = [
        (&[], &["Usage"]),
        (&["kml"], &["Usage"]),
        (&["unmount"], &["unmount", "umount"]),
        (&["mount"], &["SOURCE"]),
        (&["mount", "h:v", "/mnt"], &["h:v", "HOST[:PORT]:/VOLUME"]),
        (&["mount", "h:/v", "/mnt", "-o", "sizes=3"], &["sizes", "allow_other"]),
        (&["mount", "h:/v", "/mnt", "-o", "age=soon"], &["age=soon", "500ms"]),
        (&["mount", "h:/v", "/mnt", "--cash", "x"], &["--cash", "--cache"]),
        (&["serve"], &["DIR"]),
        (&["serve", "/", "--listen", "0.0.0.0:7070"], &["0.0.0.0:7070", "no keys", "ssh -N -L"]),
        (&["serve", "/", "--listen", "[::]:1"], &["no keys", "1:127.0.0.1:1"]),
        (&["serve", "/", "--listen", "7070"], &["ADDRESS:PORT"]),
        (&["sync", "/", "--timeout", "soon"], &["soon", "500ms"]),
        (&["umount", "/", "--now", "--timeout", "1s"], &["--now", "--timeout"]),
        (&["kml", "dump", "/", "--from", "then"], &["then", "UTC"]),
    ];
    for (args, parts) in table {
        check(args, 2, parts);
    }
}

#[test]
fn what_is_not_there_is_exit_code_5() {
    let plain = tempfile::tempdir().unwrap();
    let plain = plain.path().to_str().unwrap();
    let gone = format!("{plain}/gone");
    for command in ["status", "sync", "umount"] {
        let name = format!("imz: {command}: ");
        check(&[command, &gone], 5, &[&name, &gone, "no such directory"]);
        check(&[command, plain], 5, &[&name, plain, "not an imz mount"]);
    }
}

#[test]
fn help_and_version_are_no_failures() {
    for args in [&["--help"][..], &["-h"], &["--version"], &["mount", "--help"], &["help", "kml"]] {
        let done = imz(args);
        assert!(done.status.success() && !done.stdout.is_empty(), "{args:?}");
    }
    let help = String::from_utf8(imz(&["--help"]).stdout).unwrap();
    assert!(help.contains("Exit codes:") && help.contains("  7  "), "{help}");
}

#[test]
fn as_mount_helper_it_takes_what_mount_8_passes() {
    let helper = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imz"));
        command.arg0("/sbin/mount.imz").args(args).output().unwrap()
    };
    let ok = helper(&["h:/v", "/mnt", "-fnv", "-o", "rw,noauto,_netdev,age=2s"]);
    assert!(ok.status.success(), "{}", String::from_utf8_lossy(&ok.stderr));
    let unknown = helper(&["h:/v", "/mnt", "-f", "-o", "rw,rofl"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("rofl"));
    let sloppy = helper(&["h:/v", "/mnt", "-sf", "-o", "rw,rofl"]);
    assert!(sloppy.status.success(), "{}", String::from_utf8_lossy(&sloppy.stderr));
}

// ---- mounts that hang or are dead ------------------------------------------------------------

/// Takes the mount away, whatever the test did.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// A mount of our type whose daemon, the one who holds the file, never answers.
fn mount_without_daemon(mount: &Path) -> std::io::Result<(std::fs::File, Mounted)> {
    use rustix::mount::MountFlags;
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse")?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
    let data = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
    let data = std::ffi::CString::new(data).unwrap();
    rustix::mount::mount("h:7070:/v", mount, "fuse.imz", MountFlags::empty(), &*data)?;
    Ok((device, Mounted(mount.to_owned())))
}

#[test]
fn a_hung_mount_hangs_nobody_and_a_dead_one_is_cleaned_up() {
    let scratch = tempfile::tempdir().unwrap();
    let mount = scratch.path().canonicalize().unwrap().join("a b");
    std::fs::create_dir(&mount).unwrap();
    let (device, _mounted) = match mount_without_daemon(&mount) {
        Ok(it) => it,
        // CI sets this, so that nothing is skipped there
        Err(e) if std::env::var_os("IMZ_MUST_MOUNT").is_some() => panic!("no mount: {e}"),
        Err(e) => return eprintln!("skipped: it needs root and /dev/fuse: {e}"),
    };
    let name = mount.to_str().unwrap();
    let began = std::time::Instant::now();
    check(&["status", name], 1, &["imz: status: ", name, "no imz process"]);
    check(&["sync", name], 1, &[name, "no imz process"]);
    check(&["umount", name], 1, &[name, "not unmounted", "--now"]);
    assert!(began.elapsed() < Duration::from_secs(8), "a hung mount was waited for");
    let all = imz(&["status", "--json"]);
    assert_eq!(all.status.code(), Some(1));
    let all: serde_json::Value = serde_json::from_slice(&all.stdout).unwrap();
    let ours = all.as_array().unwrap().iter().find(|it| it["mount"] == name).unwrap();
    assert!(ours["error"].is_string(), "{ours}");

    drop(device); // the daemon dies
    check(&["umount", name], 0, &["the next mount of its cache goes on"]);
    check(&["umount", name], 5, &["not an imz mount"]);
    assert!(std::fs::read_dir(&mount).unwrap().next().is_none(), "the directory is bare again");
}

/// A daemon that has everything at the server after a few questions; it tells when it shall end.
struct Daemon {
    mount: PathBuf,
    asked: AtomicU64,
    end: Mutex<mpsc::Sender<u64>>,
}

impl control::Answer for Daemon {
    fn status(&self) -> control::Status {
        let (mount, server, volume) = (self.mount.clone(), "h:7070".to_owned(), "v".to_owned());
        control::Status { mount, server, volume, connected: true, ..control::Status::default() }
    }
    fn ship_now(&self) -> u64 {
        3
    }
    fn acked(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::SeqCst)
    }
    fn shutdown(&self) {
        self.end.lock().unwrap().send(self.asked.load(Ordering::SeqCst)).unwrap();
    }
}

#[test]
fn umount_ships_first_and_returns_after_the_end_of_the_process() {
    let scratch = tempfile::tempdir().unwrap();
    let mount = scratch.path().canonicalize().unwrap().join("m");
    std::fs::create_dir(&mount).unwrap();
    let (_device, _mounted) = match mount_without_daemon(&mount) {
        Ok(it) => it,
        Err(e) if std::env::var_os("IMZ_MUST_MOUNT").is_some() => panic!("no mount: {e}"),
        Err(e) => return eprintln!("skipped: it needs root and /dev/fuse: {e}"),
    };
    let (end, ended) = mpsc::channel();
    let (asked, end) = (AtomicU64::new(0), Mutex::new(end));
    let daemon = Arc::new(Daemon { mount: mount.clone(), asked, end });
    let control = control::serve(&control::socket_path(&mount), daemon.clone()).unwrap();
    let name = mount.to_str().unwrap();

    let status = imz(&["status", name, "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&status["mount"], &status["connected"]), (&name.into(), &true.into()));
    check(&["sync", name], 0, &[]);
    assert!(daemon.asked.load(Ordering::SeqCst) > 3, "it waited for the third record");

    daemon.asked.store(0, Ordering::SeqCst);
    let command = Command::new(env!("CARGO_BIN_EXE_imz")).args(["umount", name]).spawn();
    let mut command = command.unwrap();
    let asked = ended.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(asked > 3, "it was unmounted before all was shipped");
    std::thread::sleep(Duration::from_millis(200));
    assert!(command.try_wait().unwrap().is_none(), "it did not wait for the process");
    drop(control);
    assert!(command.wait().unwrap().success());
    check(&["umount", name], 5, &["not an imz mount"]);
}
