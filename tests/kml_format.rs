//! The journal's format is what man/imz-kml.5 says, and what it was when it was first written.

#![allow(clippy::unwrap_used)] // in a test it is the message

use std::fs;
use std::path::{Path, PathBuf};

use imz::kml::codec::{self, CursorPage, Outcome, SegmentHead, record_at, segment_at};
use imz::kml::dump::{Dump, Options as DumpOptions, Why};
use imz::kml::log::{Log, Options, SEGMENT_LEN_MIN};
use imz::kml::record::*;
use imz::kml::recover::Stop;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page() -> String {
    fs::read_to_string(root().join("man/imz-kml.5")).unwrap()
}

/// The rows of one of the page's tables, in words.
fn table(name: &str) -> Vec<Vec<String>> {
    let page = page();
    let start = page.find(&format!(".\\\" TS {name}\n")).expect("the table");
    let end = page[start..].find(".\\\" TE").expect("its end") + start;
    let rows = page[start..end].lines().skip(1).filter(|line| !line.starts_with('.'));
    rows.map(|row| row.split_whitespace().map(str::to_string).collect())
        .filter(|row: &Vec<String>| row[0] != "at")
        .collect()
}

/// (at, len, field) of a table of fields, which must lie side by side.
fn fields(name: &str, end: usize) -> Vec<(usize, usize, String)> {
    let mut due = 0;
    let mut fields = Vec::new();
    for row in table(name) {
        let Ok(len) = row[1].parse::<usize>() else { continue };
        let at: usize = row[0].parse().unwrap();
        assert_eq!(at, due, "{name}: {row:?}");
        due = at + len;
        fields.push((at, len, row[2].clone()));
    }
    assert_eq!(due, end, "{name}: where the table ends");
    fields
}

fn at(fields: &[(usize, usize, String)], name: &str) -> usize {
    fields.iter().find(|(_, _, field)| field == name).expect(name).0
}

#[test]
fn the_headers_stand_where_the_page_says() {
    let segment = fields("segment", codec::SEGMENT_HEADER_LEN);
    let expected = [
        ("magic", segment_at::MAGIC),
        ("version", segment_at::VERSION),
        ("node", segment_at::NODE),
        ("incarnation", segment_at::INCARNATION),
        ("first", segment_at::FIRST),
        ("len", segment_at::LEN),
        ("seed", segment_at::SEED),
        ("zero", segment_at::ZERO),
        ("crc", segment_at::CRC),
    ];
    assert_eq!(segment.len(), expected.len());
    for (name, offset) in expected {
        assert_eq!(at(&segment, name), offset, "segment {name}");
    }
    let record = fields("record", codec::HEADER_LEN);
    let expected = [
        ("crc", record_at::CRC),
        ("outcome", record_at::OUTCOME),
        ("chain", record_at::CHAIN),
        ("body_len", record_at::BODY_LEN),
        ("seq", record_at::SEQ),
        ("synced", record_at::SYNCED),
        ("time_ns", record_at::TIME_NS),
        ("origin_seq", record_at::ORIGIN_SEQ),
        ("origin_node", record_at::ORIGIN_NODE),
        ("uid", record_at::UID),
        ("gid", record_at::GID),
        ("kind", record_at::KIND),
        ("zero", record_at::ZERO),
    ];
    assert_eq!(record.len(), expected.len());
    for (name, offset) in expected {
        assert_eq!(at(&record, name), offset, "record {name}");
    }
}

/// The same for what has no constants: by the bytes that the code writes.
#[test]
fn the_cursors_and_the_writers_stand_where_the_page_says() {
    let cursors = fields("cursors", codec::CURSORS_LEN);
    let cursor = (b"acked".to_vec(), 0x0102_0304_0506_0708);
    let bytes = CursorPage { generation: 77, cursors: vec![cursor] }.encode().unwrap();
    let (magic, version) = (at(&cursors, "magic"), at(&cursors, "version"));
    assert_eq!(bytes[magic..magic + 8], codec::CURSORS_MAGIC);
    assert_eq!(u32::from(bytes[version]), codec::VERSION);
    assert_eq!(bytes[at(&cursors, "count")], 1);
    assert_eq!(bytes[at(&cursors, "generation")], 77);
    let first = at(&cursors, "cursors");
    assert_eq!(&bytes[first..first + 16], b"acked\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(bytes[first + 16..first + 24], 0x0102_0304_0506_0708u64.to_le_bytes());
    let crc = at(&cursors, "crc");
    assert_eq!(bytes[crc..], crc32(&bytes[..crc]).to_le_bytes());
    fields("writers", 16 + 8 * codec::WRITERS_MAX);
    assert!(page().contains(&format!("{} fids", codec::WRITERS_MAX)));
}

/// CRC-32 as the page names it, written out, so that the page's claim is tested, too.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 }
        })
    })
}

