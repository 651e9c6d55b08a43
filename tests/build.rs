//! What developers do all day works in a mount: building, version control, a database, rsync.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{AMPLE, Disk, Mount, Server, run, succeed, tree};

/// A program of `count` files and a Makefile.
fn write_program(dir: &Path, count: usize) {
    let functions: Vec<String> = (0..count).map(|i| format!("part{i}")).collect();
    let declared: String = functions.iter().map(|it| format!("int {it}(int x);\n")).collect();
    fs::write(dir.join("parts.h"), declared).unwrap();
    for (i, name) in functions.iter().enumerate() {
        let text = format!("#include \"parts.h\"\nint {name}(int x) {{ return x + {i}; }}\n");
        fs::write(dir.join(format!("{name}.c")), text).unwrap();
    }
    let calls: String = functions.iter().map(|it| format!("    x = {it}(x);\n")).collect();
    let main = format!(
        "#include <stdio.h>\n#include \"parts.h\"\nint main(void) {{\n    int x = 0;\n{calls}    \
         printf(\"%d\\n\", x);\n    return 0;\n}}\n"
    );
    fs::write(dir.join("main.c"), main).unwrap();
    let makefile = "CFLAGS = -O1 -MMD\nobjects := $(patsubst %.c,%.o,$(wildcard *.c))\nprogram: \
                    $(objects)\n\tcc -o $@ $^\n-include $(wildcard *.d)\nclean:\n\trm -f *.o *.d \
                    program\n";
    fs::write(dir.join("Makefile"), makefile).unwrap();
}

#[test]
fn a_program_builds_in_one_mount_and_runs_from_the_other() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    fs::create_dir(a.at("src")).unwrap();
    write_program(&a.at("src"), 12);
    let make = || run(&["make", "-j2", "-s", "-C", a.at("src").to_str().unwrap()]);
    make();
    a.sync();
    let program = b.at("src/program");
    assert_eq!(run(&[&program]), "66\n");

    // make sees by the times that nothing is to be done, here and there
    for mount in [&a, &b] {
        run(&["make", "-q", "-C", mount.at("src").to_str().unwrap()]);
    }
    fs::write(b.at("src/part3.c"), "int part3(int x) { return x + 1003; }\n").unwrap();
    b.sync();
    make();
    a.sync();
    assert_eq!(run(&[&program]), "1066\n");
    a.no_conflicts();
}

fn git(dir: &Path, words: &[&str]) -> String {
    let mut command = common::command(&["git"]);
    command.args(["-c", "user.name=T", "-c", "user.email=t@example.org"]);
    command.args(["-c", "init.defaultBranch=main", "-c", "gc.auto=0", "-c", "safe.directory=*"]);
    command
        .args(words)
        .current_dir(dir)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("HOME", "/nonexistent");
    succeed(&mut command)
}

#[test]
fn git_works_and_the_other_mount_is_clean() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    let work = a.at("work");
    fs::create_dir(&work).unwrap();
    write_program(&work, 60);
    git(&work, &["init", "-q"]);
    git(&work, &["add", "."]);
    git(&work, &["commit", "-q", "-m", "one"]);
    for i in 0..5 {
        fs::write(work.join(format!("part{i}.c")), format!("int changed{i};\n")).unwrap();
        git(&work, &["commit", "-q", "-a", "-m", "more"]);
    }
    git(a.path(), &["clone", "-q", "--no-hardlinks", "work", "cloned"]);
    git(a.path(), &["clone", "-q", "--local", "work", "linked"]);
    for name in ["work", "cloned", "linked"] {
        let dir = a.at(name);
        assert_eq!(git(&dir, &["status", "--porcelain"]), "");
        git(&dir, &["gc", "-q", "--prune=now"]);
        git(&dir, &["fsck", "--full", "--strict"]);
    }
    a.sync();
    for name in ["work", "cloned", "linked"] {
        let dir = b.at(name);
        assert_eq!(git(&dir, &["status", "--porcelain"]), "", "{name} at the other");
        git(&dir, &["fsck", "--full"]);
        assert_eq!(git(&dir, &["rev-list", "--count", "HEAD"]), "6\n");
    }
    // and the other goes on
    fs::write(b.at("work/new.c"), "int new;\n").unwrap();
    git(&b.at("work"), &["add", "."]);
    git(&b.at("work"), &["commit", "-q", "-m", "from the other"]);
    b.sync();
    assert_eq!(git(&work, &["rev-list", "--count", "HEAD"]), "7\n");
    assert_eq!(git(&work, &["status", "--porcelain"]), "");
    a.no_conflicts();
    b.no_conflicts();
}

#[test]
fn a_database_keeps_its_integrity() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    if Command::new("sqlite3").arg("--version").output().is_err() {
        return common::unable("sqlite3 is missing").unwrap_or(());
    }
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let b = Mount::start(&server, &disk, "cache-b");
    let sql = |mount: &Mount, name: &str, text: &str| {
        run(&["sqlite3", "-bail", mount.at(name).to_str().unwrap(), text])
    };
    let rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) \
                INSERT INTO t SELECT i, hex(randomblob(40)) FROM n";
    for mode in ["delete", "wal", "truncate"] {
        let name = format!("{mode}.db");
        sql(&a, &name, &format!("PRAGMA journal_mode={mode}; CREATE TABLE t(i, x)"));
        for _ in 0..3 {
            sql(&a, &name, &format!("BEGIN; {rows}; COMMIT; DELETE FROM t WHERE i % 3 = 0"));
        }
        sql(&a, &name, "CREATE INDEX it ON t(x); VACUUM");
        assert_eq!(sql(&a, &name, "PRAGMA integrity_check").trim(), "ok");
        a.sync();
        assert_eq!(sql(&b, &name, "PRAGMA integrity_check").trim(), "ok");
        assert_eq!(sql(&b, &name, "SELECT count(*) FROM t").trim(), "10002");
        sql(&b, &name, "UPDATE t SET x = 'b' WHERE i = 1");
        b.sync();
        assert_eq!(sql(&a, &name, "SELECT count(*) FROM t WHERE x = 'b'").trim(), "3");
        assert_eq!(sql(&a, &name, "PRAGMA integrity_check").trim(), "ok");
    }
    a.no_conflicts();
    b.no_conflicts();
}

#[test]
fn rsync_finds_nothing_to_do() {
    let Some(disk) = Disk::new(AMPLE) else { return };
    let original = disk.dir("original");
    tree::make(&original, 2, 600, 8 << 20);
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let (from, to) = (format!("{}/", original.display()), format!("{}/", a.path().display()));
    let rsync = |words: &[&str]| {
        let all = [&["rsync", "-aHAX", "--specials", "--devices"], words, &[&from, &to]].concat();
        run(&all)
    };
    rsync(&[]);
    assert_eq!(rsync(&["--checksum", "--delete", "-n", "-i"]), "");
    a.sync();
    assert_eq!(rsync(&["--checksum", "--delete", "-n", "-i"]), "");
    common::compare::assert_same(&original, server.dir());
}
