use super::reply::*;
use super::*;
use crate::sys::fs::Stat;

/// A request as the kernel would write it.
fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
    let head = Body::default().u32((HEAD_LEN + body.len()) as u32).u32(opcode).u64(77).u64(5);
    let mut bytes = head.u32(1000).u32(100).u32(4321).u32(0).0;
    bytes.extend(body);
    bytes
}

fn parsed(bytes: &[u8]) -> Result<Op<'_>> {
    Ok(Raw::whole(bytes)?.parse()?.op)
}

/// Something of every operation.
fn samples() -> Vec<(Vec<u8>, &'static [u8])> {
    let longs = |n: u64| (1..=n).flat_map(u64::to_ne_bytes).collect::<Vec<u8>>();
    let all = [
        (code::LOOKUP, 0, &b"name\0"[..]),
        (code::FORGET, 1, b""),
        (code::GETATTR, 2, b""),
        (code::SETATTR, 11, b""),
        (code::READLINK, 0, b""),
        (code::SYMLINK, 0, b"name\0target\0"),
        (code::MKNOD, 2, b"name\0"),
        (code::MKDIR, 1, b"name\0"),
        (code::UNLINK, 0, b"name\0"),
        (code::RMDIR, 0, b"name\0"),
        (code::RENAME, 1, b"old\0new\0"),
        (code::RENAME2, 2, b"old\0new\0"),
        (code::LINK, 1, b"name\0"),
        (code::OPEN, 1, b""),
        (code::CREATE, 2, b"name\0"),
        (code::TMPFILE, 2, b"/\0"),
        (code::READ, 5, b""),
        (code::WRITE, 5, b"abc"),
        (code::STATFS, 0, b""),
        (code::RELEASE, 3, b""),
        (code::FSYNC, 2, b""),
        (code::FSYNCDIR, 2, b""),
        (code::SETXATTR, 1, b"user.a\0v"),
        (code::GETXATTR, 1, b"user.a\0"),
        (code::LISTXATTR, 1, b""),
        (code::REMOVEXATTR, 0, b"user.a\0"),
        (code::FLUSH, 3, b""),
        (code::READDIR, 5, b""),
        (code::READDIRPLUS, 5, b""),
        (code::GETLK, 6, b""),
        (code::SETLK, 6, b""),
        (code::SETLKW, 6, b""),
        (code::INTERRUPT, 1, b""),
        (code::FALLOCATE, 4, b""),
        (code::LSEEK, 3, b""),
        (code::COPY_FILE_RANGE, 7, b""),
        (code::COPY_FILE_RANGE_64, 7, b""),
        (code::DESTROY, 0, b""),
        (4711, 3, b"whatever"),
    ];
    let make = |(opcode, count, rest): (u32, u64, &'static [u8])| {
        let mut fixed = longs(count);
        match opcode {
            // a length that fits what follows
            code::WRITE => fixed[16..20].copy_from_slice(&3u32.to_ne_bytes()),
            code::SETXATTR => fixed[..4].copy_from_slice(&1u32.to_ne_bytes()),
            code::GETLK | code::SETLK | code::SETLKW => {
                fixed[32..36].copy_from_slice(&1u32.to_ne_bytes());
            }
            _ => {}
        }
        (request(opcode, &[&fixed, rest].concat()), rest)
    };
    all.into_iter().map(make).collect()
}

#[test]
fn every_operation_is_taken_apart() {
    for (bytes, _) in samples() {
        let opcode = u32::from_ne_bytes(bytes[4..8].try_into().unwrap());
        let op = parsed(&bytes).unwrap_or_else(|e| panic!("{opcode}: {e}"));
        assert_eq!(matches!(op, Op::Unknown { .. }), opcode == 4711, "{op:?}");
    }
    let head = Head::parse(&request(1, b"x\0")).unwrap();
    let want = Head { len: 42, opcode: 1, unique: 77, nodeid: 5, uid: 1000, gid: 100, pid: 4321 };
    assert_eq!(head, want);
    let bytes = request(code::SYMLINK, b"name\0a/target\0");
    assert_eq!(parsed(&bytes), Ok(Op::Symlink { name: b"name", target: b"a/target" }));
    let lens = Body::default().u64(9).u64(8).u32(3).u32(4).u64(0).u64(0).0;
    let bytes = request(code::WRITE, &[&lens, &b"abc"[..]].concat());
    let write = |kill, page| Op::Write { fh: 9, at: 8, kill, page, data: b"abc" };
    assert_eq!(parsed(&bytes), Ok(write(true, false)));
    let lens = Body::default().u64(9).u64(8).u32(3).u32(1).u64(0).u64(0).0;
    let bytes = request(code::WRITE, &[&lens, &b"abc"[..]].concat());
    assert_eq!(parsed(&bytes), Ok(write(false, true)));
}