#[test]
fn the_page_says_the_same_numbers() {
    let page = page();
    assert!(page.contains(&format!("Format version: {}.\n", codec::VERSION)));
    assert_eq!(page.matches(&format!("at most {}", codec::BODY_LEN_MAX)).count(), 2);
    assert!(page.contains(&format!("at least {} bytes", codec::RECORD_LEN_MIN)));
    assert!(page.contains(&format!("2 bytes, at most {PATH_LEN_MAX}")));
    assert!(page.contains(&format!("at most {XATTR_LEN_MAX}")));
    assert!(page.contains(&format!("at most {RANGES_MAX}")));
    assert!(page.contains(&format!("1 to {TARGET_LEN_MAX}")));
    assert!(page.contains(&format!("1 to {NAME_LEN_MAX} bytes")));
    for outcome in Outcome::ALL {
        let word = outcome.word().to_le_bytes();
        let shown = if word == [0; 4] {
            "0".into()
        } else {
            format!("{:?}", str::from_utf8(&word).unwrap())
        };
        assert!(page.contains(&format!("{shown} {}", outcome.name())), "{shown}");
    }
    let kinds: Vec<(u8, String)> =
        table("kinds").iter().map(|row| (row[0].parse().unwrap(), row[1].clone())).collect();
    let known = codec::KINDS.map(|(kind, name)| (kind, name.to_string()));
    assert_eq!(kinds, known);
}

/// Body lengths as the page's words for the parts add up, against those that the code writes.
#[test]
fn the_bodies_have_the_parts_that_the_page_names() {
    for record in records() {
        let bytes = codec::encode_wire(&record, Seq(1)).unwrap();
        let body_len = u32::from_le_bytes(
            bytes[record_at::BODY_LEN..record_at::BODY_LEN + 4].try_into().unwrap(),
        );
        let kind = bytes[record_at::KIND].to_string();
        let row = table("kinds").into_iter().find(|row| row[0] == kind).expect("the kind");
        let parts: usize = row[2..].iter().map(|part| part_len(part, &record.op)).sum();
        assert_eq!(body_len as usize, 2 + record.path.len() + parts, "{row:?}");
    }
}

fn part_len(part: &str, op: &Op) -> usize {
    let gone_len = |gone: &Gone| {
        8 + 8 + 4 * 4 + 8 + 8 + 12 + 12 + 2 + gone.target.as_ref().map_or(0, Vec::len)
    };
    match (part, op) {
        ("-", _) => 0,
        // names in the fixture have one length per record
        ("place", op) => 8 + 8 + 1 + op.places()[0].unwrap().name.as_bytes().len(),
        ("fid" | "base" | "rdev" | "size", _) => 8,
        ("mode" | "umask", _) => 4,
        ("target", Op::Symlink { target, .. }) => 2 + target.len(),
        ("over", Op::Rename { over: Over::Nothing { .. }, .. }) => 1,
        ("over", Op::Rename { over: Over::Exchanged { .. }, .. }) => 1 + 8 + 8,
        ("over", Op::Rename { over: Over::Replaced(gone), .. })
        | ("gone", Op::Unlink { gone, .. } | Op::Rmdir { gone, .. }) => {
            usize::from(part == "over") + gone_len(gone)
        }
        ("time", _) => 12,
        ("change", _) => 48,
        ("xname", Op::Setxattr { name, .. } | Op::Removexattr { name, .. }) => 1 + name.len(),
        ("value", Op::Setxattr { value, .. }) => 4 + value.len(),
        ("old", Op::Setxattr { old, .. } | Op::Removexattr { old, .. }) => {
            1 + 4 + old.as_ref().map_or(0, Vec::len)
        }
        ("ranges", Op::Store { ranges, .. }) => 2 + 16 * ranges.len(),
        other => panic!("the page names a part that there is not: {other:?}"),
    }
}

// ---- the fixture of version 1 ----

const NODE: u32 = 77;
const INCARNATION: u128 = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff;

