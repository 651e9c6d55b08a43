//! What bad input gets: a message that names the thing, the documented exit code, nothing lost and
//! nothing half made. Also what a full disk and a bad peer get.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::{Duration, Instant};

use common::compare::assert_same;
use common::{Disk, Mount, NOBODY, Server, as_nobody, imz_fails, is_mounted, wait_for};

const UNREACHABLE: i32 = 3;
const REFUSED: i32 = 4;
const NOT_FOUND: i32 = 5;
const NO_ROOM: i32 = 7;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `imz mount -f` must fail with the code, name `part`, and leave nothing mounted.
#[track_caller]
fn mount_fails(source: &str, point: &Path, cache: &Path, code: i32, part: &str) {
    let before = is_mounted(point);
    imz_fails(&["mount", "-f", source, text(point), "--cache", text(cache)], code, part);
    assert_eq!(is_mounted(point), before);
}

#[test]
fn what_cannot_be_mounted() {
    let Some(disk) = Disk::new(256) else { return };
    let server = Server::start(&disk);
    let source = server.source();
    let point = disk.dir("point");

    let unknown = format!("127.0.0.1:{}:/nothing", server.port());
    mount_fails(&unknown, &point, &disk.dir("cache-1"), NOT_FOUND, "nothing");
    let missing = disk.path().join("missing");
    mount_fails(&source, &missing, &disk.dir("cache-2"), NOT_FOUND, text(&missing));
    let file = disk.path().join("file");
    File::create(&file).unwrap();
    mount_fails(&source, &file, &disk.dir("cache-2"), NOT_FOUND, text(&file));
    mount_fails(text(&missing), &point, &disk.dir("cache-3"), NOT_FOUND, text(&missing));

    // in the background as well
    let cache = disk.dir("cache-4");
    let words = ["mount", &unknown, text(&point), "--cache", text(&cache)];
    imz_fails(&words, NOT_FOUND, "nothing");
    assert!(!is_mounted(&point));

    // none of this hurt the server or the caches
    let a = Mount::start(&server, &disk, "cache-1");
    fs::write(a.at("good"), "good").unwrap();
    a.sync();
    assert_same(a.path(), server.dir());
}

#[test]
fn the_server_is_away_at_the_first_mount() {
    let Some(disk) = Disk::new(256) else { return };
    let mut server = Server::start(&disk);
    let source = server.source();
    let point = disk.dir("point");
    server.stop();
    let began = Instant::now();
    mount_fails(&source, &point, &disk.dir("cache-1"), UNREACHABLE, "127.0.0.1");
    assert!(began.elapsed() < Duration::from_secs(11), "{:?}", began.elapsed());

    // somebody listens, and says nothing
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = format!("127.0.0.1:{}:/vol", silent.local_addr().unwrap().port());
    let began = Instant::now();
    mount_fails(&source, &point, &disk.dir("cache-2"), UNREACHABLE, "127.0.0.1");
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());

    // somebody talks about something else
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    let talk = std::thread::spawn(move || {
        while let Ok((mut stream, _)) = other.accept() {
            let mut byte = [0];
            let _ = stream.read(&mut byte);
            if byte == *b"!" {
                return; // the test is over
            }
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n");
        }
    });
    let source = format!("127.0.0.1:{port}:/vol");
    let cache = disk.dir("cache-3");
    let words = ["mount", "-f", &source, text(&point), "--cache", text(&cache)];
    let began = Instant::now();
    let (code, said) = common::imz_run(&words);
    assert!(code != 0 && said.contains("127.0.0.1"), "{code}: {said}");
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    TcpStream::connect(("127.0.0.1", port)).unwrap().write_all(b"!").unwrap();
    talk.join().unwrap();

    // the cache of a failed first mount is as good as new
    server.restart();
    let a = Mount::start(&server, &disk, "cache-1");
    fs::write(a.at("good"), "good").unwrap();
    a.sync();
}

