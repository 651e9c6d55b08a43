//! The checks of what is in files: reading, writing, mapping, holes, sizes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom as RawSeek};

use super::Place;
use super::checks::{errno, raw};
use crate::common::command;
use crate::common::tree::Rng;

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn create(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).unwrap()
}

pub fn unlinked_files(p: &Place) {
    let file = create(&p.at("file"));
    file.write_all_at(b"before", 0).unwrap();
    let reader = File::open(p.at("file")).unwrap();
    fs::remove_file(p.at("file")).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(reader.metadata().unwrap().nlink(), 0);
    file.write_all_at(b"after!", 0).unwrap();
    file.set_len(100_000).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    file.sync_all().unwrap();
    let mut bytes = [0; 6];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"after!");
    let meta = reader.metadata().unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777), (100_000, 0o640));
    // a new file of the name is another one
    fs::write(p.at("file"), "new").unwrap();
    file.write_all_at(b"old", 0).unwrap();
    assert_eq!(fs::read(p.at("file")).unwrap(), b"new");
    // replaced by a rename while it is open
    let replaced = open(&p.at("file"));
    fs::write(p.at("other"), "other").unwrap();
    fs::rename(p.at("other"), p.at("file")).unwrap();
    assert_eq!(replaced.metadata().unwrap().nlink(), 0);
    replaced.write_all_at(b"gone", 0).unwrap();
    assert_eq!(fs::read(p.at("file")).unwrap(), b"other");
    // one name of two
    let linked = create(&p.at("one"));
    fs::hard_link(p.at("one"), p.at("two")).unwrap();
    fs::remove_file(p.at("one")).unwrap();
    linked.write_all_at(b"still here", 0).unwrap();
    assert_eq!(linked.metadata().unwrap().nlink(), 1);
    drop(linked);
    p.sync();
    assert_eq!(fs::read(p.served.join("two")).unwrap(), b"still here");
}

pub fn open_flags(p: &Place) {
    fs::write(p.at("file"), "start").unwrap();
    let append = || File::options().append(true).open(p.at("file")).unwrap();
    let (mut a, mut b) = (append(), append());
    for _ in 0..50 {
        a.write_all(b"a").unwrap();
        b.write_all(b"bb").unwrap();
    }
    assert_eq!(fs::metadata(p.at("file")).unwrap().len(), 5 + 150);
    let file = open(&p.at("file"));
    file.set_len(3).unwrap();
    a.write_all(b"!").unwrap();
    assert_eq!(fs::read(p.at("file")).unwrap(), b"sta!");
    drop((a, b, file));
    // readers see O_TRUNC through a descriptor that is open
    let mut reader = File::open(p.at("file")).unwrap();
    drop(File::create(p.at("file")).unwrap());
    let mut text = String::new();
    assert_eq!(reader.read_to_string(&mut text).unwrap(), 0);
    p.alike(|at| {
        fs::write(at.join("x"), "x").unwrap();
        let with = |flags: i32| {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(flags);
            errno(options.open(at.join("x")))
        };

        (
            errno(File::options().write(true).create_new(true).open(at.join("x"))),
            with(libc::O_DIRECTORY),
            with(libc::O_SYNC),
            with(libc::O_DSYNC | libc::O_CLOEXEC),
            with(libc::O_NOATIME),
            with(libc::O_PATH),
            // a read-only file, made so, is still written through its first descriptor
            errno(
                File::options()
                    .write(true)
                    .create_new(true)
                    .mode(0o400)
                    .open(at.join("readonly"))
                    .and_then(|mut file| file.write_all(b"written")),
            ),
            fs::read(at.join("readonly")).unwrap(),
        )
    });
}

/// O_DIRECT wants memory that is aligned.
pub fn direct(p: &Place) {
    const LEN: usize = 64 << 10;
    let mut memory = vec![0; LEN + 4096];
    let from = memory.as_ptr().align_offset(4096);
    let aligned = &mut memory[from..from + LEN];
    aligned.copy_from_slice(&Rng(3).bytes(LEN, false));
    let want = aligned.to_vec();
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).custom_flags(libc::O_DIRECT);
    let file = options.open(p.at("file")).unwrap();
    file.write_all_at(aligned, 0).unwrap();
    file.write_all_at(aligned, LEN as u64).unwrap();
    aligned.fill(0);
    file.read_exact_at(aligned, LEN as u64).unwrap();
    assert!(aligned == want);
    drop(file);
    assert!(fs::read(p.at("file")).unwrap() == [&want[..], &want[..]].concat());
}

