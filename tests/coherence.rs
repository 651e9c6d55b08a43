//! Several mounts of one volume: who reads sees what was complete before, without waiting for any
//! timer and without a sync, and who is alone asks nothing.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::compare::assert_same;
use common::tree;
use common::{Disk, Mount, Server, run, wait_for};

/// Mounts that ship by themselves only after a minute: what is seen earlier was recalled.
const LAZY: &str = "age=60s";

fn mounts<const N: usize>(server: &Server, disk: &Disk) -> [Mount; N] {
    std::array::from_fn(|no| Mount::with(server.source(), &disk.dir(&format!("c{no}")), LAZY))
}

fn asked(mount: &Mount) -> u64 {
    mount.status()["requests_foreground"].as_u64().unwrap()
}

/// Each row of the manual's table: what the other client sees, right after.
#[test]
fn what_is_complete_is_seen_by_who_looks_next() {
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let [a, b] = mounts(&server, &disk);
    let say = |path: &Path| fs::read_to_string(path).unwrap();

    fs::write(a.at("file"), "written and closed").unwrap();
    assert_eq!(say(&b.at("file")), "written and closed");
    assert_eq!(names(b.path()), ["file"]);

    fs::write(b.at("file"), "by the other").unwrap();
    assert_eq!(say(&a.at("file")), "by the other");

    let mut open = OpenOptions::new().append(true).open(a.at("file")).unwrap();
    open.write_all(b", appended").unwrap();
    open.sync_all().unwrap();
    assert_eq!(say(&b.at("file")), "by the other, appended", "after fsync");
    open.write_all(b" again").unwrap();
    drop(open);
    assert_eq!(say(&b.at("file")), "by the other, appended again", "after close");

    fs::rename(b.at("file"), b.at("renamed")).unwrap();
    assert_eq!(names(a.path()), ["renamed"]);
    assert!(fs::metadata(a.at("file")).is_err());

    fs::set_permissions(a.at("renamed"), Permissions::from_mode(0o4711)).unwrap();
    assert_eq!(fs::metadata(b.at("renamed")).unwrap().permissions().mode() & 0o7777, 0o4711);

    fs::create_dir(b.at("dir")).unwrap();
    fs::rename(b.at("renamed"), b.at("dir/file")).unwrap();
    assert_eq!(names(&a.at("dir")), ["file"]);
    fs::hard_link(a.at("dir/file"), a.at("second")).unwrap();
    assert_eq!(say(&b.at("second")), "by the other, appended again");

    fs::remove_file(b.at("dir/file")).unwrap();
    assert!(names(&a.at("dir")).is_empty());
    fs::remove_dir(a.at("dir")).unwrap();
    assert!(fs::create_dir(b.at("dir/below")).is_err());
    fs::remove_file(a.at("second")).unwrap();
    assert!(names(b.path()).is_empty());

    for mount in [&a, &b] {
        mount.sync();
        mount.no_conflicts();
    }
    assert!(names(server.dir()).is_empty());
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != ".imz");
    names.sort();
    names
}

#[test]
fn who_is_alone_asks_nothing() {
    let Some(disk) = Disk::for_trees() else { return };
    let original = tree::source(&disk);
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "a");
    let work = |round: &str| {
        let to = a.at(round);
        let (from, to) = (original.to_str().unwrap(), to.to_str().unwrap());
        run(&["cp", "-a", from, to]);
        fs::write(a.at("hello.c"), "int main(void) { return 0; }").unwrap();
        let program = a.at("hello");
        run(&["gcc", "-o", program.to_str().unwrap(), a.at("hello.c").to_str().unwrap()]);
        run(&[program.to_str().unwrap()]);
        run(&["rm", "-r", to]);
    };
    work("first");
    let before = asked(&a);
    work("alone");
    assert_eq!(asked(&a), before, "alone");

    // Somebody else is there, and does nothing; the first change takes the root back from him.
    let b = Mount::start(&server, &disk, "b");
    assert!(b.is_connected());
    std::thread::sleep(Duration::from_secs(3));
    fs::write(a.at("permit"), "").unwrap();
    wait_for("the permit for the volume", 10, || a.status()["permit"] == "write");
    let before = asked(&a);
    work("beside an idle one");
    assert_eq!(asked(&a), before, "beside an idle one");
    a.sync();
    assert_same(a.path(), b.path());
}

