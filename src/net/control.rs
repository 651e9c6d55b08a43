//! The control socket: how a running mount or server answers people's questions.
//!
//! A Unix socket for each mount and each server; a client writes one line of JSON and gets one back:
//!
//!   {"ask":"status"}   [`Status`]
//!   {"ask":"ship"}     {"seq":N}: ship all there is; N is the seq whose acknowledgement ends it
//!   {"ask":"acked"}    {"seq":N}: the server has acknowledged everything up to N
//!   {"ask":"umount"}   {"seq":0}: the process ends
//!   {"ask":"conflicts","do":...}   see conflicts.rs
//!   {"ask":"keep",..}  pins and eviction: see [`keep`]
//!   {"ask":"inspect","path":HEX}
//!                      {"pairs":[[NAME,VALUE],...]}: all about the object at a path of the volume
//!   {"ask":"volume","do":...}      a server's volumes: see [`volumes`]
//!   anything else      {"error":"..."}
//!
//! Invariants: it answers even if all else is stuck, for it has threads of its own and shares
//! nothing but [`Answer`]. No peer behaviour takes more than [`CONNECTIONS_MAX`] threads, each for
//! [`LINE_LEN_MAX`] bytes and [`SILENCE_MAX`] between them. Other users than ours and root are not
//! heard. The client's half never touches the mount, and is back within [`ANSWER_TIME_MAX`]; only
//! what is asked about conflicts and volumes may wait for the server.
//!
//! Absent on purpose: the event loop (it may be what hangs), and any change of state beyond the
//! requests above.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::conflicts;
use crate::sys::local;

pub mod keep;
pub mod volumes;

use volumes::{ClientStatus, Said, VolumeAsk};

/// Longest request, bytes.
pub const LINE_LEN_MAX: u64 = 64 << 10;
/// Longest answer that a client reads, bytes.
pub const ANSWER_LEN_MAX: u64 = 8 << 20;
/// Most connections at a time; more are closed at once.
pub const CONNECTIONS_MAX: usize = 16;
/// Longest silence of a peer on a connection.
pub const SILENCE_MAX: Duration = Duration::from_secs(2);
/// Longest wait of a client for an answer.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// Longest path of a Unix socket, bytes without the closing NUL.
const SUN_PATH_MAX: usize = 107;

/// How a mount or a server is doing. Sizes are bytes.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// the mount point, or the served directory
    #[serde(serialize_with = "lossy")]
    pub mount: PathBuf,
    /// `HOST:PORT`, or `local` for a directory that the same process serves
    pub server: String,
    pub volume: String,
    pub connected: bool,
    /// when `connected` last changed, RFC 3339 in UTC; and how long ago, whatever the time of day is
    pub since: String,
    pub since_seconds: u64,
    /// not connected, and known to be away: nobody waits for the server
    pub away: bool,
    /// records that the server has not acknowledged
    pub pending_records: u64,
    pub pending_bytes: u64,
    /// 0 when nothing is pending
    pub oldest_pending_seconds: u64,
    pub rate_bytes_per_second: u64,
    #[serde(serialize_with = "lossy")]
    pub cache: PathBuf,
    pub cache_clean_bytes: u64,
    pub cache_dirty_bytes: u64,
    /// what the cache may hold; 0: no limit
    pub cache_max_bytes: u64,
    /// data that gave way to others, or were evicted by hand, since the start
    pub evicted_bytes: u64,
    /// paths that are kept whole; what stands there, and what of it is missing
    pub pins: u64,
    pub pinned_objects: u64,
    pub pinned_bytes: u64,
    pub pinned_missing_files: u64,
    pub conflicts: u64,
    pub journal_bytes: u64,
    /// what needed not be shipped since the start: records, and bytes of contents
    pub saved_records: u64,
    pub saved_bytes: u64,
    /// requests that an operation waited for, since the start
    pub requests_foreground: u64,
    /// sent and received since the start, but for pings
    pub messages: u64,
    /// what may be done with the volume without asking: write, read or none
    pub permit: String,
    /// objects with which more or less may be done than with the volume
    pub permits_apart: u64,
    pub passthrough: bool,
    /// of a mount: how writes are counted against the server's room: ample, exact, or off
    pub space_regime: String,
    /// of a mount: room that the server has set aside for it, and what of it is in use
    pub space_granted_bytes: u64,
    pub space_granted_files: u64,
    pub space_used_bytes: u64,
    pub space_used_files: u64,
    /// of a mount: most that the kernel wrote past the daemon between two looks
    pub space_unseen_max_bytes: u64,
    /// of a server: room in the volume that nobody holds, and who holds some
    pub space_available_bytes: u64,
    pub space_available_files: u64,
    pub space_quota_bytes: Option<u64>,
    pub space_quota_files: Option<u64>,
    /// counted only where there is a quota
    pub space_volume_bytes: u64,
    pub space_volume_files: u64,
    pub space_grants: Vec<SpaceGrant>,
    pub pid: u32,
    pub version: String,
    pub last_error: Option<String>,
    /// of a mount: what people must hear of although all goes on
    pub warning: Option<String>,
    /// of a served volume: its clients, the first [`volumes::CLIENTS_MAX`] of them; null of a mount
    pub clients: Option<Vec<ClientStatus>>,
    /// and how many they are
    pub client_count: u64,
}

