//! Values of the command line that have a grammar of their own: SOURCE, `-o`, durations, places
//! in a journal. Pure: text in, value or message out.
//!
//! Invariant: every duration is at most a year, so that adding it to an instant cannot overflow.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The port of a server that names none.
pub const PORT: u16 = 7070;
/// Where a server listens that is not told.
pub const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT);
/// Longest name of a volume, bytes.
pub const VOLUME_LEN_MAX: usize = 255;
/// Longest duration that an option takes.
pub const DURATION_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why a value was not taken, in words for the user.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(pub String);

fn bad<T>(why: impl Into<String>) -> Result<T, BadValue> {
    Err(BadValue(why.into()))
}

/// What to mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// `HOST[:PORT]:/VOLUME`. `host` has no brackets; `volume` has no slash and is empty for the
    /// server's only volume.
    Server { host: String, port: u16, volume: String },
    /// A directory, served by the same process to this mount alone.
    Local(PathBuf),
}

const SOURCE_FORM: &str = "a volume is written HOST[:PORT]:/VOLUME (IPv6 addresses in brackets), \
                           a directory with a colon in its name ./NAME";

impl Source {
    /// # Errors
    /// Text that has a colon before any slash, and is no `HOST[:PORT]:/VOLUME`.
    pub fn parse(text: &OsStr) -> Result<Source, BadValue> {
        let bytes = text.as_bytes();
        if bytes.is_empty() {
            return bad("it is empty");
        }
        let head = bytes.split(|&b| b == b'/').next().unwrap_or_default();
        if !head.contains(&b':') {
            return Ok(Source::Local(PathBuf::from(text)));
        }
        let Some(text) = text.to_str() else {
            return bad(format!("hosts and volumes are UTF-8; {SOURCE_FORM}"));
        };
        let Some((server, volume)) = text.split_once(":/") else {
            return bad(format!("no volume is named; {SOURCE_FORM}"));
        };
        let (host, port) = host_port(server)?;
        if !volume.is_empty() {
            check_volume(volume)?;
        }
        Ok(Source::Server { host, port, volume: volume.to_owned() })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Server { host, port, volume } if host.contains(':') => {
                write!(f, "[{host}]:{port}:/{volume}")
            }
            Source::Server { host, port, volume } => write!(f, "{host}:{port}:/{volume}"),
            Source::Local(dir) => write!(f, "{}", dir.display()),
        }
    }
}

fn host_port(text: &str) -> Result<(String, u16), BadValue> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let Some((host, port)) = rest.split_once(']') else {
            return bad(format!("a bracket is not closed; {SOURCE_FORM}"));
        };
        if host.parse::<Ipv6Addr>().is_err() {
            return bad(format!("[{host}] is not an IPv6 address"));
        }
        match (port, port.strip_prefix(':')) {
            ("", _) => (host, None),
            (_, Some(port)) => (host, Some(port)),
            (_, None) => return bad(format!("after the bracket comes a colon; {SOURCE_FORM}")),
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    if port.is_some_and(|port| port.contains(':')) {
        return bad(format!("too many colons; {SOURCE_FORM}"));
    }
    if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return bad(format!("no host is named; {SOURCE_FORM}"));
    }
    match port.map(str::parse::<u16>) {
        None => Ok((host.to_owned(), PORT)),
        Some(Ok(port)) if port > 0 => Ok((host.to_owned(), port)),
        Some(_) => bad(format!("a port is a number from 1 to 65535; {SOURCE_FORM}")),
    }
}

fn check_volume(name: &str) -> Result<(), BadValue> {
    if name.is_empty() || name.len() > VOLUME_LEN_MAX {
        return bad(format!("a volume's name has 1 to {VOLUME_LEN_MAX} bytes"));
    }
    if name.contains('/') {
        return bad(format!(
            "a volume's name has no slash ({name}); only whole volumes are mounted"
        ));
    }
    if name == "." || name == ".." || name == ".imz" || name.chars().any(char::is_control) {
        return bad(format!("{name:?} cannot be the name of a volume"));
    }
    Ok(())
}

