use std::sync::Mutex;

use super::*;

#[derive(Default)]
struct Daemon {
    acked: Mutex<u64>,
    ended: AtomicBool,
}

impl Answer for Daemon {
    fn status(&self) -> Status {
        Status { mount: not_utf8().into(), pending_records: 3, ..Status::default() }
    }
    fn ship_now(&self) -> u64 {
        7
    }
    fn acked(&self) -> u64 {
        *self.acked.lock().unwrap()
    }
    fn shutdown(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }
}

fn not_utf8() -> std::ffi::OsString {
    std::os::unix::ffi::OsStringExt::from_vec(b"/mnt/\xff".to_vec())
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = path_in(&dir.path().join("imz"), Path::new("/mnt/x"));
    (dir, path)
}

#[test]
fn every_request_has_its_answer_and_the_end_takes_the_socket_away() {
    let (_dir, path) = scratch();
    let daemon = Arc::new(Daemon::default());
    assert!(matches!(status(&path), Err(ControlError::Absent)));
    let control = serve(&path, daemon.clone()).unwrap();
    assert_eq!(status(&path).unwrap().pending_records, 3);
    assert_eq!(status(&path).unwrap().mount, Path::new("/mnt/\u{fffd}"));
    assert_eq!(ship(&path).unwrap(), 7);
    assert_eq!(acked(&path).unwrap(), 0);
    *daemon.acked.lock().unwrap() = 7;
    assert_eq!(acked(&path).unwrap(), 7);
    assert!(!daemon.ended.load(Ordering::SeqCst));
    shutdown(&path).unwrap();
    for _ in 0..200 {
        if daemon.ended.load(Ordering::SeqCst) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(daemon.ended.load(Ordering::SeqCst));
    drop(control);
    assert!(!path.exists());
}

#[test]
fn a_live_socket_is_refused_and_a_dead_one_replaced() {
    let (_dir, path) = scratch();
    let live = serve(&path, Arc::new(Daemon::default())).unwrap();
    let second = serve(&path, Arc::new(Daemon::default())).err().unwrap();
    assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(acked(&path).unwrap(), 0, "the first one still answers");
    drop(live);

    drop(UnixListener::bind(&path).unwrap()); // as kill -9 leaves it
    assert!(matches!(status(&path), Err(ControlError::Dead)));
    let _control = serve(&path, Arc::new(Daemon::default())).unwrap();
    assert_eq!(acked(&path).unwrap(), 0);
}

#[test]
fn garbage_and_endless_lines_get_an_error_and_nothing_breaks() {
    let (_dir, path) = scratch();
    let _control = serve(&path, Arc::new(Daemon::default())).unwrap();
    let giant = vec![b'x'; LINE_LEN_MAX as usize];
    for junk in [&b"\xff\xfe\n"[..], b"{\"ask\":\"format\"}\n", b"{}\n", b"\n", &giant] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(junk).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert_eq!(answer, "{\"error\":\"no such request\"}\n", "{}", junk.escape_ascii());
    }
    assert_eq!(acked(&path).unwrap(), 0);
}

#[test]
fn silent_connections_are_bounded_and_end() {
    let (_dir, path) = scratch();
    let _control = serve(&path, Arc::new(Daemon::default())).unwrap();
    let idle: Vec<UnixStream> =
        (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let full = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        acked(&path).is_err()
    });
    assert!(full, "one more than {CONNECTIONS_MAX} was let in");
    std::thread::sleep(SILENCE_MAX + Duration::from_millis(500));
    assert_eq!(acked(&path).unwrap(), 0, "the silent ones have lost their places");
    drop(idle);
}

#[test]
fn a_process_that_hangs_is_named_in_time() {
    let (_dir, path) = scratch();
    make_private(path.parent().unwrap()).unwrap();
    let _listener = UnixListener::bind(&path).unwrap(); // never accepts
    let began = Instant::now();
    let error = status(&path).unwrap_err();
    assert!(
        matches!(error, ControlError::Silent { pid } if pid == std::process::id()),
        "{error:?}"
    );
    assert!(began.elapsed() < ANSWER_TIME_MAX + Duration::from_secs(1));
    // a full queue: what a watch loop leaves behind a stopped process
    let mut waiting = Vec::new();
    while let Ok(stream) = local::connect(&path) {
        waiting.push(stream);
        assert!(waiting.len() < 100_000);
    }
    assert!(matches!(status(&path), Err(ControlError::Full)));
}

#[test]
fn a_directory_open_to_others_is_not_used() {
    let (dir, path) = scratch();
    make_private(path.parent().unwrap()).unwrap();
    std::fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o770)).unwrap();
    let error = serve(&path, Arc::new(Daemon::default())).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    std::os::unix::fs::symlink("/tmp", dir.path().join("link")).unwrap();
    assert!(serve(&dir.path().join("link/x.sock"), Arc::new(Daemon::default())).is_err());
}

#[test]
fn names_of_sockets_differ_and_fit() {
    let dir = Path::new("/run/imz");
    let name = |mount: &str| path_in(dir, Path::new(mount));
    assert_eq!(name("/mnt/x"), dir.join("mnt-x.sock"));
    assert_eq!(name("/"), dir.join(".sock"));
    assert_eq!(name("/mnt-x"), dir.join("mnt%2Dx.sock"));
    assert_eq!(name("/a b/\u{e9}"), dir.join("a%20b-%C3%A9.sock"));
    let (long, longer) = ("/x".repeat(100), "/x".repeat(101));
    assert!(name(&long).as_os_str().len() <= SUN_PATH_MAX);
    assert_ne!(name(&long), name(&longer));
}