/// Room that a server has set aside for a client.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SpaceGrant {
    pub node: u32,
    /// empty while it is away
    pub host: String,
    pub away: bool,
    pub bytes: u64,
    pub files: u64,
}

/// Names are bytes, JSON is UTF-8: a path that is not must not silence the whole answer.
fn lossy<S: serde::Serializer>(path: &Path, out: S) -> Result<S::Ok, S::Error> {
    out.serialize_str(&path.to_string_lossy())
}

/// What a running mount or server says of itself. Called from threads of this module: it must
/// answer without waiting for the loop, the disk or the network.
pub trait Answer: Send + Sync {
    fn status(&self) -> Status;
    /// Ends the ageing of what is in the journal; the seq that must be acknowledged for all of it.
    fn ship_now(&self) -> u64;
    /// The last seq that the server has acknowledged.
    fn acked(&self) -> u64;
    /// Begins to end the process; does not wait for the end.
    fn shutdown(&self);
    /// Answers about conflicts; the only question that waits, for as long as conflicts.rs says.
    ///
    /// # Errors
    /// Why not, for people.
    fn conflicts(&self, _ask: conflicts::Ask) -> Result<serde_json::Value, String> {
        Err("it has no conflicts".to_owned())
    }
    /// Pins and eviction; what cannot be done is said in words for people.
    fn keep(&self, _wish: &keep::Wish) -> Result<serde_json::Value, String> {
        Err("only a mount has a cache".to_owned())
    }
    /// All that is known of the object at `path`, from the root of the volume: pairs of a name and
    /// a value. Reads the cache's own disk.
    ///
    /// # Errors
    /// Why there is nothing to be said, for people.
    fn inspect(&self, path: &[u8]) -> Result<serde_json::Value, String> {
        let _ = path;
        Err("it knows of no objects".to_owned())
    }
    /// Does something with a server's volumes. May wait for the loop and the disk, with a bound.
    ///
    /// # Errors
    /// Why nothing has changed.
    fn volumes(&self, _ask: VolumeAsk) -> Result<Said, Refusal> {
        Err(Refusal::new("this is a mount; volumes are a matter of the server's"))
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "lowercase")]
pub enum Request {
    Status,
    Ship,
    Acked,
    Umount,
    Conflicts(conflicts::Ask),
    Keep {
        wish: keep::Wish,
    },
    /// names are bytes: in hexadecimal
    Inspect {
        path: String,
    },
    Volume(VolumeAsk),
}

#[derive(Serialize, Deserialize)]
struct Inspected {
    pairs: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct Position {
    seq: u64,
}

/// Why something is not done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refusal {
    pub error: String,
    /// the exit code that says so, if one does
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<u8>,
}

impl Refusal {
    pub fn new(error: impl Into<String>) -> Refusal {
        Refusal { error: error.into(), exit: None }
    }
}

/// Where the sockets of this user are: `/run/imz`, `$XDG_RUNTIME_DIR/imz`, or `/tmp/imz-UID`.
fn socket_dir() -> PathBuf {
    let uid = local::euid();
    let base = match uid {
        0 => Some(PathBuf::from("/run")),
        _ => std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from),
    };
    match base {
        Some(base) if base.is_absolute() && base.is_dir() => base.join("imz"),
        _ => PathBuf::from(format!("/tmp/imz-{uid}")),
    }
}

/// The control socket of what is mounted at (or served from) the absolute path `mount`.
///
/// The name is the path with `-` for `/` and `%XX` for all but letters, digits, dot and
/// underscore; a path too long for a socket address is a hash.
pub fn socket_path(mount: &Path) -> PathBuf {
    path_in(&socket_dir(), mount)
}