/// A volume's new name.
///
/// # Errors
/// No volume can have it.
pub fn volume_name(text: &str) -> Result<String, BadValue> {
    check_volume(text).map(|()| text.to_owned())
}

/// A limit, or `none`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bound(pub Option<u64>);

impl Bound {
    /// # Errors
    /// Neither a size nor `none`.
    pub fn size(text: &str) -> Result<Bound, BadValue> {
        match text {
            "none" => Ok(Bound(None)),
            _ => size(text).map(|bytes| Bound(Some(bytes))),
        }
    }
    /// # Errors
    /// Neither a number nor `none`.
    pub fn count(text: &str) -> Result<Bound, BadValue> {
        match (text, text.parse()) {
            ("none", _) => Ok(Bound(None)),
            (_, Ok(count)) if count <= i64::MAX as u64 => Ok(Bound(Some(count))),
            _ => bad("write a number, or none"),
        }
    }
}

/// A user's limit, `UID=SIZE` or `UID=none`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UserBound {
    pub uid: u32,
    pub bound: Bound,
}

impl UserBound {
    /// # Errors
    /// Any other text.
    pub fn parse(text: &str) -> Result<UserBound, BadValue> {
        match text.split_once('=').map(|(uid, size)| (uid.parse(), size)) {
            Some((Ok(uid), size)) => Ok(UserBound { uid, bound: Bound::size(size)? }),
            _ => bad("write UID=SIZE with the user's number, as in 1000=20G, or UID=none"),
        }
    }
}

/// A directory to serve, `[NAME=]DIR`; without a name the directory's last component is the name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    pub name: Option<String>,
    pub dir: PathBuf,
}

impl Export {
    /// # Errors
    /// A name that no volume can have, or no directory.
    pub fn parse(text: &OsStr) -> Result<Export, BadValue> {
        let bytes = text.as_bytes();
        let equals = bytes.iter().position(|&b| b == b'=' || b == b'/');
        let (name, dir) = match equals {
            Some(at) if bytes[at] == b'=' => (Some(&bytes[..at]), &bytes[at + 1..]),
            _ => (None, bytes),
        };
        if dir.is_empty() {
            return bad("no directory is named; write DIR or NAME=DIR");
        }
        let name = match name.map(std::str::from_utf8) {
            None => None,
            Some(Err(_)) => return bad("a volume's name is UTF-8"),
            Some(Ok(name)) => {
                check_volume(name)?;
                Some(name.to_owned())
            }
        };
        Ok(Export { name, dir: PathBuf::from(OsStr::from_bytes(dir)) })
    }

    /// The volume's name, given or from the last component of `dir_real`, the directory's absolute
    /// path without `.` and `..`.
    ///
    /// # Errors
    /// The last component cannot be the name of a volume.
    pub fn volume(&self, dir_real: &Path) -> Result<String, BadValue> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let Some(name) = dir_real.file_name().and_then(OsStr::to_str) else {
            return bad(format!("{} needs a name; write NAME=DIR", dir_real.display()));
        };
        check_volume(name)?;
        Ok(name.to_owned())
    }
}

/// The address of `--listen`: loopback only.
///
/// # Errors
/// Not `ADDRESS:PORT`, or an address that others can reach.
pub fn listen(text: &str) -> Result<SocketAddr, BadValue> {
    let addr = match text.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>())) {
        Some(("localhost", Ok(port))) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
        _ => text.parse().map_err(|_| {
            BadValue("write ADDRESS:PORT, as in 127.0.0.1:7070 or [::1]:7070".to_owned())
        })?,
    };
    if !addr.ip().to_canonical().is_loopback() {
        return bad(format!(
            "this version has no keys yet, so it listens on loopback addresses only: whoever \
             reached the port could read and write everything. Serve on 127.0.0.1:{port} and reach \
             it from the other machine with: ssh -N -L {port}:127.0.0.1:{port} THIS_HOST",
            port = addr.port()
        ));
    }
    Ok(addr)
}