#[test]
fn a_file_goes_back_and_forth_in_three_round_trips() {
    const TURNS: u64 = 100;
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let mounts: [Mount; 2] = mounts(&server, &disk);
    let paths = mounts.each_ref().map(|mount| mount.at("ball"));
    let count =
        || -> u64 { mounts.iter().map(|mount| mount.status()["messages"].as_u64().unwrap()).sum() };
    fs::write(&paths[0], "0").unwrap();
    let turn = |no: u64| {
        let path = &paths[(no % 2) as usize];
        let seen: u64 = fs::read_to_string(path).unwrap().parse().unwrap();
        assert_eq!(seen + 1, no, "what the other wrote");
        fs::write(path, no.to_string()).unwrap();
    };
    (1..21).for_each(turn); // until they know each other
    let (before, begun) = (count(), Instant::now());
    (21..21 + TURNS).for_each(turn);
    let (messages, took) = (count() - before, begun.elapsed());
    let each = messages as f64 / TURNS as f64;
    let rate = TURNS as f64 / took.as_secs_f64();
    println!("{each:.2} messages a turn, {rate:.0} turns a second");
    // six, and now and then one more of those that go on by themselves
    assert!(each <= 6.15, "{each} messages a turn");
}

#[test]
fn a_consumer_follows_a_file_that_another_appends_to() {
    const LINES: usize = 300;
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let [a, b] = mounts(&server, &disk);
    let (from, to) = (a.at("log"), b.at("log"));
    fs::write(&from, "").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for line in 0..LINES {
                let mut file = OpenOptions::new().append(true).open(&from).unwrap();
                writeln!(file, "line {line}").unwrap();
            }
        });
        let (mut text, mut at) = (String::new(), 0);
        let begun = Instant::now();
        while text.lines().count() < LINES {
            assert!(begun.elapsed() < Duration::from_secs(60), "stuck at {at}");
            let mut file = fs::File::open(&to).unwrap();
            file.seek(SeekFrom::Start(at)).unwrap();
            at += file.read_to_string(&mut text).unwrap() as u64;
            assert!(text.is_empty() || text.ends_with('\n'), "half a line");
        }
        let want: String = (0..LINES).map(|line| format!("line {line}\n")).collect();
        assert_eq!(text, want);
    });
    a.no_conflicts();
}

#[test]
fn make_builds_what_another_mount_edits() {
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let [a, b] = mounts(&server, &disk);
    fs::write(b.at("Makefile"), "say: say.c value.h\n\tgcc -o say say.c\n").unwrap();
    let source =
        "#include <stdio.h>\n#include \"value.h\"\nint main(void) { printf(\"%d\", VALUE); }";
    fs::write(b.at("say.c"), source).unwrap();
    for value in 1..9 {
        fs::write(b.at("value.h"), format!("#define VALUE {value}\n")).unwrap();
        run(&["make", "-s", "-C", a.path().to_str().unwrap()]);
        assert_eq!(run(&[a.at("say").to_str().unwrap()]), value.to_string());
        assert_eq!(run(&[b.at("say").to_str().unwrap()]), value.to_string(), "in the other mount");
    }
    a.no_conflicts();
    b.no_conflicts();
}