#[allow(unsafe_code)]
pub fn mapped(p: &Place) {
    let mut file = create(&p.at("file"));
    file.write_all(&vec![b'.'; 1 << 20]).unwrap();
    // SAFETY: nobody truncates the file while it is mapped.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    map[5000..5006].copy_from_slice(b"mapped");
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, 5000).unwrap();
    assert_eq!(&bytes, b"mapped");
    file.write_all_at(b"written", 9000).unwrap();
    assert_eq!(&map[9000..9007], b"written");
    // changed through the mapping after the descriptor is closed and all is shipped, without a call
    drop(file);
    p.sync();
    map[700_000..700_004].copy_from_slice(b"late");
    map.flush().unwrap();
    drop(map);
    assert_eq!(fs::read(p.at("file")).unwrap()[700_000..700_004], *b"late");
    crate::common::wait_for("what was mapped is at the server", 30, || {
        p.sync();
        fs::read(p.served.join("file")).unwrap() == fs::read(p.at("file")).unwrap()
    });
    // a private mapping stays private
    let file = open(&p.at("file"));
    // SAFETY: as above.
    let mut private = unsafe { memmap2::MmapOptions::new().map_copy(&file) }.unwrap();
    private[0] = b'!';
    assert_eq!(fs::read(p.at("file")).unwrap()[0], b'.');
}

pub fn allocate(p: &Place) {
    use FallocateFlags as F;
    p.alike(|at| {
        let file = create(&at.join("file"));
        file.write_all_at(&vec![b'x'; 200_000], 0).unwrap();
        let call = |flags, offset, len| raw(rustix::fs::fallocate(&file, flags, offset, len));
        let said = [
            call(F::empty(), 0, 300_000),
            call(F::KEEP_SIZE, 300_000, 100_000),
            call(F::PUNCH_HOLE | F::KEEP_SIZE, 8192, 65_536),
            call(F::ZERO_RANGE, 100_000, 5000),
            call(F::PUNCH_HOLE, 0, 4096),
            call(F::empty(), 0, 0),
        ];
        drop(file);
        let bytes = fs::read(at.join("file")).unwrap();
        (said, bytes.len(), bytes)
    });
    // FUSE has no way to say these
    let file = open(&p.at("file"));
    for flags in [F::COLLAPSE_RANGE, F::INSERT_RANGE] {
        let said = rustix::fs::fallocate(&file, flags, 4096, 4096);
        assert_eq!(said, Err(rustix::io::Errno::OPNOTSUPP));
    }
    drop(file);
    p.sync();
    assert!(fs::read(p.served.join("file")).unwrap() == fs::read(p.at("file")).unwrap());
}

pub fn holes(p: &Place) {
    p.alike(|at| {
        let file = create(&at.join("file"));
        file.set_len(10 << 20).unwrap();
        file.write_all_at(&[1; 4096], 2 << 20).unwrap();
        file.write_all_at(&[1; 4096], 7 << 20).unwrap();
        file.sync_all().unwrap();
        let seek = |to| rustix::fs::seek(&file, to).map_err(|e| e.raw_os_error()).ok();
        let found = [
            seek(RawSeek::Data(0)),
            seek(RawSeek::Hole(0)),
            seek(RawSeek::Hole(2 << 20)),
            seek(RawSeek::Data(3 << 20)),
            seek(RawSeek::Data(8 << 20)),
            seek(RawSeek::Hole(9 << 20)),
            seek(RawSeek::Data(11 << 20)),
        ];
        (found, file.metadata().unwrap().blocks() < 100)
    });
    p.sync();
    let served = fs::metadata(p.served.join("file")).unwrap();
    assert_eq!(served.len(), 10 << 20);
    assert!(served.blocks() * 512 < 9 << 20, "the holes were filled at the server");
}

pub fn copy_range(p: &Place) {
    let bytes = Rng(5).bytes(300_000, false);
    fs::write(p.at("from"), &bytes).unwrap();
    let (from, to) = (File::open(p.at("from")).unwrap(), create(&p.at("to")));
    let (mut at, mut into) = (1000, 50);
    let mut left = 250_000;
    while left > 0 {
        match rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut into), left) {
            Ok(0) => panic!("the copy ends early"),
            Ok(n) => left -= n,
            Err(e) => panic!("{e}"),
        }
    }
    drop(to);
    assert!(fs::read(p.at("to")).unwrap()[50..] == bytes[1000..251_000]);
    fs::copy(p.at("from"), p.at("whole")).unwrap();
    fs::copy(p.at("from"), p.bare.join("out")).unwrap();
    fs::copy(p.bare.join("out"), p.at("in")).unwrap();
    assert!(fs::read(p.at("in")).unwrap() == bytes && fs::read(p.at("whole")).unwrap() == bytes);
    p.sync();
    assert!(fs::read(p.served.join("to")).unwrap()[50..] == bytes[1000..251_000]);
}