/// What the fixture holds: never change this; a new version has a fixture of its own.
fn records() -> Vec<Record> {
    let place = |name: &[u8]| Place { dir: ROOT, base: Stamp(3), name: Name::new(name).unwrap() };
    let (fid, base) = (Fid::new(77, 5), Stamp(4));
    let (early, late) = (Time { sec: -1, nsec: 999_999_999 }, Time { sec: 1 << 33, nsec: 1 });
    let attr = Attr {
        mode: 0o100_640,
        uid: 1,
        gid: 2,
        nlink: 1,
        rdev: 0,
        size: 10,
        atime: early,
        mtime: late,
    };
    let gone = |target| Gone { fid, base, attr, target };
    let rename = |over| Op::Rename { from: place(b"a"), to: place(b"\xff"), fid, base, over };
    let new = Change { mode: Some(0o7777), mtime: Some(early), ..Change::default() };
    let old = Change {
        mode: Some(0),
        uid: Some(1),
        gid: Some(2),
        size: Some(3),
        atime: Some(late),
        mtime: Some(late),
    };
    let xattr =
        |value: Vec<u8>, old| Op::Setxattr { fid, base, name: b"user.x".into(), value, old };
    let ranges = vec![Range { at: 0, len: 1 }, Range { at: 1 << 40, len: 1 << 20 }];
    let mut ops = vec![
        Op::Noop,
        Op::Create { at: place(b"a"), fid, mode: 0o644, umask: 0o022 },
        Op::Mkdir { at: place(&[b'n'; 255]), fid, mode: 0o1777, umask: 0 },
        Op::Symlink { at: place(b"l"), fid, target: b"../t".into() },
        Op::Mknod { at: place(b"d"), fid, mode: 0o020_600, umask: 0o077, rdev: 0x501 },
        Op::Link { at: place(b"h"), fid, base },
        rename(Over::Nothing { noreplace: false }),
        rename(Over::Nothing { noreplace: true }),
        rename(Over::Replaced(gone(None))),
        rename(Over::Exchanged { fid: Fid(9), base: Stamp(8) }),
        Op::Unlink { at: place(b"l"), gone: gone(Some(b"../t".into())) },
        Op::Rmdir { at: place(b"r"), gone: gone(None) },
        Op::Setattr { fid, base, new, old },
        xattr(b"v".into(), None),
        Op::Removexattr { fid, base, name: b"user.x".into(), old: Some(b"v".into()) },
        Op::Removexattr { fid, base, name: b"user.y".into(), old: None },
        Op::Store { fid, base, size: 1 << 41, mtime: late, ranges, old_size: 7 },
    ];
    // enough to begin a second segment
    ops.extend((0..3).map(|n| xattr(vec![n; XATTR_LEN_MAX], Some(vec![n; XATTR_LEN_MAX]))));
    let record = |(nth, op)| Record {
        time_ns: 1_700_000_000_000_000_000 + nth as u64,
        origin: if nth == 1 { Origin { node: 3, seq: Seq(99) } } else { Origin::default() },
        uid: 1000,
        gid: 100,
        path: b"dir/\xc3\xa4\xff".into(),
        op,
    };
    ops.into_iter().enumerate().map(record).collect()
}

fn outcome(nth: usize) -> Outcome {
    Outcome::ALL[nth % 3]
}

fn fixture(version: u32) -> PathBuf {
    root().join(format!("tests/fixtures/kml-v{version}"))
}

fn write(dir: &Path) {
    let options = Options { segment_len: SEGMENT_LEN_MIN };
    let log = Log::open_or_create(dir, NODE, INCARNATION, options).unwrap();
    for (nth, record) in records().iter().enumerate() {
        let ticket = log.append(record).unwrap();
        log.settle(ticket, outcome(nth));
    }
    log.set_cursor("acked", 12).unwrap();
    log.sync(log.last()).unwrap();
}

/// Run once for each version: `cargo test --test kml_format -- --ignored`.
#[test]
#[ignore = "writes the fixture, which is then never changed"]
fn write_the_fixture() {
    let dir = fixture(codec::VERSION);
    assert!(!dir.exists(), "{} is there already", dir.display());
    write(&dir);
    fs::remove_file(dir.join("lock")).unwrap();
}

#[test]
fn every_version_has_a_fixture() {
    assert!((1..=codec::VERSION).all(|version| fixture(version).is_dir()));
}

#[test]
fn the_fixture_reads_as_it_was_written() {
    let mut dump = Dump::open(&fixture(1), DumpOptions::default()).unwrap();
    let shown: Vec<_> = dump.by_ref().collect();
    assert!(matches!(dump.end().why, Why::Stop(Stop::End)), "{}", dump.end());
    // opening writes, so it is done on a copy
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(1)).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
    }
    let log = Log::open(dir.path()).unwrap();
    assert_eq!((log.node(), log.incarnation(), log.cursor("acked")), (NODE, INCARNATION, 12));
    let read: Vec<_> = log.entries(Seq(1)).map(Result::unwrap).collect();
    assert_eq!(read, shown);
    assert_eq!(read.len(), records().len());
    for (nth, (entry, record)) in read.iter().zip(records()).enumerate() {
        assert_eq!((entry.seq, entry.outcome), (Seq(nth as u64 + 1), outcome(nth)));
        assert_eq!(entry.record, record);
    }
}

#[test]
fn the_fixture_is_still_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let mut count = 0;
    for entry in fs::read_dir(fixture(1)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ext| ext == "kml") {
            let now = fs::read(dir.path().join(path.file_name().unwrap())).unwrap();
            let then = fs::read(&path).unwrap();
            assert!(now == then, "{} would now be written otherwise", path.display());
            let head = SegmentHead::verify(&then).unwrap();
            assert_eq!(head.len, then.len() as u64);
            count += 1;
        }
    }
    assert_eq!(count, 3);
}