#[test]
fn caches_and_mount_points_that_are_taken() {
    let Some(disk) = Disk::new(256) else { return };
    let server = Server::start(&disk);
    let source = server.source();
    let point = disk.dir("point");
    let mut a = Mount::start(&server, &disk, "cache-a");
    fs::write(a.at("file"), "mine").unwrap();

    mount_fails(&source, a.path(), &disk.dir("cache-b"), REFUSED, text(a.path()));
    mount_fails(&source, &point, a.cache(), REFUSED, text(a.cache()));
    assert_eq!(fs::read(a.at("file")).unwrap(), b"mine");

    // another volume's cache
    let other = Server::serve(&disk.dir("other"), &disk.dir("other-state"));
    a.umount();
    mount_fails(&other.source(), &point, a.cache(), REFUSED, text(a.cache()));
    a.again();
    assert_eq!(fs::read(a.at("file")).unwrap(), b"mine");
    a.sync();
    assert_same(a.path(), server.dir());

    // a directory of somebody's own files is not a cache
    let precious = disk.dir("precious");
    fs::write(precious.join("letter"), "dear").unwrap();
    let words = ["mount", "-f", &source, text(&point), "--cache", text(&precious)];
    let (code, said) = common::imz_run(&words);
    assert!(code != 0, "it took a directory with files for its cache: {said}");
    assert_eq!(fs::read_dir(&precious).unwrap().count(), 1, "it left something behind");
}

#[test]
fn a_cache_that_is_not_writable() {
    let Some(disk) = Disk::new(256) else { return };
    let server = Server::start(&disk);
    let imz = common::imz_for_all(&disk);
    let point = disk.dir("point");
    chown(&point, Some(NOBODY), Some(NOBODY)).unwrap();
    let cache = disk.dir("cache"); // root's, 0755
    let words =
        [text(&imz), "mount", "-f", &server.source(), text(&point), "--cache", text(&cache)];
    let out = as_nobody(&words).output().unwrap();
    let said = common::told(&out);
    assert!(!out.status.success(), "{said}");
    assert!(said.contains(text(&cache)), "{said}");
    assert!(!is_mounted(&point));
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_served() {
    let Some(disk) = Disk::new(256) else { return };
    let server = Server::start(&disk);
    let serve = |dir: &Path, listen: &str, code: i32, part: &str| {
        imz_fails(&["serve", text(dir), "--listen", listen], code, part);
    };
    let missing = disk.path().join("missing");
    serve(&missing, "127.0.0.1:0", NOT_FOUND, text(&missing));
    let file = disk.path().join("file");
    File::create(&file).unwrap();
    serve(&file, "127.0.0.1:0", NOT_FOUND, text(&file));
    let taken = format!("127.0.0.1:{}", server.port());
    serve(&disk.dir("second"), &taken, REFUSED, &taken);

    // the same directory: with the same state, and with none given
    let export = format!("x={}", text(server.dir()));
    let state = disk.dir("state");
    let words = ["serve", &export, "--listen", "127.0.0.1:0", "--state", text(&state)];
    imz_fails(&words, REFUSED, text(server.dir()));
    serve(server.dir(), "127.0.0.1:0", REFUSED, text(server.dir()));

    let a = Mount::start(&server, &disk, "cache-a");
    fs::write(a.at("file"), "it still serves").unwrap();
    a.sync();
}

/// ramfs carries no extended attributes.
#[test]
fn a_file_system_without_extended_attributes() {
    let Some(disk) = Disk::new(256) else { return };
    let plain = common::mount_point();
    let mounted =
        common::command(&["mount", "-t", "ramfs", "none", text(&plain)]).output().unwrap();
    if !mounted.status.success() {
        fs::remove_dir(&plain).unwrap();
        let why = format!("no file system without xattrs: {}", common::told(&mounted));
        return common::unable(&why).unwrap_or(());
    }
    let tried = std::panic::catch_unwind(|| {
        imz_fails(&["serve", text(&plain), "--listen", "127.0.0.1:0"], NO_ROOM, text(&plain));
        assert_eq!(fs::read_dir(&plain).unwrap().count(), 0, "it left something behind");
        let server = Server::start(&disk);
        let cache = plain.join("cache");
        fs::create_dir(&cache).unwrap();
        let point = disk.dir("point");
        mount_fails(&server.source(), &point, &cache, NO_ROOM, text(&cache));
    });
    common::run(&["umount", "-l", text(&plain)]);
    fs::remove_dir(&plain).unwrap();
    tried.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

// ---- full disks ------------------------------------------------------------------------------

/// Fails with ENOSPC at the latest after `len_max` bytes.
fn write_until_full(path: &Path, len_max: u64) -> u64 {
    let chunk = vec![b'x'; 1 << 20];
    let mut file = File::create(path).unwrap();
    let mut written = 0;
    while written < len_max {
        match file.write(&chunk) {
            Ok(n) => written += n as u64,
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::StorageFull, "{e}");
                return written;
            }
        }
    }
    panic!("{len_max} bytes on a full disk");
}