/// A duration: `500ms`, `2s`, `1min 30s`; a plain number is seconds. At most a year.
///
/// # Errors
/// Any other text.
pub fn duration(text: &str) -> Result<Duration, BadValue> {
    let parsed = match text.parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text).ok(),
    };
    match parsed {
        None => bad("a duration is written 500ms, 2s, 1min, 1h; a plain number is seconds"),
        Some(it) if it > DURATION_MAX => bad("that is longer than a year"),
        Some(it) => Ok(it),
    }
}

/// A size in bytes: a number, or one with K, M, G or T behind it for powers of 1024. Not zero.
///
/// # Errors
/// Any other text.
pub fn size(text: &str) -> Result<u64, BadValue> {
    let (digits, unit) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
        Some((at, 'T' | 't')) => (&text[..at], 1 << 40),
        _ => (text, 1u64),
    };
    let number = Some(digits).filter(|d| d.bytes().all(|b| b.is_ascii_digit()));
    match number.and_then(|d| d.parse::<u64>().ok()).and_then(|n| n.checked_mul(unit)) {
        Some(0) => bad("a size is larger than 0"),
        Some(bytes) => Ok(bytes),
        None => bad("a size is written 500M, 20G, 1T; a plain number is bytes"),
    }
}

/// A place in a journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    Seq(u64),
    Time(SystemTime),
}

impl Point {
    /// # Errors
    /// Neither a number nor a time.
    pub fn parse(text: &str) -> Result<Point, BadValue> {
        if let Ok(seq) = text.parse() {
            return Ok(Point::Seq(seq));
        }
        // a date alone is its first instant
        let whole = if text.len() == 10 { format!("{text}T00:00:00Z") } else { text.to_owned() };
        match humantime::parse_rfc3339_weak(&whole) {
            Ok(time) => Ok(Point::Time(time)),
            Err(_) => bad("write a seq (a number) or a time in UTC like 2026-11-21T10:00:00Z"),
        }
    }
}

/// Whether data may go past the daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Passthrough {
    /// where the kernel allows it
    #[default]
    Auto,
    Off,
}

/// What a client sees of what others do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coherence {
    /// what was complete before a file is opened
    CloseToOpen,
    /// every write that has returned
    Strict,
    /// as close-to-open; and the client's rights rest with it while it asks for nothing
    Session,
}

/// What becomes of what is not in the cache while the server is away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Offline {
    /// EHOSTUNREACH
    #[default]
    Error,
    /// it waits until the server is back, or somebody interrupts it
    Wait,
}

/// Whether requests of the kernel come over io_uring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Uring {
    /// where the kernel allows it
    #[default]
    Auto,
    On,
    Off,
}

/// Whether room is reserved at the server before anything is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reserve {
    #[default]
    On,
    /// and each write is counted before it is done, however much there is
    Exact,
    Off,
}

/// What may be written while the server is away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OfflineSpace {
    /// what was granted
    #[default]
    Granted,
    /// as much as the cache holds, in the hope that there will be room
    Optimistic,
}

/// One element of `-o`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MountOption {
    ReadOnly(bool),
    Sync(bool),
    Suid(bool),
    Dev(bool),
    Exec(bool),
    Atime(bool),
    AllowOther,
    Age(Duration),
    Timeout(Duration),
    Passthrough(Passthrough),
    Coherence(Coherence),
    Uring(Uring),
    Offline(Offline),
    Reserve(Reserve),
    OfflineSpace(OfflineSpace),
    Cache(PathBuf),
    CacheMax(u64),
    /// known, and no business of ours
    Ignored,
}