/// Deliveries as maildir(5) has them: write in tmp, rename to new; a reader moves them to cur.
#[test]
fn mail_is_delivered_from_three_mounts() {
    const MAILS: usize = 60;
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let mounts: [Mount; 3] = mounts(&server, &disk);
    for dir in ["tmp", "new", "cur"] {
        fs::create_dir(mounts[0].at(dir)).unwrap();
    }
    let done = AtomicBool::new(false);
    let mut read = Vec::new();
    std::thread::scope(|scope| {
        let senders: Vec<_> = mounts
            .iter()
            .enumerate()
            .map(|(host, mount)| {
                scope.spawn(move || {
                    for mail in 0..MAILS {
                        let name = format!("{mail}.host{host}");
                        fs::write(mount.at(format!("tmp/{name}")), &name).unwrap();
                        let (from, to) = (format!("tmp/{name}"), format!("new/{name}"));
                        fs::rename(mount.at(from), mount.at(to)).unwrap();
                    }
                })
            })
            .collect();
        let reader = scope.spawn(|| {
            let mut seen = Vec::new();
            loop {
                let last = done.load(Ordering::SeqCst);
                for name in names(&mounts[1].at("new")) {
                    let text = fs::read_to_string(mounts[1].at(format!("new/{name}"))).unwrap();
                    assert_eq!(text, name);
                    let (from, to) = (format!("new/{name}"), format!("cur/{name}:2,S"));
                    fs::rename(mounts[1].at(from), mounts[1].at(to)).unwrap();
                    seen.push(name);
                }
                if last {
                    return seen;
                }
            }
        });
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        done.store(true, Ordering::SeqCst);
        read = reader.join().unwrap();
    });
    read.sort();
    let mut want: Vec<String> =
        (0..3).flat_map(|host| (0..MAILS).map(move |mail| format!("{mail}.host{host}"))).collect();
    want.sort();
    assert_eq!(read, want, "each once");
    for mount in &mounts {
        assert_eq!(names(&mount.at("cur")).len(), want.len());
        assert!(names(&mount.at("tmp")).is_empty() && names(&mount.at("new")).is_empty());
        mount.no_conflicts();
    }
}

/// `IMZ_CREATES` makes it as many as one likes.
#[test]
fn two_mounts_fill_one_directory() {
    let count = std::env::var("IMZ_CREATES").map_or(4_000, |n| n.parse().unwrap());
    // inodes for three trees of them
    let Some(disk) = Disk::new(if count > 20_000 { 16_384 } else { 2_048 }) else { return };
    let server = Server::start(&disk);
    let [a, b] = mounts(&server, &disk);
    fs::create_dir(a.at("shared")).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for (mount, name) in [(&a, "a"), (&b, "b")] {
            scope.spawn(move || {
                for no in 0..count / 2 {
                    fs::write(mount.at(format!("shared/{name}{no}")), name).unwrap();
                }
            });
        }
    });
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    println!("{rate:.0} creates a second");
    for mount in [&a, &b] {
        assert_eq!(names(&mount.at("shared")).len(), count / 2 * 2);
    }
    a.sync();
    b.sync();
    assert_same(a.path(), b.path());
    assert_same(a.path(), server.dir());
    a.no_conflicts();
    b.no_conflicts();
}

#[test]
fn who_is_stopped_delays_others_by_its_lease_and_nothing_else() {
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let [a, b, c] = mounts(&server, &disk);
    // Each in a directory of his own: who holds a directory holds the way through it.
    fs::create_dir(a.at("own")).unwrap();
    fs::write(a.at("own/held"), "before").unwrap();
    assert_eq!(fs::read_to_string(b.at("own/held")).unwrap(), "before");
    fs::create_dir(c.at("apart")).unwrap();
    fs::write(c.at("apart/file"), "c").unwrap();
    assert_eq!(fs::read_to_string(b.at("apart/file")).unwrap(), "c");
    fs::write(a.at("own/held"), "unshipped").unwrap();
    assert!(a.pending() > 0);
    a.freeze();

    let begun = Instant::now();
    fs::write(c.at("apart/file"), "c again").unwrap();
    assert_eq!(fs::read_to_string(b.at("apart/file")).unwrap(), "c again");
    fs::write(b.at("apart/file"), "b").unwrap();
    assert_eq!(fs::read_to_string(c.at("apart/file")).unwrap(), "b");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "what it does not hold: {:?}",
        begun.elapsed()
    );
    let begun = Instant::now();
    let read = fs::read_to_string(b.at("own/held")).unwrap();
    let took = begun.elapsed();
    println!("waited {took:?} for who was stopped");
    assert!(took < Duration::from_secs(13), "{took:?}");
    assert_eq!(read, "before", "what the server has");
    let begun = Instant::now();
    fs::write(b.at("own/after"), "").unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "once is enough");

    a.thaw();
    wait_for("it to come back", 30, || a.is_connected());
    a.sync();
    assert_eq!(
        fs::read_to_string(b.at("own/held")).unwrap(),
        "unshipped",
        "nobody changed it since"
    );
}