fn path_in(dir: &Path, mount: &Path) -> PathBuf {
    let bytes = mount.as_os_str().as_bytes();
    let mut name = String::new();
    for &byte in bytes.strip_prefix(b"/").unwrap_or(bytes) {
        match byte {
            b'/' => name.push('-'),
            b'.' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => name.push(char::from(byte)),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    let path = dir.join(format!("{name}.sock"));
    if path.as_os_str().len() <= SUN_PATH_MAX {
        return path;
    }
    // FNV-1a, which is the same in every version of imz; no escaped name has a small h after %
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    dir.join(format!("%h{hash:016x}.sock"))
}

/// The control sockets of this user's mounts and served directories, dead ones included, in the
/// order of their names.
pub fn sockets() -> Vec<PathBuf> {
    all_sockets().into_iter().filter(|socket| !volumes::is_server(socket)).collect()
}

fn all_sockets() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(socket_dir()) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|it| it == "sock"))
        .collect();
    found.sort();
    found
}

/// The server's half while it runs; dropping it takes the socket away.
#[must_use = "dropping it takes the socket away"]
pub struct Control {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

/// Answers on the socket `path` until the result is dropped. A dead socket is replaced.
///
/// # Errors
/// `AddrInUse` when a process answers there already; `PermissionDenied` when the directory of the
/// sockets is not ours alone; those of the system calls.
pub fn serve(path: &Path, answer: Arc<dyn Answer>) -> io::Result<Control> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    make_private(dir)?;
    let lock = File::options().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    lock.lock()?; // two that start at once must not take each other's socket for a dead one
    match local::connect(path) {
        Ok(stream) => {
            let why =
                format!("process {} answers on {}", local::peer(&stream)?.pid, path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, why));
        }
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let acceptor = std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || accept(&listener, &answer, &stopped))?;
    Ok(Control { path: path.to_owned(), stop, acceptor: Some(acceptor) })
}

/// The directory exists, is ours, and closed to others.
fn make_private(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let found = std::fs::symlink_metadata(dir)?;
    if found.is_dir() && found.uid() == local::euid() && found.mode() & 0o077 == 0 {
        return Ok(());
    }
    let why = format!("{} must be a directory of this user's with mode 0700", dir.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // accept() wakes up for this connection; if it cannot be made, the thread is left behind
        let woken = local::connect(&self.path).is_ok();
        let _ = std::fs::remove_file(&self.path);
        if let (true, Some(acceptor)) = (woken, self.acceptor.take()) {
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &UnixListener, answer: &Arc<dyn Answer>, stop: &AtomicBool) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else {
            // out of descriptors, most likely: a pause, so that this is no busy loop
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        let known = local::peer(&stream).is_ok_and(|it| it.uid == 0 || it.uid == local::euid());
        if !known || open.load(Ordering::SeqCst) >= CONNECTIONS_MAX {
            continue;
        }
        open.fetch_add(1, Ordering::SeqCst);
        let (answer, place) = (Arc::clone(answer), Place(Arc::clone(&open)));
        let talk = move || {
            let _place = place;
            if let Err(e) = talk(&stream, &*answer) {
                log::debug!("control: {e}");
            }
        };
        if let Err(e) = std::thread::Builder::new().name("control".to_owned()).spawn(talk) {
            log::warn!("control: no thread for a connection: {e}");
        }
    }
}

/// One of the [`CONNECTIONS_MAX`] places, given back on drop, even of a thread that panics.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Answers the requests of one connection until its end, or until one is no request.
fn talk(stream: &UnixStream, answer: &dyn Answer) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    let mut input = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        input.by_ref().take(LINE_LEN_MAX).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let request = match serde_json::from_slice::<Request>(&line) {
            Ok(request) if line.ends_with(b"\n") => request,
            _ => return reply(stream, &Refusal::new("no such request")),
        };
        match request {
            Request::Status => reply(stream, &answer.status())?,
            Request::Ship => reply(stream, &Position { seq: answer.ship_now() })?,
            Request::Acked => reply(stream, &Position { seq: answer.acked() })?,
            Request::Conflicts(ask) => match answer.conflicts(ask) {
                Ok(told) => reply(stream, &told)?,
                Err(error) => reply(stream, &Refusal::new(error))?,
            },
            Request::Keep { wish } => match answer.keep(&wish) {
                Ok(value) => reply(stream, &value)?,
                Err(error) => reply(stream, &Refusal::new(error))?,
            },
            Request::Volume(ask) => match answer.volumes(ask) {
                Ok(said) => reply(stream, &said)?,
                Err(refusal) => reply(stream, &refusal)?,
            },
            Request::Inspect { path } => {
                let path = unhex(&path).ok_or_else(|| "not a path".to_owned());
                match path.and_then(|path| answer.inspect(&path)) {
                    Ok(pairs) => reply(stream, &Inspected { pairs })?,
                    Err(error) => reply(stream, &Refusal::new(error))?,
                }
            }
            Request::Umount => {
                // first the reply: there may be no process to send it afterwards
                let sent = reply(stream, &Position { seq: 0 });
                answer.shutdown();
                return sent;
            }
        }
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
    if text.len().is_multiple_of(2) { digits.map(byte).collect() } else { None }
}