/// What an error message lists.
const KNOWN: &str = "ro, rw, sync, async, allow_other, cache=DIR, cache-max=SIZE, age=DURATION, \
                     timeout=DURATION, offline=error|wait, \
                     passthrough=auto|off, coherence=close-to-open|strict|session, \
                     uring=auto|on|off, reserve=on|exact|off, offline-space=granted|optimistic, suid, nosuid, dev, nodev, exec, noexec, atime, noatime";

/// What mount(8) and fstab(5) pass and handle by themselves, or what changes nothing here.
const IGNORED: [&str; 27] = [
    "",
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "comment",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "diratime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "nomand",
    "silent",
    "loud",
    "default_permissions",
];

impl MountOption {
    /// # Errors
    /// An option that nobody knows, a value that is missing, malformed, or not asked for.
    pub fn parse(text: &OsStr) -> Result<MountOption, BadValue> {
        let bytes = text.as_bytes();
        let (name, value) = match bytes.iter().position(|&b| b == b'=') {
            Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
            None => (bytes, None),
        };
        let name = String::from_utf8_lossy(name);
        let ignored = IGNORED.contains(&&*name) || name.starts_with("x-") || name.starts_with("X-");
        if ignored {
            return Ok(MountOption::Ignored);
        }
        match (&*name, value) {
            (
                "age" | "timeout" | "passthrough" | "coherence" | "uring" | "cache" | "cache-max"
                | "offline" | "reserve" | "offline-space",
                None,
            ) => bad(format!("it needs a value: {name}=...")),
            ("cache", Some([])) => bad("it needs a value: cache=DIR"),
            ("cache", Some(dir)) => {
                Ok(MountOption::Cache(PathBuf::from(OsString::from_vec(dir.to_vec()))))
            }
            (_, Some(value)) => MountOption::valued(&name, &String::from_utf8_lossy(value)),
            (_, None) => MountOption::flag(&name),
        }
    }

    fn valued(name: &str, value: &str) -> Result<MountOption, BadValue> {
        match (name, value) {
            ("age", _) => duration(value).map(MountOption::Age),
            ("timeout", _) => match duration(value)? {
                Duration::ZERO => bad("a timeout is longer than 0"),
                it => Ok(MountOption::Timeout(it)),
            },
            ("cache-max", _) => size(value).map(MountOption::CacheMax),
            ("offline", "error") => Ok(MountOption::Offline(Offline::Error)),
            ("offline", "wait") => Ok(MountOption::Offline(Offline::Wait)),
            ("offline", _) => bad("offline is error or wait"),
            ("passthrough", "auto") => Ok(MountOption::Passthrough(Passthrough::Auto)),
            ("passthrough", "off") => Ok(MountOption::Passthrough(Passthrough::Off)),
            ("passthrough", _) => bad("passthrough is auto or off"),
            ("coherence", "close-to-open") => Ok(MountOption::Coherence(Coherence::CloseToOpen)),
            ("coherence", "strict") => Ok(MountOption::Coherence(Coherence::Strict)),
            ("coherence", "session") => Ok(MountOption::Coherence(Coherence::Session)),
            ("coherence", _) => bad("coherence is close-to-open, strict or session"),
            ("uring", "auto") => Ok(MountOption::Uring(Uring::Auto)),
            ("uring", "on") => Ok(MountOption::Uring(Uring::On)),
            ("uring", "off") => Ok(MountOption::Uring(Uring::Off)),
            ("uring", _) => bad("uring is auto, on or off"),
            ("reserve", "on") => Ok(MountOption::Reserve(Reserve::On)),
            ("reserve", "exact") => Ok(MountOption::Reserve(Reserve::Exact)),
            ("reserve", "off") => Ok(MountOption::Reserve(Reserve::Off)),
            ("reserve", _) => bad("reserve is on, exact or off"),
            ("offline-space", "granted") => Ok(MountOption::OfflineSpace(OfflineSpace::Granted)),
            ("offline-space", "optimistic") => {
                Ok(MountOption::OfflineSpace(OfflineSpace::Optimistic))
            }
            ("offline-space", _) => bad("offline-space is granted or optimistic"),
            _ if MountOption::flag(name).is_ok() => bad(format!("{name} takes no value")),
            _ => bad(format!("unknown option {name}; known are {KNOWN}")),
        }
    }

