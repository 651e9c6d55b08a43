//! Records to test with: one of every kind and shape, and small ones that tell themselves apart.

use crate::kml::record::*;

pub fn place(dir: u64, name: &[u8]) -> Place {
    Place { dir: Fid(dir), base: Stamp(3), name: Name::new(name).unwrap() }
}

pub fn gone(fid: u64) -> Gone {
    let time = Time { sec: -5, nsec: 999_999_999 };
    let attr = Attr {
        mode: 0o100_644,
        uid: 1000,
        gid: 100,
        nlink: 2,
        rdev: 0,
        size: 1 << 40,
        atime: time,
        mtime: Time { sec: 1_700_000_000, nsec: 1 },
    };
    Gone { fid: Fid(fid), base: Stamp(9), attr, target: None }
}

pub fn record(op: Op) -> Record {
    Record {
        time_ns: 1_700_000_000_123_456_789,
        origin: Origin::default(),
        uid: 1000,
        gid: 100,
        path: b"some/where".to_vec(),
        op,
    }
}

/// A small record that says `n`.
pub fn small(n: u64) -> Record {
    let at = place(1, format!("file-{n}").as_bytes());
    Record {
        time_ns: n,
        path: vec![b'p'; (n % 61) as usize],
        ..record(Op::Create { at, fid: Fid(n + 2), mode: 0o644, umask: 0o022 })
    }
}

/// One record at least of every kind, with every variant that has bytes of its own.
pub fn all() -> Vec<Record> {
    let at = || place(1, b"name");
    let (fid, base) = (Fid::new(3, 77), Stamp(12));
    let link = Gone { target: Some(b"../a".to_vec()), ..gone(5) };
    let time = Time { sec: 1_600_000_000, nsec: 5 };
    let new = Change { mode: Some(0o4755), size: Some(0), ..Change::default() };
    let old = Change {
        mode: Some(0o644),
        uid: Some(0),
        gid: Some(u32::MAX),
        size: Some(u64::MAX),
        atime: Some(time),
        mtime: Some(Time::default()),
    };
    let over = |over| Op::Rename { from: at(), to: place(2, &[0xff; 255]), fid, base, over };
    let ranges: Vec<Range> =
        (0..RANGES_MAX as u64).map(|n| Range { at: n << 20, len: 5 }).collect();
    let store = |ranges| Op::Store { fid, base, size: 99, mtime: time, ranges, old_size: 7 };
    let ops = vec![
        Op::Noop,
        Op::Create { at: at(), fid, mode: 0o100_666, umask: 0o077 },
        Op::Mkdir { at: at(), fid, mode: 0o777, umask: 0o022 },
        Op::Symlink { at: at(), fid, target: vec![b't'; TARGET_LEN_MAX] },
        Op::Mknod { at: at(), fid, mode: 0o020_600, umask: 0, rdev: 0x0103 },
        Op::Link { at: at(), fid, base },
        over(Over::Nothing { noreplace: false }),
        over(Over::Nothing { noreplace: true }),
        over(Over::Replaced(gone(8))),
        over(Over::Exchanged { fid: Fid(9), base: Stamp(1) }),
        Op::Unlink { at: at(), gone: link },
        Op::Rmdir { at: at(), gone: gone(6) },
        Op::Setattr { fid, base, new, old },
        Op::Setxattr {
            fid,
            base,
            name: b"user.big".to_vec(),
            value: vec![7; XATTR_LEN_MAX],
            old: Some(vec![8; XATTR_LEN_MAX]),
        },
        Op::Setxattr { fid, base, name: b"user.a".to_vec(), value: vec![], old: None },
        Op::Removexattr { fid, base, name: vec![b'n'; 255], old: Some(vec![]) },
        Op::Removexattr { fid, base, name: b"user.a".to_vec(), old: None },
        store(vec![]),
        store(ranges),
    ];
    let mut records: Vec<Record> = ops.into_iter().map(record).collect();
    records[1].origin = Origin { node: NODE_MAX, seq: Seq(4711) };
    records[2].path = vec![];
    records[3].path = vec![0xfe; PATH_LEN_MAX];
    records
}