#[test]
fn the_disk_of_the_cache_fills_up() {
    let Some(disk) = Disk::new(512) else { return };
    let Some(small) = Disk::new(96) else { return };
    let server = Server::start(&disk);
    let mut a = Mount::with(server.source(), &small.dir("cache"), "");
    fs::write(a.at("before"), "before").unwrap();
    a.sync();
    let filler = small.fill(8 << 20);
    write_until_full(&a.at("too large"), 64 << 20);
    // small things, until nothing goes
    let refused =
        (0..20_000).find_map(|i| fs::write(a.at(format!("small{i}")), vec![1; 2000]).err());
    assert_eq!(refused.map(|e| e.kind()), Some(ErrorKind::StorageFull));
    assert_eq!(fs::read(a.at("before")).unwrap(), b"before");
    assert!(a.status()["connected"].as_bool().unwrap());

    fs::remove_file(filler).unwrap();
    fs::write(a.at("after"), "after").unwrap();
    a.sync();
    assert_same(a.path(), server.dir());
    a.umount();
    a.again();
    assert_same(a.path(), server.dir());
    a.no_conflicts();
}

#[test]
fn the_disk_of_the_server_fills_up() {
    let Some(disk) = Disk::new(512) else { return };
    let Some(small) = Disk::new(128) else { return };
    let server = Server::start(&small);
    let a = Mount::with(server.source(), &disk.dir("cache"), "age=0");
    fs::write(a.at("before"), "before").unwrap();
    a.sync();
    let filler = small.fill(6 << 20);
    // refused at once, or kept here until there is room: but never said to be there and lost
    for i in 0..12 {
        let bytes = vec![i; 1 << 20];
        match fs::write(a.at(format!("file{i}")), &bytes) {
            Ok(()) => {}
            Err(e) => assert_eq!(e.kind(), ErrorKind::StorageFull, "{e}"),
        }
    }
    wait_for("the mount says what is wrong", 30, || !a.status()["last_error"].is_null());
    assert!(a.pending() > 0);
    assert_eq!(fs::read(a.at("before")).unwrap(), b"before");
    // it is not in the way of others
    let b = Mount::start(&server, &disk, "cache-b");
    assert_eq!(fs::read(b.at("before")).unwrap(), b"before");

    fs::remove_file(filler).unwrap();
    a.sync();
    assert_same(a.path(), server.dir());
    assert_same(a.path(), b.path());
    a.no_conflicts();
}

// ---- bad peers -------------------------------------------------------------------------------

/// Whether the peer closes within this time, whatever it says before.
fn is_closed_within(mut stream: TcpStream, seconds: u64) -> bool {
    let began = Instant::now();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut bytes = [0; 4096];
    while began.elapsed() < Duration::from_secs(seconds) {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return true,
        }
    }
    false
}

#[test]
fn peers_that_send_garbage_or_nothing() {
    let Some(disk) = Disk::new(256) else { return };
    let server = Server::start(&disk);
    let a = Mount::start(&server, &disk, "cache-a");
    let connect = || TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    let silent = connect();
    let mut half = connect();
    half.write_all(&[1]).unwrap();

    let mut rng = common::tree::Rng(9);
    let mut garbage: Vec<Vec<u8>> = vec![
        vec![0xff; 64],
        vec![0; 64],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        [&[0xff, 0xff, 0xff, 0x7f][..], &[1; 60]].concat(),
        rng.bytes(1 << 20, false),
    ];
    garbage.extend((0..40).map(|i| rng.bytes(1 + i * 7, false)));
    for bytes in &garbage {
        let mut stream = connect();
        // it may be closed before all is sent
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert!(is_closed_within(stream, 10), "{:?}", bytes.get(..20));
    }
    // a good beginning, and then garbage: what a client says first, as the mount says it
    fs::write(a.at("file"), "served meanwhile").unwrap();
    a.sync();
    assert_eq!(fs::read(server.dir().join("file")).unwrap(), b"served meanwhile");

    // many that say nothing do not keep others out, and do not stay for ever
    let many: Vec<TcpStream> = (0..100).map(|_| connect()).collect();
    fs::write(a.at("file"), "served again").unwrap();
    a.sync();
    let b = Mount::start(&server, &disk, "cache-b");
    assert_eq!(fs::read(b.at("file")).unwrap(), b"served again");
    assert!(is_closed_within(silent, 40), "a silent peer is kept");
    assert!(is_closed_within(half, 20), "half a frame is kept");
    for stream in many {
        assert!(is_closed_within(stream, 20), "a silent peer is kept");
    }
    a.no_conflicts();
}
