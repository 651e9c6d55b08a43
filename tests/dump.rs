//! `imz kml dump` on real journals: whole, damaged, alive, or not there.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use imz::kml::codec::Outcome;
use imz::kml::log::{Log, Options};
use imz::kml::record::{Fid, Name, Op, Origin, Place, ROOT, Record, Seq, Stamp};

/// A served directory with a journal of `count` records, made by a server that has ended.
fn journal(count: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open_or_create(&dir.path().join(".imz/kml"), 1, 9, Options::default()).unwrap();
    for i in 1..=count {
        let fid = Fid::new(1, 10 + i);
        let name = Name::new(format!("file{i}").as_bytes()).unwrap();
        let at = Place { dir: ROOT, base: Stamp(0), name };
        let record = Record {
            time_ns: i * 1_000_000_000,
            origin: Origin::default(),
            uid: 0,
            gid: 0,
            path: format!("file{i}").into_bytes(),
            op: Op::Create { at, fid, mode: 0o644, umask: 0o022 },
        };
        let ticket = log.append(&record).unwrap();
        log.settle(ticket, Outcome::Done);
    }
    log.sync(Seq(count)).unwrap();
    dir
}

fn imz(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_imz")).args(["kml", "dump"]).args(args).output().unwrap()
}

fn dump(args: &[&str]) -> Vec<String> {
    let done = imz(args);
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_journal_is_printed_from_wherever_it_is_named() {
    let served = journal(9);
    let dir = served.path().to_str().unwrap();
    let all = dump(&[dir]);
    assert_eq!(all.len(), 9, "{all:?}");
    assert!(all[0].contains("file1") && all[8].contains("file9"), "{all:?}");
    assert_eq!(dump(&[&format!("{dir}/.imz")]), all);
    assert_eq!(dump(&[&format!("{dir}/.imz/kml/")]), all);
    assert_eq!(dump(&[dir, "--from", "3", "--to", "5"]), all[2..5]);
    assert_eq!(dump(&[dir, "--from", "1970-01-01T00:00:08Z"]), all[7..]);
    assert_eq!(dump(&[dir, "--path", "file4"]), all[3..4]);
    let mut back = dump(&[dir, "--reverse"]);
    back.reverse();
    assert_eq!(back, all);
    for (i, line) in dump(&[dir, "--json"]).iter().enumerate() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(value["seq"], i + 1);
    }
}

#[test]
fn a_damaged_journal_is_printed_as_far_as_it_goes_with_exit_code_6() {
    let served = journal(9);
    let kml = served.path().join(".imz/kml");
    let first = imz::kml::store::segment_name(Seq(1));
    let segment = kml.join(first);
    let mut bytes = std::fs::read(&segment).unwrap();
    let at = bytes.windows(5).position(|it| it == b"file6").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let done = imz(&[served.path().to_str().unwrap()]);
    let error = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(6), "{error}");
    assert_eq!(done.stdout.iter().filter(|&&b| b == b'\n').count(), 5);
    assert!(error.contains("record 6") && error.contains(segment.to_str().unwrap()), "{error}");
}

#[test]
fn no_journal_is_exit_code_5_and_a_closed_pipe_no_failure() {
    let bare = tempfile::tempdir().unwrap();
    let bare = bare.path().to_str().unwrap();
    for name in [bare, &format!("{bare}/gone")] {
        let done = imz(&[name]);
        let error = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(5), "{error}");
        assert!(error.contains("imz: kml: ") && error.contains(name), "{error}");
    }

    let served = journal(5000); // more than a pipe holds
    let mut command = Command::new(env!("CARGO_BIN_EXE_imz"));
    command.args(["kml", "dump"]).arg(served.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
}

#[test]
fn follow_prints_what_is_written_later() {
    let served = journal(1);
    let mut command = Command::new(env!("CARGO_BIN_EXE_imz"));
    command.args(["kml", "dump", "--follow"]).arg(served.path()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("file1"));
    let log = Log::open(&served.path().join(".imz/kml")).unwrap();
    let record = log.get(Seq(1)).unwrap().record;
    log.append(&Record { path: b"later".to_vec(), ..record }).unwrap();
    assert!(lines.next().unwrap().unwrap().contains("later"));
    child.kill().unwrap();
    child.wait().unwrap();
}