fn reply(mut stream: &UnixStream, answer: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("no imz process of this user answers for it")]
    Absent,
    #[error("its process has died")]
    Dead,
    #[error("process {pid} does not answer: it hangs or is stopped")]
    Silent { pid: u32 },
    #[error("its process takes no more questions: it hangs or is stopped")]
    Full,
    #[error("its process says: {error}")]
    Refused { error: String, exit: Option<u8> },
    #[error("the answer of its process makes no sense; is it of another version?")]
    Garbled,
    #[error("{}: it cannot be asked", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Asks the process behind the socket `path`; back within [`ANSWER_TIME_MAX`].
///
/// # Errors
/// [`ControlError`].
pub fn ask(path: &Path, request: Request) -> Result<serde_json::Value, ControlError> {
    ask_within(path, request, ANSWER_TIME_MAX)
}

fn ask_within(
    path: &Path,
    request: Request,
    patience: Duration,
) -> Result<serde_json::Value, ControlError> {
    let failed = |source: io::Error| ControlError::Io { path: path.to_owned(), source };
    let stream = local::connect(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => ControlError::Absent,
        io::ErrorKind::ConnectionRefused => ControlError::Dead,
        io::ErrorKind::WouldBlock => ControlError::Full,
        _ => failed(e),
    })?;
    let pid = local::peer(&stream).map_err(failed)?.pid;
    let line = exchange(&stream, request, patience).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ControlError::Silent { pid },
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Dead,
        _ => failed(e),
    })?;
    if line.is_empty() {
        let error = "too many questions at a time, or not yours to ask".to_owned();
        return Err(ControlError::Refused { error, exit: None });
    }
    let value: serde_json::Value =
        serde_json::from_slice(&line).map_err(|_| ControlError::Garbled)?;
    match serde_json::from_value::<Refusal>(value.clone()) {
        Ok(Refusal { error, exit }) => Err(ControlError::Refused { error, exit }),
        Err(_) => Ok(value),
    }
}

fn exchange(mut stream: &UnixStream, request: Request, patience: Duration) -> io::Result<Vec<u8>> {
    let end = Instant::now() + patience;
    stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
    reply(stream, &request)?;
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    while !line.ends_with(b"\n") && (line.len() as u64) < ANSWER_LEN_MAX {
        let left = end.saturating_duration_since(Instant::now());
        // a timeout of zero would mean none
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => line.extend_from_slice(&chunk[..len]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(line)
}

fn ask_as<T: serde::de::DeserializeOwned>(path: &Path, ask_: Request) -> Result<T, ControlError> {
    serde_json::from_value(ask(path, ask_)?).map_err(|_| ControlError::Garbled)
}

/// How it is doing. # Errors: [`ControlError`].
pub fn status(path: &Path) -> Result<Status, ControlError> {
    ask_as(path, Request::Status)
}

/// Ships all there is; the seq whose acknowledgement ends it. # Errors: [`ControlError`].
pub fn ship(path: &Path) -> Result<u64, ControlError> {
    Ok(ask_as::<Position>(path, Request::Ship)?.seq)
}

/// The last acknowledged seq. # Errors: [`ControlError`].
pub fn acked(path: &Path) -> Result<u64, ControlError> {
    Ok(ask_as::<Position>(path, Request::Acked)?.seq)
}

/// Asks about conflicts, or decides about one. # Errors: [`ControlError`].
pub fn conflicts(path: &Path, ask: conflicts::Ask) -> Result<serde_json::Value, ControlError> {
    let patience = conflicts::ANSWER_TIME_MAX + ANSWER_TIME_MAX;
    ask_within(path, Request::Conflicts(ask), patience)
}

/// All that is known of the object at `path` in the mount, as pairs. # Errors: [`ControlError`].
pub fn inspect(socket: &Path, path: &[u8]) -> Result<serde_json::Value, ControlError> {
    let path = path.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(ask_as::<Inspected>(socket, Request::Inspect { path })?.pairs)
}

/// Asks the process to end; it has heard it on return, not done it. # Errors: [`ControlError`].
pub fn shutdown(path: &Path) -> Result<(), ControlError> {
    ask(path, Request::Umount).map(drop)
}

#[cfg(test)]
mod tests;
