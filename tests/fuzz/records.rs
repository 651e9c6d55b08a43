//! Records and CBOR that nobody would make.

use imz::kml::record::{
    Attr, Change, Fid, Gone, Name, Op, Origin, Over, Place, Range, Record, Seq, Stamp, Time,
};

use super::engine::{DICTIONARY, Rng};

/// Few numbers and names, so that records meet; and the edges.
pub struct World {
    pub names: &'static [&'static [u8]],
    pub paths: &'static [&'static [u8]],
    pub fids: u64,
}

const ANY: World = World {
    names: &[b"a", b"name", b"\xff\xfe", b" -rf *", b"new\nline", b".imz"],
    paths: &[b"", b"a", b"a/b", b"/", b"..", b"\xff", b"some/where/else"],
    fids: 9,
};

pub fn any(rng: &mut Rng) -> Record {
    ANY.record(rng)
}

fn edge(rng: &mut Rng) -> u64 {
    match rng.below(3) {
        0 => *rng.pick(&DICTIONARY),
        1 => rng.next(),
        _ => rng.next() % 100,
    }
}

impl World {
    pub fn record(&self, rng: &mut Rng) -> Record {
        let origin = match rng.below(3) {
            0 => Origin::default(),
            _ => Origin { node: rng.below(4) as u32, seq: Seq(rng.next() % 1000) },
        };
        let (uid, gid) = (rng.below(3) as u32, *rng.pick(&[0, 100, u32::MAX]));
        let (time_ns, path) = (edge(rng), rng.pick(self.paths).to_vec());
        Record { time_ns, origin, uid, gid, path, op: self.op(rng) }
    }
    fn fid(&self, rng: &mut Rng) -> Fid {
        match rng.below(60) {
            0 => Fid(edge(rng).clamp(1, i64::MAX as u64)),
            _ => Fid(1 + rng.next() % self.fids),
        }
    }
    fn place(&self, rng: &mut Rng) -> Place {
        let name = match rng.below(40) {
            0 => vec![b'n'; 255],
            _ => rng.pick(self.names).to_vec(),
        };
        Place { dir: self.fid(rng), base: Stamp(0), name: Name::new(&name).unwrap() }
    }
    fn time(&self, rng: &mut Rng) -> Time {
        Time { sec: edge(rng) as i64, nsec: *rng.pick(&[0, 5, 999_999_999]) }
    }
    fn gone(&self, rng: &mut Rng) -> Gone {
        let kind = *rng.pick(&[0o100_000, 0o40_000, 0o120_000, 0o10_000, 0o20_000, 0]);
        let attr = Attr {
            mode: kind | rng.below(0o10_000) as u32,
            uid: rng.below(3) as u32,
            gid: rng.below(3) as u32,
            nlink: rng.below(3) as u32,
            rdev: 0x103,
            size: if rng.below(2) == 0 { 0 } else { edge(rng) },
            atime: self.time(rng),
            mtime: self.time(rng),
        };
        let target = (rng.below(2) == 0).then(|| self.target(rng));
        Gone { fid: self.fid(rng), base: Stamp(0), attr, target }
    }
    fn target(&self, rng: &mut Rng) -> Vec<u8> {
        let path = rng.pick(self.paths).to_vec();
        if path.is_empty() { b"/".to_vec() } else { path }
    }
    fn change(&self, rng: &mut Rng) -> Change {
        let mut some = |odds| rng.below(odds) == 0;
        let (mode, uid, gid, size) = (some(2), some(3), some(3), some(3));
        let (atime, mtime) = (some(3), some(3));
        Change {
            mode: mode.then(|| rng.below(0o10_000) as u32),
            uid: uid.then(|| rng.below(3) as u32),
            gid: gid.then(|| rng.below(3) as u32),
            size: size.then(|| *rng.pick(&[0, 1, 5000, 1 << 40, u64::MAX])),
            atime: atime.then(|| self.time(rng)),
            mtime: mtime.then(|| self.time(rng)),
        }
    }
    fn xattr(&self, rng: &mut Rng) -> Vec<u8> {
        let names: [&[u8]; 8] = [
            b"user.a",
            b"user.imz",
            b"trusted.imz",
            b"trusted.other",
            b"security.capability",
            b"system.posix_acl_access",
            b"nonsense",
            b"user.",
        ];
        rng.pick(&names).to_vec()
    }
    fn value(&self, rng: &mut Rng) -> Vec<u8> {
        let len = *rng.pick(&[0, 1, 20, 300]);
        rng.bytes(len)
    }
    fn op(&self, rng: &mut Rng) -> Op {
        let (fid, base, at) = (self.fid(rng), Stamp(0), self.place(rng));
        let (mode, umask) = (rng.below(0o10_000) as u32, *rng.pick(&[0, 0o22, 0o7777]));
        match rng.below(16) {
            0 | 1 => Op::Create { at, fid, mode, umask },
            2 | 3 => Op::Mkdir { at, fid, mode, umask },
            4 => Op::Symlink { at, fid, target: self.target(rng) },
            5 => {
                let kind = *rng.pick(&[0, 0o10_000, 0o20_000, 0o60_000, 0o140_000, 0o40_000]);
                Op::Mknod { at, fid, mode: mode | kind, umask, rdev: edge(rng) }
            }
            6 => Op::Link { at, fid, base },
            7 | 8 => {
                let over = match rng.below(4) {
                    0 => Over::Replaced(self.gone(rng)),
                    1 => Over::Exchanged { fid: self.fid(rng), base },
                    nth => Over::Nothing { noreplace: nth == 2 },
                };
                Op::Rename { from: at, to: self.place(rng), fid, base, over }
            }
            9 => Op::Unlink { at, gone: self.gone(rng) },
            10 => Op::Rmdir { at, gone: self.gone(rng) },
            11 | 12 => Op::Setattr { fid, base, new: self.change(rng), old: self.change(rng) },
            13 => {
                let (name, value) = (self.xattr(rng), self.value(rng));
                let old = (rng.below(2) == 0).then(|| self.value(rng));
                Op::Setxattr { fid, base, name, value, old }
            }
            14 => Op::Removexattr { fid, base, name: self.xattr(rng), old: None },
            _ => {
                let range = |rng: &mut Rng| Range { at: rng.next() % 9000, len: rng.next() % 9000 };
                let ranges = (0..rng.below(4)).map(|_| range(rng)).collect();
                let (size, mtime, old_size) = (rng.next() % 9000, self.time(rng), edge(rng));
                Op::Store { fid, base, size, mtime, ranges, old_size }
            }
        }
    }
}