pub fn beyond_4_gib(p: &Place) {
    const FAR: u64 = (4 << 30) + 12_345;
    let file = create(&p.at("file"));
    file.write_all_at(b"near", 0).unwrap();
    file.write_all_at(b"far", FAR).unwrap();
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, FAR).unwrap();
    assert_eq!(&bytes, b"far");
    file.read_exact_at(&mut bytes, FAR - 100_000).unwrap();
    assert_eq!(bytes, [0; 3]);
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), FAR + 3);
    assert!(meta.blocks() < 1000, "{} blocks", meta.blocks());
    drop(file);
    p.sync();
    let served = File::open(p.served.join("file")).unwrap();
    served.read_exact_at(&mut bytes, FAR).unwrap();
    assert_eq!(&bytes, b"far");
    let meta = served.metadata().unwrap();
    assert_eq!(meta.len(), FAR + 3);
    assert!(meta.blocks() * 512 < 64 << 20, "the hole was filled at the server");
    fs::remove_file(p.at("file")).unwrap();
}

pub fn truncate(p: &Place) {
    p.alike(|at| {
        fs::write(at.join("file"), vec![b'x'; 10_000]).unwrap();
        let file = open(&at.join("file"));
        file.set_len(5000).unwrap();
        file.set_len(20_000).unwrap();
        let shown = fs::read(at.join("file")).unwrap();
        let closed = File::options().write(true).open(at.join("file")).unwrap();
        drop(file);
        closed.set_len(7).unwrap();
        drop(closed);
        let read_only = File::open(at.join("file")).unwrap();
        let too_far = open(&at.join("file")).set_len(u64::MAX >> 1);
        (shown, fs::read(at.join("file")).unwrap(), errno(read_only.set_len(1)), errno(too_far))
    });
}

/// Random writes, reads, truncations and holes against bytes in memory.
pub fn against_a_model(p: &Place) {
    const LEN_MAX: usize = 3 << 20;
    let mut rng = Rng(77);
    let mut model: Vec<u8> = Vec::new();
    let mut file = create(&p.at("file"));
    for step in 0..600 {
        let (at, len) = (rng.below(LEN_MAX - 200_000), 1 + rng.below(200_000));
        match rng.below(10) {
            0..=3 => {
                let bytes = rng.bytes(len, false);
                file.write_all_at(&bytes, at as u64).unwrap();
                model.resize(model.len().max(at + len), 0);
                model[at..at + len].copy_from_slice(&bytes);
            }
            4..=6 => {
                let mut bytes = vec![0; len];
                let count = file.read_at(&mut bytes, at as u64).unwrap();
                let from = at.min(model.len());
                let want = &model[from..(at + len).min(model.len()).max(from)];
                assert!(bytes[..count] == want[..count], "step {step}: wrong bytes at {at}");
                assert!(count > 0 || want.is_empty(), "step {step}: an early end at {at}");
            }
            7 => {
                file.set_len(at as u64).unwrap();
                model.resize(at, 0);
            }
            8 if at + len <= model.len() => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, flags, at as u64, len as u64).unwrap();
                model[at..at + len].fill(0);
            }
            8 => file.sync_data().unwrap(),
            _ => {
                drop(file);
                assert_eq!(fs::metadata(p.at("file")).unwrap().len(), model.len() as u64);
                file = open(&p.at("file"));
            }
        }
    }
    drop(file);
    assert!(fs::read(p.at("file")).unwrap() == model);
    p.sync();
    assert!(fs::read(p.served.join("file")).unwrap() == model, "at the server");
}

pub fn two_handles(p: &Place) {
    let mut one = create(&p.at("file"));
    let two = open(&p.at("file"));
    let mut reader = File::open(p.at("file")).unwrap();
    one.write_all(b"from one").unwrap();
    two.write_all_at(b"two!", 5).unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from two!");
    drop(one);
    two.write_all_at(b"then", 0).unwrap();
    reader.seek(SeekFrom::Start(0)).unwrap();
    text.clear();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "then two!");
    assert_eq!(fs::metadata(p.at("file")).unwrap().len(), 9);
    // what one of two writers has closed is shipped; what the other does later as well
    p.sync();
    two.write_all_at(b"last", 0).unwrap();
    drop(two);
    p.sync();
    assert_eq!(fs::read(p.served.join("file")).unwrap(), b"last two!");
}

pub fn sync_calls(p: &Place) {
    let mut file = create(&p.at("file"));
    file.write_all(b"durable").unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    File::open(&p.dir).unwrap().sync_all().unwrap();
    rustix::fs::syncfs(&file).unwrap();
    // the file stays open: fsync alone makes it known
    p.sync();
    assert_eq!(fs::read(p.served.join("file")).unwrap(), b"durable");
    drop(file);
}

pub fn execute(p: &Place) {
    let script = p.at("script");
    fs::write(&script, "#!/bin/sh\necho script\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(crate::common::run(&[&script]), "script\n");
    let sleep = p.at("sleep");
    fs::copy("/bin/sleep", &sleep).unwrap();
    fs::set_permissions(&sleep, fs::Permissions::from_mode(0o755)).unwrap();
    let mut running = std::process::Command::new(&sleep).arg("30").spawn().unwrap();
    let busy = File::options().write(true).open(&sleep);
    assert_eq!(errno(busy), libc::ETXTBSY);
    running.kill().unwrap();
    running.wait().unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(!command(&[&script]).status().unwrap().success());
}