#[test]
fn what_is_cut_short_is_garbled_and_never_a_panic() {
    for (bytes, rest) in samples() {
        let opcode = u32::from_ne_bytes(bytes[4..8].try_into().unwrap());
        let needed = HEAD_LEN + fixed_len(opcode) + rest.len();
        for len in 0..bytes.len() {
            assert!(Raw::whole(&bytes[..len]).is_err(), "{opcode}: its length is another");
            // the same with a head that says so
            let mut cut = bytes[..len].to_vec();
            if let Some(field) = cut.first_chunk_mut() {
                *field = (len as u32).to_ne_bytes();
            }
            let garbled = parsed(&cut).is_err();
            if len < HEAD_LEN {
                assert!(garbled, "{opcode} at {len}");
            } else if opcode != 4711 && opcode != code::TMPFILE {
                assert_eq!(garbled, len < needed, "{opcode} at {len} of {needed}");
            }
        }
    }
}

#[test]
fn any_bytes_are_taken_or_refused() {
    // a small generator: all opcodes, odd lengths, odd numbers in all fields
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    let mut taken = 0;
    for _ in 0..20_000 {
        let opcode = next() % 56;
        let len = next() as usize % 160;
        let body: Vec<u8> =
            (0..len).map(|_| if next() % 3 == 0 { 0 } else { next() as u8 }).collect();
        let bytes = request(opcode, &body);
        let raw = Raw::whole(&bytes).unwrap();
        taken += usize::from(raw.parse().is_ok());
        let three = Raw { head: raw.head, fixed: &body[..len / 2], rest: &body[len / 2..] };
        let _ = three.parse(); // as from a ring, split anywhere
        let _ = three.to_vec();
    }
    assert!(taken > 1000, "{taken}");
}

#[test]
fn a_request_in_three_pieces_is_the_same_when_it_is_kept() {
    for (bytes, _) in samples() {
        let whole = Raw::whole(&bytes).unwrap();
        // a ring's pieces are longer than what is in them
        let fixed = [whole.fixed, &[0xee; 40]].concat();
        let head = [whole.head, &[0xee; 88]].concat();
        let three = Raw { head: &head, fixed: &fixed, rest: whole.rest };
        assert_eq!(three.parse(), whole.parse());
        let kept = three.to_vec();
        assert_eq!(Raw::whole(&kept).unwrap().parse(), whole.parse());
    }
}

#[test]
fn attributes_to_set_are_those_that_are_valid() {
    let valid = fattr::SIZE | fattr::ATIME | fattr::MTIME | fattr::MTIME_NOW;
    let body = Body::default().u32(valid).u32(0).u64(1).u64(4096).u64(0);
    let body = body.u64(-5i64 as u64).u64(7).u64(0).u32(250).u32(8).u32(0);
    let mut body = body.u32(0o644).u32(0).u32(1).u32(2).u32(0).0;
    let want = Setattr {
        size: Some(4096),
        atime: Some(SetTime::At(-5, 250)),
        mtime: Some(SetTime::Now),
        ..Setattr::default()
    };
    assert_eq!(parsed(&request(code::SETATTR, &body)), Ok(Op::Setattr(want)));
    body[56..60].copy_from_slice(&1_000_000_000u32.to_ne_bytes());
    assert_eq!(parsed(&request(code::SETATTR, &body)), Err(Garbled), "no nanosecond");
}

#[test]
fn a_lock_is_of_the_file_or_of_bytes() {
    let ask = |start, end: u64, kind, flags| {
        let body = Body::default().u64(3).u64(9).u64(start).u64(end).u32(kind).u32(12);
        request(code::SETLKW, &body.u32(flags).u32(0).0)
    };
    let Ok(Op::Lock(lock)) = parsed(&ask(0, i64::MAX as u64, 1, 1)) else { panic!() };
    assert!(lock.flock && lock.wait && !lock.test && lock.kind == LockType::Write);
    assert_eq!((lock.start, lock.end, lock.owner, lock.pid), (0, u64::MAX, 9, 12));
    assert_eq!(parsed(&ask(9, 8, 1, 0)), Err(Garbled));
    assert_eq!(parsed(&ask(0, 8, 3, 0)), Err(Garbled));
    let body = reply::lock(0, u64::MAX, LockType::Read, 5);
    assert_eq!(body[8..16], (i64::MAX as u64).to_ne_bytes());
}