    fn flag(name: &str) -> Result<MountOption, BadValue> {
        Ok(match name {
            "ro" => MountOption::ReadOnly(true),
            "rw" => MountOption::ReadOnly(false),
            "sync" => MountOption::Sync(true),
            "async" => MountOption::Sync(false),
            "suid" => MountOption::Suid(true),
            "nosuid" => MountOption::Suid(false),
            "dev" => MountOption::Dev(true),
            "nodev" => MountOption::Dev(false),
            "exec" => MountOption::Exec(true),
            "noexec" => MountOption::Exec(false),
            "atime" => MountOption::Atime(true),
            "noatime" => MountOption::Atime(false),
            "allow_other" => MountOption::AllowOther,
            _ => return bad(format!("unknown option {name}; known are {KNOWN}")),
        })
    }
}

/// All mount options together, with their defaults.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountOptions {
    pub read_only: bool,
    /// fsync waits for the server's acknowledgement
    pub sync: bool,
    pub suid: bool,
    pub dev: bool,
    pub exec: bool,
    pub atime: bool,
    pub allow_other: bool,
    /// how long a change ages before it is shipped
    pub age: Duration,
    /// how long the server may be silent; never zero
    pub timeout: Duration,
    pub passthrough: Passthrough,
    pub coherence: Coherence,
    pub uring: Uring,
    pub offline: Offline,
    pub reserve: Reserve,
    pub offline_space: OfflineSpace,
    pub cache: Option<PathBuf>,
    /// bytes of data that the cache may hold; none: no limit
    pub cache_max: Option<u64>,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            read_only: false,
            sync: false,
            suid: true,
            dev: true,
            exec: true,
            atime: true,
            allow_other: false,
            age: Duration::from_secs(2),
            timeout: Duration::from_secs(10),
            passthrough: Passthrough::Auto,
            coherence: Coherence::CloseToOpen,
            uring: Uring::Auto,
            offline: Offline::Error,
            reserve: Reserve::On,
            offline_space: OfflineSpace::Granted,
            cache: None,
            cache_max: None,
        }
    }
}

impl MountOptions {
    /// The defaults, changed by each option in turn: the last one wins.
    pub fn collect<'a>(options: impl IntoIterator<Item = &'a MountOption>) -> MountOptions {
        let mut all = MountOptions::default();
        for option in options {
            match option {
                MountOption::ReadOnly(it) => all.read_only = *it,
                MountOption::Sync(it) => all.sync = *it,
                MountOption::Suid(it) => all.suid = *it,
                MountOption::Dev(it) => all.dev = *it,
                MountOption::Exec(it) => all.exec = *it,
                MountOption::Atime(it) => all.atime = *it,
                MountOption::AllowOther => all.allow_other = true,
                MountOption::Age(it) => all.age = *it,
                MountOption::Timeout(it) => all.timeout = *it,
                MountOption::Passthrough(it) => all.passthrough = *it,
                MountOption::Coherence(it) => all.coherence = *it,
                MountOption::Uring(it) => all.uring = *it,
                MountOption::Offline(it) => all.offline = *it,
                MountOption::Reserve(it) => all.reserve = *it,
                MountOption::OfflineSpace(it) => all.offline_space = *it,
                MountOption::Cache(it) => all.cache = Some(it.clone()),
                MountOption::CacheMax(it) => all.cache_max = Some(*it),
                MountOption::Ignored => {}
            }
        }
        all
    }
}