#[test]
fn strict_readers_see_every_write_that_has_returned() {
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let options = "age=60s,coherence=strict";
    let [a, b]: [Mount; 2] = std::array::from_fn(|no| {
        Mount::with(server.source(), &disk.dir(&format!("s{no}")), options)
    });
    fs::write(a.at("file"), "0").unwrap();
    let open =
        |mount: &Mount| OpenOptions::new().read(true).write(true).open(mount.at("file")).unwrap();
    let files = [open(&a), open(&b)];
    let mut bytes = [0; 8];
    for no in 0..40usize {
        let (writer, reader) = (&files[no % 2], &files[1 - no % 2]);
        let text = format!("{no:08}");
        writer.write_all_at(text.as_bytes(), 0).unwrap();
        reader.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(std::str::from_utf8(&bytes), Ok(&text[..]), "nobody closed anything");
        // what grows, and what is cut, is seen as well
        writer.set_len(8 + no as u64).unwrap();
        assert_eq!(reader.metadata().unwrap().len(), 8 + no as u64);
    }
    drop(files);
    a.sync();
    b.sync();
    assert_same(a.path(), b.path());
    a.no_conflicts();
    b.no_conflicts();
}

#[test]
fn strict_writers_of_one_file_lose_nothing() {
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let options = "age=60s,coherence=strict";
    let mounts: [Mount; 2] = std::array::from_fn(|no| {
        Mount::with(server.source(), &disk.dir(&format!("s{no}")), options)
    });
    let rounds = 60;
    fs::write(mounts[0].at("file"), vec![b'.'; 2 * 8 * rounds]).unwrap();
    // each writes every second place, without a look at what the other does
    std::thread::scope(|scope| {
        for (no, mount) in mounts.iter().enumerate() {
            scope.spawn(move || {
                let file = OpenOptions::new().write(true).open(mount.at("file")).unwrap();
                for round in 0..rounds {
                    let (place, text) = (2 * round + no, format!("{no}{round:07}"));
                    file.write_all_at(text.as_bytes(), 8 * place as u64).unwrap();
                }
            });
        }
    });
    let places = (0..2 * rounds).map(|place| format!("{}{:07}", place % 2, place / 2));
    let want: String = places.collect();
    for mount in &mounts {
        assert_eq!(fs::read_to_string(mount.at("file")).unwrap(), want);
        mount.sync();
        mount.no_conflicts();
    }
}

#[test]
fn git_works_in_turn_on_two_mounts() {
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let mounts: [Mount; 2] = mounts(&server, &disk);
    let git = |mount: &Mount, words: &[&str]| {
        let repo = mount.at("repo");
        let mut all = vec!["git", "-C", repo.to_str().unwrap()];
        all.extend(["-c", "user.name=imz", "-c", "user.email=imz@localhost"]);
        all.extend(words);
        run(&all)
    };
    fs::create_dir(mounts[0].at("repo")).unwrap();
    git(&mounts[0], &["init", "-q"]);
    for round in 0..8 {
        let mount = &mounts[round % 2];
        fs::write(mount.at(format!("repo/file{round}")), format!("round {round}")).unwrap();
        fs::write(mount.at("repo/shared"), format!("round {round}")).unwrap();
        git(mount, &["add", "-A"]);
        git(mount, &["commit", "-q", "-m", &format!("round {round}")]);
        let other = &mounts[1 - round % 2];
        assert_eq!(git(other, &["status", "--porcelain"]), "", "round {round}");
        assert_eq!(git(other, &["rev-list", "--count", "HEAD"]).trim(), (round + 1).to_string());
        git(other, &["fsck", "--strict"]);
    }
    git(&mounts[1], &["gc", "-q"]);
    assert_eq!(git(&mounts[0], &["status", "--porcelain"]), "");
    git(&mounts[0], &["fsck", "--full", "--strict"]);
    mounts.iter().for_each(Mount::no_conflicts);
}