#[test]
fn bodies_have_the_lengths_of_their_structures() {
    let stat = Stat { mode: 0o100644, size: 5, ..Stat::default() };
    let it = Entry { ino: 9, stat: &stat, keep: 1 };
    let flags = OpenFlags { no_flush: true, keep_cache: true, direct: false, backing: Some(3) };
    assert_eq!(entry(&it).len(), 128);
    assert_eq!(attr(&it).len(), 104);
    assert_eq!(open(1, flags).len(), 16);
    assert_eq!(open(1, flags)[8..12], (1u32 << 5 | 1 << 7).to_ne_bytes());
    let direct = OpenFlags { no_flush: true, keep_cache: true, direct: true, backing: None };
    assert_eq!(open(1, direct)[8..12], (1u32 << 5 | 1 << 0).to_ne_bytes());
    let both = OpenFlags { backing: Some(3), ..direct };
    assert_eq!(open(1, both)[8..12], (1u32 << 5 | 1 << 7 | 1 << 0).to_ne_bytes());
    assert_eq!(created(&it, 1, flags).len(), 144);
    assert_eq!(lock(0, 1, LockType::Unlock, 0).len(), 24);
    let (blocks, block_len) = (1, 4096);
    let space = Statfs {
        blocks,
        blocks_free: 1,
        blocks_available: 1,
        files: 1,
        files_free: 1,
        block_len,
        name_len_max: 255,
    };
    assert_eq!(statfs(&space).len(), 80);
    assert_eq!(init::older().len(), 64);
    assert_eq!(inval_inode(1).len(), 40);
    assert_eq!(next_epoch()[..8], [16u32.to_ne_bytes(), 8u32.to_ne_bytes()].concat());
}

#[test]
fn a_listing_never_outgrows_its_room() {
    let stat = Stat { mode: 0o040755, ..Stat::default() };
    for plus in [None, Some(1)] {
        for room in [0, 23, 32, 160, 1000, 4096] {
            let mut listing = Listing::new(room);
            let mut count = 0;
            while listing.add(&vec![b'a'; 1 + count % 255], 1, &stat, count as u64, plus) {
                count += 1;
            }
            let body = listing.into_body();
            assert!(body.len() <= room as usize && body.len().is_multiple_of(8));
            assert_eq!(count > 0, room >= if plus.is_some() { 160 } else { 32 });
        }
    }
}

#[test]
fn an_offer_is_read_with_or_without_further_flags() {
    let offer = |minor: u32, flags: u32, rest: &[u8]| {
        let body = Body::default().u32(7).u32(minor).u32(131072).u32(flags).0;
        request(code::INIT, &[&body, rest].concat())
    };
    let ext = init::flag::INIT_EXT as u32;
    let got = init::Offer::parse(&offer(45, ext | 1, &(1u32 << 9).to_ne_bytes())).unwrap();
    assert_eq!(got.flags, u64::from(ext) | 1 | init::flag::OVER_IO_URING);
    assert_eq!((got.unique, got.readahead_max), (77, 131072));
    assert_eq!(init::Offer::parse(&offer(31, 1, b"")).unwrap().flags, 1);
    assert!(init::Offer::parse(&offer(45, ext, b"")).is_err(), "further flags are missing");
    assert!(init::Offer::parse(&offer(30, 1, b"")).is_err(), "too old");
    assert!(init::Offer::parse(&request(code::LOOKUP, b"x\0")).is_err());
    let taken = init::Taken {
        flags: init::flag::PASSTHROUGH | 1,
        readahead_max: 1,
        background_max: 64,
        write_len_max: 1 << 20,
        stack_depth: 2,
    };
    let body = init::taken(&taken);
    assert_eq!(body.len(), 64);
    assert_eq!(body[28..30], 256u16.to_ne_bytes(), "pages");
    assert_eq!(body[32..36], (1u32 << 5).to_ne_bytes(), "the high half");
}