/// Any CBOR item, mostly arrays and maps of small things, as messages are.
pub fn cbor(rng: &mut Rng, depth: usize) -> Vec<u8> {
    let mut out = Vec::new();
    item(rng, depth, &mut out);
    out
}

fn head(major: u8, value: u64, out: &mut Vec<u8>) {
    let major = major << 5;
    match value {
        0..=23 => out.push(major | value as u8),
        24..=0xff => out.extend_from_slice(&[major | 24, value as u8]),
        0x100..=0xffff => {
            out.push(major | 25);
            out.extend_from_slice(&(value as u16).to_be_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(major | 26);
            out.extend_from_slice(&(value as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

fn item(rng: &mut Rng, depth: usize, out: &mut Vec<u8>) {
    let leaf = depth == 0 || (depth < 4 && rng.below(3) > 0);
    match if leaf { rng.below(8) } else { 8 + rng.below(4) } {
        0..=3 => head(0, rng.next() % 30, out),
        4 => head(0, edge(rng), out),
        5 => {
            let len = *rng.pick(&[0, 8, 16, 16, 40]);
            head(2, len as u64, out);
            out.extend(rng.bytes(len));
        }
        6 => {
            let texts: [&[u8]; 4] = [b"vol", b"", b"host.example", b"x"];
            let text = rng.pick(&texts);
            head(3, text.len() as u64, out);
            out.extend_from_slice(text);
        }
        7 => out.push(*rng.pick(&[0xf4, 0xf5, 0xf6, 0xf7, 0xff])),
        8..=10 => {
            let len = rng.below(8);
            // sometimes it says more than there is
            let said = if rng.below(30) == 0 { edge(rng) } else { len as u64 };
            head(4, said, out);
            (0..len).for_each(|_| item(rng, depth - 1, out));
        }
        _ => {
            let len = rng.below(6);
            head(5, len as u64, out);
            for key in 0..len {
                head(0, key as u64, out);
                item(rng, depth - 1, out);
            }
        }
    }
}