/// Every row of the manual's table names a test of this file.
#[test]
fn each_row_of_the_manual_has_its_test() {
    let manual = include_str!("../man/imz-coherence.7");
    let table = manual.split(".\\\" TS").nth(1).unwrap().split(".\\\" TE").next().unwrap();
    let rows: Vec<&str> = table.lines().filter_map(|line| line.split('\t').nth(3)).collect();
    assert!(rows.len() > 8, "{rows:?}");
    let tests = include_str!("coherence.rs");
    for test in rows.iter().filter(|row| **row != "test") {
        assert!(tests.contains(&format!("\nfn {test}()")), "{test}");
    }
}

/// `IMZ_TRANSACTIONS` makes it as many as one likes.
#[test]
fn two_writers_share_a_database() {
    let Some(disk) = Disk::for_trees() else { return };
    let count = std::env::var("IMZ_TRANSACTIONS").map_or(100, |n| n.parse().unwrap());
    let server = Server::start(&disk);
    let mounts: [Mount; 2] = mounts(&server, &disk);
    let sql = |mount: &Mount, text: &str| {
        let path = mount.at("db");
        run(&["sqlite3", "-cmd", ".timeout 60000", "-bail", path.to_str().unwrap(), text])
    };
    sql(&mounts[0], "CREATE TABLE t (who, no, UNIQUE (who, no)); CREATE TABLE sum (n);");
    sql(&mounts[1], "INSERT INTO sum VALUES (0);");
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for (who, mount) in mounts.iter().enumerate() {
            let transaction = move |no: usize| {
                format!(
                    "BEGIN IMMEDIATE; INSERT INTO t VALUES ({who}, {no}); \
                     UPDATE sum SET n = n + 1; COMMIT;"
                )
            };
            // several processes, one after another, each with some of the transactions
            scope.spawn(move || {
                let all: Vec<usize> = (0..count).collect();
                for some in all.chunks(25) {
                    let text: String = some.iter().map(|no| transaction(*no)).collect();
                    sql(mount, &text);
                }
            });
        }
    });
    let rate = (2 * count) as f64 / begun.elapsed().as_secs_f64();
    println!("{rate:.0} transactions a second");
    for mount in &mounts {
        assert_eq!(sql(mount, "PRAGMA integrity_check;").trim(), "ok");
        assert_eq!(sql(mount, "SELECT count(*) FROM t;").trim(), (2 * count).to_string());
        assert_eq!(sql(mount, "SELECT n FROM sum;").trim(), (2 * count).to_string());
        mount.sync();
        mount.no_conflicts();
    }
}

#[test]
fn locks_hold_across_mounts_and_end_with_their_owner() {
    let Some(disk) = Disk::for_trees() else { return };
    let server = Server::start(&disk);
    let [a, mut b] = mounts(&server, &disk);
    fs::write(a.at("file"), "0").unwrap();
    let lock = |mount: &Mount| OpenOptions::new().read(true).write(true).open(mount.at("file"));
    let (here, there) = (lock(&a).unwrap(), lock(&b).unwrap());
    here.lock().unwrap();
    assert!(there.try_lock().is_err(), "flock");
    // another mount waits, and is let in when the first one closes
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| there.lock().map(|()| Instant::now()));
        std::thread::sleep(Duration::from_millis(300));
        let closed = Instant::now();
        drop(here);
        assert!(waits.join().unwrap().unwrap() >= closed);
    });
    // a process that waits can be killed
    let path = a.at("file");
    let mut waiting = std::process::Command::new("flock").arg(&path).arg("true").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(waiting.try_wait().unwrap().is_none(), "it waits");
    waiting.kill().unwrap();
    let begun = Instant::now();
    waiting.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    // and the locks of a client that dies end with its lease
    let again = lock(&a).unwrap();
    assert!(again.try_lock().is_err());
    drop(there);
    let there = lock(&b).unwrap();
    there.lock().unwrap();
    b.kill();
    let begun = Instant::now();
    again.lock().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(13), "{:?}", begun.elapsed());
    drop(there);
    b.umount_dead();
    b.again();
}
